"""`prune` accepts every method of `compare`, and prunes the same units with it."""

import io
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from orchestrator import CompareConfig, PruneConfig, compare
from orchestrator.cli import main
from orchestrator.methods import ONE_PASS
from orchestrator.pipeline import calibrate
from orchestrator.progress import Reporter
from slimllm_ops.allocate.budget import spend_evenly
from slimllm_ops.decide.plan import LayerPlan, Plan
from slimllm_ops.methods import METHODS, Method, leave
from slimllm_ops.moments.projection import Projection
from slimllm_ops.moments.ranking import Ranking
from tests.orchestrator.conftest import PruneModel

SPARSITY = 0.33
STEP = 4


def quiet() -> Reporter:
    return Reporter(Console(file=io.StringIO()))


def kept_units(checkpoint: Path) -> list[tuple[tuple[int, ...] | None, ...]]:
    """The heads and channels that stay, layer by layer; None for a module that is whole."""

    def kept(layer: LayerPlan) -> tuple[tuple[int, ...] | None, ...]:
        return tuple(None if one is None else one.kept for one in (layer.attention, layer.mlp))

    return [kept(layer) for layer in Plan.read(checkpoint / "pruning" / "plan.json").layers]


def weights(checkpoint: Path) -> tuple[bytes, ...]:
    """The files of a checkpoint's weights."""
    files = sorted(checkpoint.glob("*.safetensors"))
    assert files
    return tuple(file.read_bytes() for file in files)


@pytest.fixture(scope="module")
def moments(gqa_model: Path, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = str(tmp_path_factory.mktemp("moments") / "kept")
    data = {"model": str(gqa_model), "calibration": str(token_file)}
    return Path(calibrate(PruneConfig(method="gram", local=True, output=output, **data), quiet()))


@pytest.fixture(scope="module")
def compared(
    gqa_model: Path,
    token_file: Path,
    held_out_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The checkpoints that a comparison of flap and slimllm kept."""
    config = CompareConfig(
        **{"model": str(gqa_model), "calibration": str(token_file), "evaluate": (str(held_out_file),)},
        **{"sparsity": SPARSITY, "local": True, "tracking_uri": "none", "keep_checkpoints": True},
        multiple_of=STEP,
        methods=("flap",),
        output=str(tmp_path_factory.mktemp("comparison") / "out"),
    )
    return compare(config, quiet()).output / "checkpoints"


@pytest.fixture(scope="module")
def pruned(prune_model: PruneModel, gqa_model: Path, moments: Path) -> dict[str, Path]:
    """A checkpoint by every one-pass method and by one of a user's own, from the same moments."""

    def keep_the_first(projection: Projection, num_units: int) -> Ranking:
        return Ranking(tuple(reversed(range(num_units))), (1.0,) * num_units)

    given = {"sparsity": SPARSITY, "multiple_of": STEP, "moments": str(moments), "calibration": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "mine", Method("mine", keep_the_first, spend_evenly, leave, "a user", "all"))
        return {name: Path(prune_model(gqa_model, method=name, **given).output) for name in METHODS}


def test_a_method_keeps_the_units_that_it_keeps_in_a_comparison(pruned: dict[str, Path], compared: Path) -> None:
    kept = kept_units(pruned["flap"])
    assert kept == kept_units(compared / f"flap-sparsity-{SPARSITY}")
    channels = [units for _, units in kept if units is not None]
    assert channels
    assert all(len(units) % STEP == 0 for units in channels)


def test_every_method_writes_another_model(pruned: dict[str, Path]) -> None:
    assert len(set(map(weights, pruned.values()))) == len(ONE_PASS.names) + 1
    kept = kept_units(pruned["mine"])[0][1]
    assert kept is not None
    assert kept == tuple(range(len(kept)))
    # These two differ in what they recover, and the others in what they keep.
    assert kept_units(pruned["fasp"]) == kept_units(pruned["wanda-sp"])
    assert len({str(kept_units(path)) for path in pruned.values()}) == len(ONE_PASS.names)


def test_the_command_takes_a_method_and_refines_by_it(
    gqa_model: Path, token_file: Path, moments: Path, tmp_path: Path
) -> None:
    words = ["prune", str(gqa_model), "--method", "flap", "--sparsity", str(SPARSITY), "--calibration", str(token_file)]
    words += ["--local", "--tracking-uri", "none"]
    plain, refined = tmp_path / "plain", tmp_path / "refined"
    for flags in (["--output", str(plain)], ["--output", str(refined), "--refine", "--moments", str(moments)]):
        result = CliRunner().invoke(main, [*words, *flags], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert kept_units(plain) == kept_units(refined)
    assert weights(plain) != weights(refined)
