"""In untrusted configs, every number that determines memory is bounded, whatever else is in the file."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.writing import CheckpointWriter
from slimllm_ops.decide.plan import LayerPlan
from slimllm_ops.errors import CheckpointError, NonFiniteError
from slimllm_ops.models.config_checks import LARGEST_CONFIG, _settings_of, read_config
from slimllm_ops.models.families import FAMILIES, Family, family_named
from tests.forked_workers.server import FORKED
from tests.tiny import save_tiny

REMOVE = object()
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "layers without end": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected .* 1 to 4,096"),
    "a huge width": ({"hidden_size": 10**12}, "hidden_size is 1000000000000, expected a whole number from 1"),
    "a huge vocabulary": ({"vocab_size": 10**12}, "vocab_size is 1000000000000"),
    "a huge MLP": ({"intermediate_size": 10**15}, "intermediate_size is 10"),
    "huge heads": ({"head_dim": 10**9}, "head_dim is 1000000000"),
    "huge positions": ({"max_position_embeddings": 10**30}, "max_position_embeddings is 10"),
    "a table of labels": ({"num_labels": 10**10}, "num_labels is 10000000000"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    "negative heads": ({"num_attention_heads": -4}, "num_attention_heads is -4"),
    "too many heads": ({"num_attention_heads": 10**9}, "num_attention_heads is 1000000000"),
    "no key/value heads": ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    "heads that do not divide": ({"num_key_value_heads": 3}, r"num_key_value_heads is 3, expected a divisor .*\(4\)"),
    "a string": ({"hidden_size": "wide"}, "hidden_size is 'wide', expected a whole number"),
    "a long string": ({"hidden_size": "x" * 10**6}, r"hidden_size is 'x{59}\.\.\., expected"),
    "a list": ({"vocab_size": [97]}, r"vocab_size is \[97\]"),
    "null": ({"intermediate_size": None}, "intermediate_size is None"),
    "a fraction": ({"num_hidden_layers": 3.0}, "num_hidden_layers is 3.0"),
    "true": ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    "not a number": ({"hidden_size": float("nan")}, "hidden_size is nan"),
    "an epsilon of nothing": ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a number from 0 to 1"),
    "an infinite epsilon": ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
    "a rotation of nothing": ({"rope_theta": 0}, "rope_theta is 0, expected a number above 0, up to 1e18"),
    "a rotation that is no number": ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta is nan"),
    "a rotation that is a list": ({"rope_parameters": [1]}, r"rope_parameters is \[1\], expected an object"),
    "an unknown rotation": ({"rope_parameters": {"rope_type": "twist", "rope_theta": 1.0}}, "config.json is wrong"),
    "a negative factor": ({"rope_scaling": {"rope_type": "linear", "factor": -2.0}}, "factor is -2.0"),
    "an unknown activation": ({"hidden_act": "os.system"}, "config.json is wrong: .*os.system"),
    "an unknown dtype": ({"dtype": "float99"}, "config.json is wrong"),
    "a truth that is none": ({"tie_word_embeddings": "no"}, "config.json is wrong: .*tie_word_embeddings"),
    "a padding token that is none": ({"pad_token_id": 1000}, "config.json is wrong: .*[Pp]adding_idx"),
    "quantised": ({"quantization_config": {"bits": 4}}, "weights are quantised: pass the model in bfloat16"),
    "gptq": ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\): .*; pass the model that it was"),
    "fp8 with powers of two": (
        {"quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0"}},
        r"\(fp8\): .*FineGrainedFP8Config\(dequantize=True\)",
    ),
    "fp8 with experts in four bits": ({"quantization_config": {"quant_method": "fp8", "expert_dtype": "fp4"}}, "fp8"),
    "fp8 in odd blocks": ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}}, r"\(fp8\): "),
    "fp8 in blocks of none": ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 1]}}, "fp8"),
    "older bitsandbytes": ({"quantization_config": {"load_in_8bit": True}}, r"\(bitsandbytes\): .* dequantize\(\)"),
    "older compressed-tensors": ({"compression_config": {}}, r"\(compressed-tensors\): .*CompressedTensorsConfig"),
    "weights by another name": ({"transformers_weights": "a.safetensors"}, "rename them to model.safetensors"),
    "layers of their own": ({"per_layer_config": {"0": {"hidden_size": 4}}}, "per_layer_config, so .*not supported"),
    "no type": ({"model_type": REMOVE}, "no model_type is given; supported: .*llama"),
    "a type that is a list": ({"model_type": ["llama"]}, r"models of type \['llama'\] are not supported"),
    "lists of a pruned model": ({"intermediate_size_per_layer": [1]}, "model_type is 'llama', expected a pruned model"),
}


def rewrite(directory: Path, changes: dict[str, Any]) -> None:
    path = directory / "config.json"
    described = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in described.items() if value is not REMOVE}))


@pytest.fixture
def copy(mha_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(mha_model, tmp_path / "copy")


@pytest.fixture
def pruned(mha_model: Path, tmp_path: Path) -> Path:
    """A checkpoint as slimllm writes it, whose layers stayed whole."""
    writer = CheckpointWriter(Checkpoint.open(mha_model), tmp_path / "pruned")
    plans = [LayerPlan()] * 3
    for layer, plan in enumerate(plans):
        writer.write_layer(layer, plan)
    writer.finish(plans)
    return tmp_path / "pruned"


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_config_is_refused_in_one_line(copy: Path, wrong: str) -> None:
    changes, said = WRONG[wrong]
    rewrite(copy, changes)
    with pytest.raises(CheckpointError, match=said) as raised:
        Checkpoint.open(copy)
    assert str(copy) in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not valid JSON"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"[" * 10**6, "is nested too deeply"),
        (b'{"model_type": "llama", "a": ' + b'{"a": ' * 10**5, "is nested too deeply"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b"null", "holds a NoneType, expected a JSON object"),
    ],
)
def test_a_config_that_is_no_description_is_refused(copy: Path, content: bytes, said: str) -> None:
    (copy / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json {said}"):
        read_config(copy)


def test_a_config_without_end_is_not_read(copy: Path) -> None:
    with (copy / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=f"has {1 << 40:,} bytes, and such a file needs .*{LARGEST_CONFIG:,}"):
        read_config(copy)


def test_a_directory_that_is_no_path_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read .*too long.*: check the path"):
        read_config(Path("x" * 10_000))


def test_no_other_file_is_taken_for_the_config(copy: Path) -> None:
    """Transformers lets a config.json name the file to read in its place, which nobody would have checked."""
    shutil.copyfile(copy / "config.json", copy / "config.4.0.0.json")
    rewrite(copy, {"configuration_files": ["config.4.0.0.json"], "vocab_size": 96})
    assert read_config(copy)[0].vocab_size == 96


def test_no_code_is_run(copy: Path) -> None:
    (copy / "evil.py").write_text("raise SystemExit('was run')\nclass Config: pass\n")
    rewrite(copy, {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}})
    assert Checkpoint.open(copy).num_layers == 3


# What transformers would set as an attribute: ways to code, files and kernels, its own internals, and unknown words.
NEVER_PASS = {
    **{"attn_implementation": "evil/kernels", "_attn_implementation": "evil/kernels:run"},
    **{"_attn_implementation_internal": "evil/kernels", "attn_implementation_internal": "evil/kernels"},
    **{"experts_implementation": "evil/experts", "_experts_implementation": "evil/experts"},
    **{"use_kernels": True, "kernel_config": {"RMSNorm": "evil/kernels:Norm"}, "hub_kernels": {"a": "b/c"}},
    **{"auto_map": {"AutoConfig": "evil/repo--evil.Config"}, "custom_pipelines": {"text-generation": {"impl": "e.E"}}},
    **{"extra_files": ["/etc/passwd"], "extra_config_files": ["../x"], "fusion_config": {"a": 1}},
    **{"distributed_config": {"a": 1}, "base_model_tp_plan": {"a": "b"}, "_name_or_path": "/home/me", "x": 1},
    **{"_commit_hash": "0", "to_dict": 1, "__class__": "int", "__dict__": {}, "from_pretrained": "x"},
    **{
        "attribute_map": {"hidden_size": "x"},
        "sub_configs": {},
        "output_attentions": True,
        "gradient_checkpointing": 1,
    },
}


@pytest.mark.parametrize("name", NEVER_PASS)
def test_what_transformers_does_not_know_of_a_model_does_not_reach_it(copy: Path, name: str) -> None:
    before = read_config(copy)[0]
    rewrite(copy, {name: NEVER_PASS[name]})
    found = read_config(copy)[0]
    assert vars(found) == vars(before)
    assert type(found) is type(before)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_every_setting_that_a_model_reads_reaches_it(family: Family) -> None:
    """What the classes of transformers ask their config for, in their source."""
    stock = next(one for one in family.pruned.__mro__ if one.__module__.startswith("transformers.models."))
    module = inspect.getsource(sys.modules[stock.__module__])
    asked = set(re.findall(r"\bconfig\.([a-z_]+)\b(?!\()", module)) | set(re.findall(r'config, "([a-z_]+)"', module))
    # Internals, what is of other tasks, and of pictures.
    asked -= {"_attn_implementation", "_experts_implementation", "problem_type", "image_token_id", "vision_config"}
    asked -= {"text_config", "mm_tokens_per_image"}
    assert {"hidden_size", "num_attention_heads", "vocab_size"} <= asked
    assert _settings_of(dict.fromkeys(asked), CONFIG_MAPPING[family.model_type], family).keys() == asked


PRUNED_WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "too short": ({"intermediate_size_per_layer": [48, 48]}, "is '2 values', expected .* one for each of 3 layers"),
    "missing": ({"num_key_value_heads_per_layer": None}, "num_key_value_heads_per_layer is None"),
    "no channels": ({"intermediate_size_per_layer": [48, 0, 48]}, r"_per_layer\[1\] is 0, .* from 1 to inter.* \(48\)"),
    "more than there were": ({"num_attention_heads_per_layer": [4, 4, 5]}, r"_per_layer\[2\] is 5"),
    "no number": ({"num_attention_heads_per_layer": [4, "4", 4]}, r"_per_layer\[1\] is '4'"),
    "an object": ({"mlp_output_bias_per_layer": {"0": True}}, "is {'0': True}, expected true or false"),
    "a flag that is none": ({"attention_output_bias_per_layer": [1, 0, 0]}, r"_per_layer\[0\] is 1, expected true"),
    "odd heads": ({"num_key_value_heads_per_layer": [4, 3, 4]}, "layer 1 has 4 heads and 3 key/value heads"),
    "other shapes": (
        {"intermediate_size_per_layer": [48, 40, 48]},
        r"layer 1 of .* does not fit .*: mlp.gate_proj.weight is \(48, 32\), expected \(40, 32\)",
    ),
}


def test_what_slimllm_writes_opens(pruned: Path) -> None:
    assert Checkpoint.open(pruned).config.model_type == "pruned_llama"
    rewrite(pruned, {key: None for key in json.loads((pruned / "config.json").read_text()) if "_per_layer" in key})
    assert Checkpoint.open(pruned).config.intermediate_size_per_layer is None


@pytest.mark.parametrize("wrong", PRUNED_WRONG)
def test_a_wrong_list_of_a_pruned_model_is_refused(pruned: Path, wrong: str) -> None:
    changes, said = PRUNED_WRONG[wrong]
    rewrite(pruned, changes)
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(pruned)


MIXTURE_WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "experts without end": (
        "mixtral",
        {"num_local_experts": 10**9},
        "num_local_experts is 1000000000, expected a whole",
    ),
    "experts by another name": ("qwen3_moe", {"num_experts": 10**9}, "num_experts is 1000000000, expected a whole"),
    "no experts": ("qwen3_moe", {"num_local_experts": 0}, "num_local_experts is 0"),
    "more than there are": (
        "mixtral",
        {"num_experts_per_tok": 5},
        r"_per_tok is 5, expected at most num_local_experts \(4\)",
    ),
    "none for a token": ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
    "huge experts": ("qwen3_moe", {"moe_intermediate_size": 10**15}, "moe_intermediate_size is 10"),
    "a null of experts": ("mixtral", {"num_local_experts": None}, "num_local_experts is None"),
    "more experts than are held": (
        "mixtral",
        {"num_local_experts": 1 << 14},
        r"experts\.4\.w1\.weight|gate\.weight is",
    ),
    "fewer experts than are held": (
        "mixtral",
        {"num_local_experts": 3},
        r"does not fit its config\.json: .*gate.weight",
    ),
    "wider experts": (
        "mixtral",
        {"intermediate_size": 49},
        r"experts\.0\.w1\.weight is \(48, 32\), expected \(49, 32\)",
    ),
    "layers without experts": (
        "qwen3_moe",
        {"mlp_only_layers": [0]},
        "mlp_only_layers .0.: Qwen3Moe .* a plain MLP",
    ),
    "every other layer": ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2: .* a plain MLP"),
}


@pytest.mark.parametrize("wrong", MIXTURE_WRONG)
def test_a_wrong_config_of_a_mixture_of_experts_is_refused(tmp_path: Path, wrong: str) -> None:
    model_type, changes, said = MIXTURE_WRONG[wrong]
    directory = save_tiny(family_named(model_type), tmp_path / "model")
    rewrite(directory, changes)
    with pytest.raises(CheckpointError, match=said) as raised:
        Checkpoint.open(directory)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("missing", ["experts.2.w2.weight", "gate.weight", "experts.3.w3.weight"])
def test_a_missing_tensor_of_an_expert_is_named(tmp_path: Path, missing: str) -> None:
    directory = save_tiny(family_named("mixtral"), tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    del tensors[f"model.layers.1.block_sparse_moe.{missing}"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"layer 1 .* has no block_sparse_moe\.{missing}: the checkpoint is inc"):
        Checkpoint.open(directory)


def test_a_weight_of_an_expert_that_is_no_number_is_named(tmp_path: Path) -> None:
    directory = save_tiny(family_named("qwen3_moe"), tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.2.mlp.experts.4.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        NonFiniteError, match=r"layer 2 of .* holds NaN or infinity in mlp\.experts\.4\.up_proj\.weight"
    ):
        Checkpoint.open(directory).read_layer(2)


def test_the_largest_config_takes_no_memory(copy: Path) -> None:
    """Every size at its bound: what does not fit the files is known before anything is allocated."""
    rewrite(copy, {"hidden_size": 1 << 20, "intermediate_size": 1 << 24, "vocab_size": 1 << 24, "head_dim": 1 << 16})
    program = (
        "import resource, sys\n"
        # What opening a checkpoint imports, before its memory is measured.
        "from transformers import AutoModelForCausalLM, LlamaForCausalLM\n"
        "from slimllm_ops.checkpoint.reading import Checkpoint\n"
        "from slimllm_ops.errors import CheckpointError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: Checkpoint.open(sys.argv[1])\n"
        "except CheckpointError as error: assert 'does not fit' in str(error), error\n"
        "else: raise SystemExit('opened')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", program, str(copy)]
    done = subprocess.run(command, env=os.environ | FORKED, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100 * 1024
