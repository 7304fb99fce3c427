"""Whole runs with protected layers: they keep their bytes, and the others give what was asked."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from orchestrator import CompareConfig, PruneConfig, compare
from orchestrator.cli import main
from orchestrator.config import read_config_file
from orchestrator.progress import Reporter
from slimllm_ops.decide.plan import Plan
from slimllm_ops.errors import InputError
from slimllm_ops.models.families import family_named
from tests.orchestrator.conftest import PruneModel
from tests.tiny import save_tiny

METHODS: dict[str, dict[str, Any]] = {
    "slimllm": {"method": "slimllm"},
    "gram": {"method": "gram"},
    "refined": {"method": "gram", "refine": True},
    "drops layers": {"method": "gram", "drop_layers": True},
}


def layer_tensors(model: Path, layer: int) -> dict[str, torch.Tensor]:
    """A layer's tensors as they are stored, by their names in the layer."""
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        stored |= load_file(file)
    key = f"layers.{layer}."
    return {name.partition(key)[2]: tensor for name, tensor in stored.items() if key in name}


def bytes_of(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()


def require_same(source: Path, pruned: Path, numbers: dict[int, int]) -> None:
    """Check that layers of a source are stored in a pruned model, by their numbers there, with the same bytes."""
    for layer, number in numbers.items():
        one, other = layer_tensors(source, layer), layer_tensors(pruned, number)
        assert one
        assert {name: bytes_of(tensor) for name, tensor in one.items()} == {
            name: bytes_of(tensor) for name, tensor in other.items()
        }


@pytest.fixture(scope="module")
def deep_model(make_llama: Any) -> Path:
    """A model of five layers in bfloat16, with grouped queries."""
    return make_llama(torch.bfloat16, num_hidden_layers=5, num_key_value_heads=2)


@pytest.mark.parametrize("method", METHODS)
def test_a_protected_layer_has_the_sources_bytes_and_the_sparsity_is_met(
    method: str, prune_model: PruneModel, deep_model: Path
) -> None:
    run = prune_model(deep_model, keep_layers=(0, -2), **METHODS[method])
    plan = Plan.read(run.output / "pruning" / "plan.json")
    assert plan.header["params"]["keep_layers"] == [0, -2]
    for layer in (0, 3):
        assert (plan.layers[layer].attention, plan.layers[layer].mlp, plan.layers[layer].dropped) == (None, None, False)
    assert not any(layer.dropped for layer in plan.layers)
    require_same(deep_model, run.output, {0: 0, 3: 3})
    assert 0.33 - 3 * 32 / run.totals.layer_parameters_before < run.totals.sparsity <= 0.33


def test_a_layer_is_dropped_only_if_it_is_not_protected(prune_model: PruneModel, deep_model: Path) -> None:
    run = prune_model(deep_model, sparsity=0.55, keep_layers=(1, 2), **METHODS["drops layers"])
    layers = Plan.read(run.output / "pruning" / "plan.json").layers
    origins = [layer for layer, one in enumerate(layers) if not one.dropped]
    assert len(origins) < 5
    require_same(deep_model, run.output, {layer: origins.index(layer) for layer in (1, 2)})


@pytest.mark.parametrize(("method", "model_type"), [("slimllm", "mixtral"), ("refined", "gpt_neox"), ("gram", "opt")])
def test_other_families_keep_theirs(method: str, model_type: str, prune_model: PruneModel, tmp_path: Path) -> None:
    source = save_tiny(family_named(model_type), tmp_path / "source")
    run = prune_model(source, sparsity=0.2, keep_layers=(-1,), **METHODS[method])
    models = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (source, run.output)]
    names = [name for name in models[0] if "layers.2." in name]
    assert names
    for name in names:
        assert torch.equal(models[0][name], models[1][name]), name
    assert run.totals.sparsity > 0.15


@pytest.mark.parametrize("method", ["slimllm", "gram", "refined"])
def test_no_layer_loses_more_than_the_limit(method: str, prune_model: PruneModel, mha_model: Path) -> None:
    run = prune_model(mha_model, sparsity=0.45, max_layer_sparsity=0.5, **METHODS[method])
    config = AutoModelForCausalLM.from_pretrained(run.output).config
    assert min(config.num_attention_heads_per_layer) == 2
    assert min(config.intermediate_size_per_layer) >= 24
    assert 0.45 - 3 * 32 / run.totals.layer_parameters_before < run.totals.sparsity <= 0.45


def test_the_ratio_of_the_paper_is_spread_over_the_other_layers(prune_model: PruneModel, deep_model: Path) -> None:
    run = prune_model(deep_model, ratio=0.4, pruned_layers=3, keep_layers=(1, 3))
    layers = Plan.read(run.output / "pruning" / "plan.json").layers
    assert [layer for layer, one in enumerate(layers) if one.ratio] == [0, 2, 4]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"keep_layers": (0, 5)}, r"layer 5 is to stay whole, but there are 5 layers: name 0 to 4, or -1 to -5"),
        ({"keep_layers": -6}, r"layer -6 is to stay whole, but there are 5 layers"),
        ({"keep_layers": range(5)}, r"all 5 layers are to stay whole: leave one out of --keep-layers"),
        ({"keep_layers": range(5), "ratio": 0.2}, r"all 5 layers are to stay whole"),
        ({"keep_layers": (1, 2, 3, 4)}, r"sparsity 0.33 is not reachable: .* it is 0\.1\d\d; ask for less, or protect"),
        (
            {"max_layer_sparsity": 0.2},
            r"sparsity 0.33 is not reachable: .* it is 0\.\d+; ask for less, or protect less",
        ),
        ({"keep_layers": (0, 1), "pruned_layers": 4}, r"4 layers are to be pruned, but only 3 need not stay whole"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    settings: dict[str, Any], said: str, prune_model: PruneModel, deep_model: Path
) -> None:
    with pytest.raises(InputError, match=said):
        prune_model(deep_model, calibration="missing.txt", **settings)


def test_the_command_takes_numbers_with_commas(deep_model: Path, token_file: Path, tmp_path: Path) -> None:
    words = ["prune", str(deep_model), "--calibration", str(token_file), "--local", "--tracking-uri", "none"]
    words += ["--output", str(tmp_path / "out"), "--dry-run"]
    assert CliRunner().invoke(main, [*words, "--keep-layers", "-1,0,3"]).exit_code == 0
    for wrong in ("0,a", "", "1.5", "0;1", "0,9"):
        result = CliRunner().invoke(main, [*words, "--keep-layers", wrong])
        assert result.exit_code == 2, wrong
        assert ("is to stay whole" if wrong == "0,9" else "something else than ints with commas") in result.stderr


def test_a_comparison_protects_the_same_layers_for_all_methods(
    deep_model: Path, token_file: Path, tmp_path: Path
) -> None:
    data = {"model": str(deep_model), "calibration": str(token_file), "evaluate": (str(token_file),)}
    config = CompareConfig(
        **data,
        **{"sparsity": 0.3, "local": True, "tracking_uri": "none", "keep_checkpoints": True},
        **{"keep_layers": (0,), "max_layer_sparsity": 0.3, "for_tp": 2, "output": str(tmp_path / "out")},
        methods=("gram-refine",),
    )
    with pytest.raises(InputError, match="not reachable"):
        compare(config, Reporter(Console(file=io.StringIO())))


def test_a_file_holds_layers_as_a_list(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("keep-layers = [0, -1]\nmax-layer-sparsity = 0.5\n")
    config = PruneConfig(**read_config_file(file))
    assert (config.keep_layers, config.max_layer_sparsity) == ((0, -1), 0.5)
