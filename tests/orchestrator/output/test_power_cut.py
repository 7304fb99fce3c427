"""The power is cut at every rename and fsync of a run: the old output is there, or the new one, or what resumes."""

import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.completion import find_damage, is_marked
from orchestrator.config import PruneConfig
from orchestrator.pipeline import PruneResult, prune
from tests.conftest import content
from tests.power_cut import Power, PowerCut

PARTS = 12


pytestmark = pytest.mark.usefixtures("figures_are_not_rendered")


@pytest.fixture(scope="module")
def power(folder: Path) -> Power:
    return Power(folder)


@pytest.fixture(scope="module")
def run(gqa_model: Path, token_file: Path) -> Callable[..., PruneResult]:
    def prune_to(output: Path, *, sparsity: float = 0.2, resume: bool = False) -> PruneResult:
        config = PruneConfig(
            model=str(gqa_model),
            calibration=str(token_file),
            method="gram",
            sparsity=(sparsity,),
            output=str(output),
            overwrite=True,
            resume=resume,
            local=True,
            tracking_uri="none",
        )
        return prune(config)

    return prune_to


@pytest.fixture(scope="module")
def old(run: Callable[..., PruneResult], folder: Path) -> Path:
    """An output that is to be replaced."""
    run(folder / "old", sparsity=0.4)
    return folder / "old"


@pytest.fixture(scope="module")
def expected(run: Callable[..., PruneResult], folder: Path) -> dict[str, bytes]:
    run(folder / "undisturbed")
    return content(folder / "undisturbed")


@pytest.fixture(scope="module")
def moments(run: Callable[..., PruneResult], power: Power, old: Path, folder: Path) -> int:
    """How many renames and fsyncs there are in a run."""
    shutil.copytree(old, folder / "counted")
    with power.cut_at(sys.maxsize):
        run(folder / "counted")
    assert power.moments > 5 * PARTS
    return power.moments


def require_old_new_or_resumable(
    run: Callable[..., PruneResult], power: Power, output: Path, moment: int, old: Path, expected: dict[str, bytes]
) -> None:
    replacing, exchanges = moment % 2 == 0, moment % 3 != 0
    if replacing:
        shutil.copytree(old, output)
        power.take_as_flushed(output)
    try:
        with power.cut_at(moment, exchanges=exchanges):
            run(output)
    except PowerCut:
        power.lose_what_was_not_flushed(output, seed=moment)
    if is_marked(output):
        assert find_damage(output) is None
        assert content_without_work(output) in (content(old) if replacing else {}, expected)
    else:
        assert not output.exists()
    run(output, resume=True)
    assert content(output) == expected
    assert sorted(path.name for path in output.parent.iterdir()) == [output.name]
    shutil.rmtree(output.parent)


def content_without_work(output: Path) -> dict[str, bytes]:
    return {name: held for name, held in content(output).items() if not name.startswith(".work/")}


@pytest.mark.parametrize("part", range(PARTS))
def test_a_power_cut_at_a_drawn_moment(
    run: Callable[..., PruneResult],
    power: Power,
    moments: int,
    folder: Path,
    old: Path,
    expected: dict[str, bytes],
    part: int,
) -> None:
    # Half of them at the end, where outputs change places.
    last = moments if part % 2 else 30
    moment = moments - int(last * random.Random(part).random())
    require_old_new_or_resumable(run, power, folder / str(part) / "out", moment, old, expected)


@pytest.mark.slow
def test_a_power_cut_at_every_moment(
    run: Callable[..., PruneResult], power: Power, moments: int, folder: Path, old: Path, expected: dict[str, bytes]
) -> None:
    # In some ways to end there are a few more.
    for moment in range(1, moments + 6):
        require_old_new_or_resumable(run, power, folder / "all" / "out", moment, old, expected)
