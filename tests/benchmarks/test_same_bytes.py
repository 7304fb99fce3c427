import json
import sys
from pathlib import Path

import click
import pytest

from benchmarks.same_bytes import Comparison, compare_outputs, main
from tests.benchmarks.tables import read_table, run

ROOT = Path(__file__).parents[2]
CODE = '"""Pruned models."""\n\n\nclass Pruned:\n    """A pruned model."""\n\n    kept = 3  # heads\n'
FILES = {
    "model.safetensors": "weights",
    "pruned_llama.py": CODE,
    "README.md": "# A model\n",
    "config.json": json.dumps({"hidden_size": 32}),
    "pruning/asked.json": json.dumps({"seed": 0, "alpha": None}),
    "pruning/plan.json": json.dumps({"params": {"seed": 0}, "layers": [{"kept": [0, 1]}, {"kept": [2]}]}),
    "pruning/run.toml": "# slimllm 1\nseed = 0\n",
    "pruning/metrics.jsonl": "times",
}


def write(folder: Path, **changed: str) -> Path:
    """Write an output of which some files are others: `model__safetensors` is model.safetensors."""
    names = {name.replace("/", "_").replace(".", "__"): name for name in FILES}
    for name, text in (FILES | {names.get(key, key): text for key, text in changed.items()}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, Comparison(files=7)),
        ({"pruning_metrics__jsonl": "other times"}, Comparison(files=7)),
        ({"model__safetensors": "other weights"}, Comparison(files=7, differing=["model.safetensors"])),
        ({"extra": "more"}, Comparison(files=8, differing=["extra (only after)"])),
        ({"pruned_llama__py": CODE.replace("A pruned", "Some")}, Comparison(files=7, text=["pruned_llama.py"])),
        ({"pruned_llama__py": CODE.replace("# heads", "# of them")}, Comparison(files=7, text=["pruned_llama.py"])),
        ({"pruned_llama__py": CODE.replace("3", "4")}, Comparison(files=7, differing=["pruned_llama.py"])),
        ({"README__md": "# The model\n"}, Comparison(files=7, text=["README.md"])),
        ({"pruning_run__toml": "# slimllm 2\nseed = 0\n"}, Comparison(files=7, text=["pruning/run.toml"])),
        (
            {"pruning_run__toml": "# slimllm 1\nseed = 0\nlocal = true\n"},
            Comparison(files=7, settings=["pruning/run.toml: +local"]),
        ),
        (
            {"pruning_asked__json": '{"seed": 1, "local": true}'},
            Comparison(files=7, settings=["pruning/asked.json: -alpha +local"], differing=["pruning/asked.json: seed"]),
        ),
        (
            {"pruning_plan__json": '{"params": {"seed": 0}, "layers": [{"kept": [0, 1]}, {"kept": [3]}]}'},
            Comparison(files=7, differing=["pruning/plan.json: layers[1].kept[0]"]),
        ),
        # A key of a model's config is no setting of the run.
        (
            {"config__json": '{"hidden_size": 32, "bias": true}'},
            Comparison(files=7, differing=["config.json: +bias"]),
        ),
    ],
)
def test_what_differs_is_named(tmp_path: Path, changed: dict[str, str], expected: Comparison) -> None:
    assert compare_outputs(write(tmp_path / "a"), write(tmp_path / "b", **changed)) == expected


def test_a_run_that_fails_is_told(tmp_path: Path) -> None:
    output = tmp_path / "table.md"
    checkouts = (f"--before={ROOT}", f"--before-python={sys.executable}", f"--after={ROOT}")
    with pytest.raises(SystemExit) as ended:
        # Refused before anything is imported.
        main.main(
            [*checkouts, "--models=builtin", "--methods=gram", "--samples=0", f"--output={output}"],
            standalone_mode=False,
        )
    assert ended.value.code == 1
    (row,) = read_table(output).values()
    assert row["model, method"] == "builtin, gram"
    assert row["result"].startswith("before failed, exit code 2: ")


def test_an_interpreter_that_imports_other_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(click.ClickException, match="does not import the code in"):
        main.main([f"--before={tmp_path}", f"--before-python={sys.executable}"], standalone_mode=False)


@pytest.mark.slow
def test_a_checkout_prunes_to_its_own_bytes(tmp_path: Path) -> None:
    here = (f"--before={ROOT}", f"--before-python={sys.executable}", f"--after-python={sys.executable}")
    small = ("--methods=gram", "--models=builtin", "--samples=4", "--sequence-length=32", "--no-evaluate")
    rows = run(main, tmp_path, *here, *small)
    (row,) = rows.values()
    assert int(row["files"]) > 10
    assert (row["result"], row["settings of one side"], row["text"]) == ("equal", "none", "equal")
