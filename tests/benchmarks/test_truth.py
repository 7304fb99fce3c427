from pathlib import Path

import pytest

from benchmarks import truth
from benchmarks.truth import main, rows
from tests.benchmarks.tables import run


def test_every_method_has_a_row_with_its_perplexity_and_gap(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("LENGTH", 32), ("CALIBRATION_BLOCKS", 8), ("HELD_OUT_BLOCKS", 4)):
        monkeypatch.setattr(truth, name, value)
    for name in ("valid.txt", "test.txt"):
        (tmp_path / name).write_text((shared / "data" / "wikitext2" / name).read_text()[:4000])
    model = shared / "models" / "stories260k-gqa"
    table = run(main, tmp_path, f"--model={model}", f"--texts={tmp_path}", "--sparsity=0.3")
    assert list(table) == ["dense", *(name for name, _ in rows())]
    perplexities = {name: float(row["30%: perplexity"]) for name, row in table.items()}
    assert all(found > perplexities["dense"] for name, found in perplexities.items() if name != "dense")
    assert table["`slimllm`"]["30%: gap"] == "1.00"
    assert all(float(row["30%: gap"]) > 0 for name, row in table.items() if name != "dense")
