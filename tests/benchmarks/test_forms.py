from collections.abc import Callable
from pathlib import Path

from benchmarks.forms import main
from tests.benchmarks.tables import require_positive, run


def test_forms_are_compared_and_exported(tmp_path: Path, make_llama: Callable[..., Path], token_file: Path) -> None:
    model = make_llama(intermediate_size=64, num_hidden_layers=2)
    inputs = (f"--model={model}", f"--calibration={token_file}", f"--evaluate={token_file}", "--sparsity=0.3")
    chosen = ("--method=gram", "--form=no bias", "--form=uniform, channels by 32, no bias")
    rows = run(main, tmp_path, *inputs, *chosen)
    assert list(rows) == ["dense", "gram, no bias", "gram, uniform, channels by 32, no bias"]
    for row in rows.values():
        require_positive(row, ["30%"])
    assert rows["dense"]["stock class"] == "LlamaForCausalLM"
    assert rows["gram, no bias"]["stock class"] == "none"
    assert rows["gram, uniform, channels by 32, no bias"]["stock class"] == "LlamaForCausalLM"
    assert rows["gram, no bias"]["layers left"] == "2"
