"""Importing slimllm is enough to load pruned models, and does not itself import transformers' modelling code."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slimllm_ops.models.families import FAMILIES, Family, family_named
from tests.forks import Forks
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[3]
LOADED = """
import sys
modules = [name for name in sys.modules if name.startswith("transformers.models.") and ".modeling_" in name]
print(*sorted({name.split(".")[2] for name in modules} - {"auto"}))
"""


# What transformers takes from others: two of the four seconds that it needs.
IMPORTS = """
import accelerate, huggingface_hub.hf_api, scipy.optimize, sys, torch
import torch._dynamo.aot_compile, torch.distributed.tensor, torch.onnx
assert "transformers" not in sys.modules
"""
Run = Callable[..., str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Run a program in a process that has not imported transformers, and return what it prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    forks = Forks(IMPORTS, environment, tmp_path_factory.mktemp("registration"))

    def printed(program: str) -> str:
        ended = forks.run(program)
        assert ended.code == 0, ended.stderr[-2000:]
        return ended.stdout.strip()

    yield printed
    forks.close()


@pytest.fixture(scope="module")
def pruned_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a pruned class without its code, so that only a class that is known can load it."""
    directory = tmp_path_factory.mktemp("pruned")
    family = family_named("qwen2")
    config = save_tiny(family, directory / "dense") / "config.json"
    described = family.pruned.config_class.from_pretrained(config.parent)
    numbers = {"num_attention_heads_per_layer": [2, 4, 4], "num_key_value_heads_per_layer": [1, 2, 2]}
    numbers |= {"intermediate_size_per_layer": [48, 9, 48]}
    flags = dict.fromkeys(("attention_output_bias_per_layer", "mlp_output_bias_per_layer"), [False] * 3)
    for name, value in (numbers | flags).items():
        setattr(described, name, value)
    family.pruned(described).save_pretrained(directory)
    for path in directory.glob("*.py"):
        path.unlink()
    return directory


@pytest.mark.parametrize("module", ["slimllm_ops", "slimllm_ops.module_solves", "slimllm_ops.stream.passes"])
def test_importing_slimllm_loads_no_modelling_code(run: Run, module: str) -> None:
    assert run(f"import {module}\n{LOADED}") == ""


def test_a_solve_needs_no_transformers(run: Run) -> None:
    assert run("import sys, slimllm_ops.module_solves\nprint('transformers' in sys.modules)") == "False"


@pytest.mark.parametrize(
    "imports",
    [
        "import slimllm_ops\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM\nimport slimllm_ops",
        "import transformers\nimport slimllm_ops\nfrom transformers import AutoModelForCausalLM",
    ],
    ids=["slimllm first", "transformers first", "between"],
)
def test_pruned_models_load_without_remote_code_in_any_order_of_imports(
    run: Run, imports: str, pruned_qwen: Path
) -> None:
    load = f"""
model = AutoModelForCausalLM.from_pretrained({str(pruned_qwen)!r}, trust_remote_code=False)
print(type(model).__module__, model.model.layers[1].mlp.down_proj.in_features)
"""
    printed = run(f"{imports}\n{load}\n{LOADED}").splitlines()
    # The family that was asked for, and no other.
    assert printed == ["slimllm_ops.models.pruned.pruned_qwen2 9", "qwen2"]


def test_a_class_that_is_imported_by_its_file_is_known_too(run: Run) -> None:
    program = """
from slimllm_ops.models.pruned.pruned_llama import PrunedLlamaConfig, PrunedLlamaForCausalLM
from transformers import AutoConfig, AutoModelForCausalLM
config = PrunedLlamaConfig(num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=1, vocab_size=9)
assert type(AutoModelForCausalLM.from_config(config)) is PrunedLlamaForCausalLM
assert type(AutoConfig.for_model("pruned_llama")) is PrunedLlamaConfig
"""
    run(program)


def test_a_config_is_made_by_name_before_its_class_is_imported(run: Run) -> None:
    program = """
import slimllm_ops
from transformers import AutoConfig
config = AutoConfig.for_model("pruned_gemma3_text", num_hidden_layers=1)
print(type(config).__name__, config.num_hidden_layers)
"""
    assert run(program) == "PrunedGemma3TextConfig 1"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_row_says_what_its_class_says(family: Family) -> None:
    pruned = family.pruned
    assert pruned.config_class.model_type == f"pruned_{family.model_type}"
    assert f"{pruned.base_model_prefix}.{pruned.layers_path}" == family.layers
    assert pruned.attention_names == family.attention_names
    assert pruned.mlp_names == family.mlp_names
