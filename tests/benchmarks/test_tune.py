from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import tune
from benchmarks.tune import CASES, main
from tests.benchmarks.tables import run


def test_every_training_has_a_row_with_perplexities_and_what_came_back(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"steps": 2, "batch_size": 2}
    trainings = {f"`--method {name}`": {"method": name, **small} for name in ("distil", "lora")}
    model = shared / "models" / "stories260k-gqa"
    case = replace(CASES[1], name="tiny", model=model, length=32, calibration=8, training=8, trainings=trainings)
    monkeypatch.setattr(tune, "CASES", (case,))
    monkeypatch.setattr(tune, "HELD_OUT_BLOCKS", 4)
    for name in ("valid.txt", "test.txt"):
        (tmp_path / name).write_text((shared / "data" / "wikitext2" / name).read_text()[:4000])
    table = run(main, tmp_path, f"--texts={tmp_path}")
    assert list(table) == ["tiny, `--method distil`", "tiny, `--method lora`"]
    for row in table.values():
        assert float(row["before"]) > float(row["dense"])
        assert float(row["seconds"]) > 0
