from pathlib import Path

import pytest

from benchmarks.reduction import main
from tests.benchmarks.tables import require_positive, run


@pytest.mark.usefixtures("local_ray")
def test_the_tree_is_timed_beside_gloo(tmp_path: Path) -> None:
    rows = run(main, tmp_path, "--shape", "64", "176", "--workers=1", "--workers=2")
    sent = {}
    for method in ("gram", "slimllm"):
        alone, two = (rows[f"`{method}`, 176 channels, {workers} worker(s)"] for workers in (1, 2))
        assert (alone["each sends, MB"], alone["merges in a row"], alone["tree, s"]) == ("0", "0", "")
        assert two["merges in a row"] == "1"
        require_positive(two, ["each sends, MB", "all send, MB", "tree, s", "gloo, s", "tree, of gloo"])
        sent[method] = float(two["each sends, MB"])
    assert sent["slimllm"] < sent["gram"] / 3
