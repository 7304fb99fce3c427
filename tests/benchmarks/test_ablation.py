from pathlib import Path

import pytest

from benchmarks.ablation import main, rows
from tests.benchmarks.tables import require_positive, run


# A trained model: a random one may lose nothing by pruning, and then there is no gap to be a fraction of.
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_every_step_has_a_row(tmp_path: Path, shared: Path) -> None:
    table = run(main, tmp_path, "stories260k-mha", "--ratio=0.55", f"--shared={shared}")
    assert list(table) == ["dense (loss)", "SlimLLM, published (loss)", *(name for name, _ in rows())]
    (column,) = list(table["dense (loss)"])[1:]
    assert column.startswith("stories260k-mha, ratio 0.55 (")
    for row in table.values():
        require_positive(row, [column])
    assert table["SlimLLM, published"][column] == "1.00"
