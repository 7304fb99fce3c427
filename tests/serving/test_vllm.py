"""vLLM serves pruned checkpoints as they are: the same tokens as transformers, and a cache as small as the heads.

`make serve-test` makes the environment that these tests need, and runs them.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator import PruneConfig, prune
from orchestrator.exports.deci import export_deci
from orchestrator.exports.stock import export_stock
from slimllm_ops.models.families import family_named, layer_shape
from tests.serving.vllm_environment import python
from tests.slimllm_ops.pruned import write_even_heads, write_uneven

PROMPTS = [[5, 6, 7, 8, 9], [90], [3, 30, 33, 40, 50, 60, 70, 80, 9, 9, 9, 10, 11, 12], list(range(2, 60))]
NUM_TOKENS = 16
CACHE_GIB = 1
# vLLM's attention on a CPU takes heads of 32 and more.
SIZES = {"hidden_size": 256, "num_attention_heads": 8, "max_position_embeddings": 128}
GROUPED = SIZES | {"num_key_value_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen3": GROUPED | {"head_dim": 32},
    "phi3": GROUPED,
    "mixtral": GROUPED,
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(python() is None, reason="no environment with vLLM: `make serve-test` makes it"),
]


def serve(model: Path, home: Path, **settings: object) -> dict[str, Any]:
    """Return what vLLM answers, from a process that knows nothing of this checkout."""
    program = Path(__file__).with_name("vllm_answers.py")
    asked = {"enforce_eager": True, "trust_remote_code": True} | settings
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HOME": str(home), "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [str(python()), str(program), str(model), json.dumps(PROMPTS), str(NUM_TOKENS), json.dumps(asked)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=home,
        timeout=900,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


def greedy_tokens(model: Path) -> list[list[int]]:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    settings = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "eos_token_id": None}
    return [loaded.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist() for ids in PROMPTS]


@pytest.mark.parametrize("model_type", MODELS)
def test_a_checkpoint_is_served_as_it_is(model_type: str, tmp_path: Path) -> None:
    model = write_uneven(family_named(model_type), tmp_path, **MODELS[model_type])
    answered = serve(model, tmp_path)
    assert answered["tokens"] == greedy_tokens(model)
    config = AutoModelForCausalLM.from_pretrained(model).config
    heads = [layer_shape(config, layer).num_key_value_heads for layer in range(3)]
    assert heads == [1, 4, 4]
    # Keys and values of 32 numbers with 4 bytes each.
    expected = [number * 2 * 32 * 4 for number in heads]
    assert list(answered["cache_bytes_per_token"].values()) == expected
    # All of the cache's memory is used for that, and none is lost by padding small layers to large ones.
    assert CACHE_GIB * 2**30 / answered["cache_tokens"] == pytest.approx(sum(expected), rel=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"enforce_eager": False},
        {"enable_chunked_prefill": True, "max_num_batched_tokens": 16, "max_num_seqs": 4},
        {"enable_prefix_caching": True},
    ],
    ids=["compiled", "chunked prefill", "prefix caching"],
)
def test_it_is_served_in_every_way(settings: dict[str, object], tmp_path: Path) -> None:
    model = write_uneven(family_named("llama"), tmp_path, **GROUPED)
    assert serve(model, tmp_path, **settings)["tokens"] == greedy_tokens(model)


def test_a_run_of_a_real_model_is_served_from_its_output_alone(shared: Path, tmp_path: Path) -> None:
    tokens = shared / "golden" / "tokens" / "lab.calibration.parquet"
    settings = {"method": "gram", "sparsity": 0.4, "samples": 16, "local": True, "tracking_uri": "none"}
    output = str(tmp_path / "pruned")
    prune(
        PruneConfig(model=str(shared / "models" / "lab-llama-11m"), calibration=str(tokens), output=output, **settings)
    )
    answered = serve(Path(output), tmp_path)
    assert answered["tokens"] == greedy_tokens(Path(output))
    kept = json.loads(Path(output, "config.json").read_text())["num_key_value_heads_per_layer"]
    assert len(set(kept)) > 1
    assert list(answered["cache_bytes_per_token"].values()) == [number * 2 * 32 * 4 for number in kept]


@pytest.mark.parametrize(("form", "name"), [("stock", "LlamaForCausalLM"), ("deci", "DeciLMForCausalLM")])
def test_an_export_is_served_by_vllms_own_class(form: str, name: str, tmp_path: Path) -> None:
    channels = {"stock": [512, 512, 512], "deci": [512, 256, 768]}[form]
    model = write_even_heads(family_named("llama"), tmp_path, channels, **GROUPED)
    exports = {"stock": export_stock, "deci": export_deci}
    answered = serve(exports[form](model, None, overwrite=False).path, tmp_path)
    assert answered["class"] == name
    assert answered["tokens"] == greedy_tokens(model)
