"""`prune` takes every method that `compare` knows, and does the same by it."""

import io
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from orchestrator import CompareConfig, PruneConfig, compare
from orchestrator.cli import main
from orchestrator.config import METHODS, ONE_PASS
from orchestrator.pipeline import PRUNERS, calibrate
from orchestrator.progress import Reporter
from slimllm_ops.decide.plan import LayerPlan, Plan
from tests.orchestrator.conftest import PruneModel

SPARSITY = 0.33


def quiet() -> Reporter:
    return Reporter(Console(file=io.StringIO()))


def kept_units(checkpoint: Path) -> list[tuple[tuple[int, ...] | None, ...]]:
    """The heads and channels that stay, layer by layer; None for a module that is whole."""

    def kept(layer: LayerPlan) -> tuple[tuple[int, ...] | None, ...]:
        return tuple(None if one is None else one.kept for one in (layer.attention, layer.mlp))

    return [kept(layer) for layer in Plan.read(checkpoint / "pruning" / "plan.json").layers]


@pytest.fixture(scope="module")
def moments(local_ray: None, gqa_model: Path, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = str(tmp_path_factory.mktemp("moments") / "kept")
    data = {"model": str(gqa_model), "calibration": str(token_file)}
    return Path(calibrate(PruneConfig(method="gram", workers=1, output=output, **data), quiet()))


@pytest.fixture(scope="module")
def compared(
    local_ray: None,
    gqa_model: Path,
    token_file: Path,
    held_out_file: Path,
    tracking_uri: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The checkpoints that a comparison kept."""
    config = CompareConfig(
        **{"model": str(gqa_model), "calibration": str(token_file), "evaluate": (str(held_out_file),)},
        **{"sparsity": SPARSITY, "workers": 1, "tracking_uri": tracking_uri, "keep_checkpoints": True},
        output=str(tmp_path_factory.mktemp("comparison") / "out"),
    )
    return compare(config, quiet()).output / "checkpoints"


def test_every_method_prunes() -> None:
    assert tuple(PRUNERS) == METHODS


@pytest.mark.parametrize("method", ONE_PASS.names)
def test_a_method_keeps_the_units_that_it_keeps_in_a_comparison(
    method: str, prune_model: PruneModel, gqa_model: Path, moments: Path, compared: Path
) -> None:
    run = prune_model(gqa_model, method=method, sparsity=SPARSITY, moments=str(moments), calibration=None)
    kept = kept_units(Path(run.output))
    assert kept == kept_units(compared / f"{method}-sparsity-{SPARSITY}")
    assert any(units is not None for layer in kept for units in layer)


def test_methods_differ(compared: Path) -> None:
    kept = {str(kept_units(compared / f"{method}-sparsity-{SPARSITY}")) for method in METHODS}
    assert len(kept) == len(METHODS)


def test_the_command_takes_a_method_and_refines_by_it(
    local_ray: None, gqa_model: Path, token_file: Path, tracking_uri: str, moments: Path, tmp_path: Path
) -> None:
    words = ["prune", str(gqa_model), "--method", "flap", "--sparsity", str(SPARSITY), "--calibration", str(token_file)]
    words += ["--workers", "1", "--tracking-uri", tracking_uri]
    plain, refined = tmp_path / "plain", tmp_path / "refined"
    for flags in (["--output", str(plain)], ["--output", str(refined), "--refine", "--moments", str(moments)]):
        result = CliRunner().invoke(main, [*words, *flags], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert kept_units(plain) == kept_units(refined)
    assert (plain / "model.safetensors").read_bytes() != (refined / "model.safetensors").read_bytes()
