import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.ablation import main, rows
from tests.benchmarks.tables import numbers, require_positive, run


@pytest.mark.usefixtures("local_ray")
def test_every_step_has_a_row(tmp_path: Path, make_llama: Callable[..., Path], token_file: Path) -> None:
    # A model and tokens under the names of the smallest column's.
    shared = tmp_path / "shared"
    shutil.copytree(make_llama(num_hidden_layers=4), shared / "models" / "stories260k-mha")
    (shared / "golden" / "tokens").mkdir(parents=True)
    for part in ("calibration", "heldout"):
        shutil.copy(token_file, shared / "golden" / "tokens" / f"stories260k.{part}.parquet")
    table = run(main, tmp_path, "stories260k-mha", "--ratio=0.55", f"--shared={shared}")
    assert list(table) == ["dense (loss)", "SlimLLM, published (loss)", *(name for name, _ in rows())]
    (column,) = list(table["dense (loss)"])[1:]
    assert column.startswith("stories260k-mha, ratio 0.55 (")
    require_positive(table["dense (loss)"], [column])
    require_positive(table["SlimLLM, published (loss)"], [column])
    # A random model may lose nothing by pruning, so gaps need not be positive.
    assert all(math.isfinite(number) for row in table.values() for number in numbers(row[column]))
    assert all(numbers(row[column]) for row in table.values())
    assert table["SlimLLM, published"][column] == "1.00"
