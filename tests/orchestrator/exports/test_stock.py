"""`slimllm export OUTPUT --to stock`: what it writes, where, and what it says when it cannot."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.cli import main
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.decide.plan import LayerPlan
from tests.slimllm_ops.naive import random_decision
from tests.slimllm_ops.pruned import write_pruned


def pruned(source: Path, directory: Path, channels: tuple[int, int, int] = (20, 20, 20)) -> Path:
    """Write a model whose layers keep so many channels."""
    plans = [LayerPlan(mlp=random_decision(layer, range(kept), 48)) for layer, kept in enumerate(channels)]
    write_pruned(Checkpoint.open(source), plans, directory)
    (directory / "pruning").mkdir()
    (directory / "pruning" / "plan.json").write_text("{}")
    return directory


def export(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["export", "--to", "stock", *map(str, arguments)])


def test_it_lies_beside_the_pruned_model_and_computes_the_same(gqa_model: Path, tmp_path: Path) -> None:
    done = export(pruned(gqa_model, tmp_path / "pruned"))
    assert done.exit_code == 0, done.output
    assert "pruned-stock, a LlamaForCausalLM that computes the same to the last bit" in done.output
    written = tmp_path / "pruned-stock"
    assert (written / "pruning" / "plan.json").exists()
    assert not list(written.glob("*.py"))
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        found, expected = (
            AutoModelForCausalLM.from_pretrained(path).eval()(ids).logits for path in (written, tmp_path / "pruned")
        )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["LICENSE", "pruning/plan.json", "pruning/figures/kept.png"])
def test_a_link_out_of_the_pruned_model_is_refused(gqa_model: Path, tmp_path: Path, name: str) -> None:
    source = pruned(gqa_model, tmp_path / "pruned")
    (tmp_path / "secret").write_text("secret")
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(tmp_path / "secret")
    done = export(source)
    assert (done.exit_code, done.output.count("\n")) == (2, 1), done.output
    assert "which is outside the directory" in done.output
    assert [path.name for path in tmp_path.iterdir() if "stock" in path.name] == []


def test_only_what_a_run_writes_comes_along_of_its_record(gqa_model: Path, tmp_path: Path) -> None:
    source = pruned(gqa_model, tmp_path / "pruned")
    for name in ("evil.py", "evil.pkl", "figures/kept.png", "figures/evil.py", "run.toml"):
        (source / "pruning" / name).parent.mkdir(exist_ok=True)
        (source / "pruning" / name).write_text("x")
    assert export(source).exit_code == 0
    record = tmp_path / "pruned-stock" / "pruning"
    found = {path.relative_to(record).as_posix() for path in record.rglob("*") if path.is_file()}
    assert found == {"plan.json", "figures/kept.png", "run.toml"}
    again = pruned(gqa_model, tmp_path / "again" / "pruned")
    (again / "pruning").rename(tmp_path / "moved")
    (again / "pruning").symlink_to(tmp_path / "moved")
    assert "(a link to a folder)" in export(again).output


def test_the_tokenizer_comes_along(shared: Path, tmp_path: Path) -> None:
    source = shared / "models" / "lab-llama-11m"
    write_pruned(Checkpoint.open(source), [LayerPlan()] * 8, tmp_path / "pruned")
    assert export(tmp_path / "pruned", "--output", tmp_path / "stock").exit_code == 0
    text = "The history of the city begins with a river ."
    assert AutoTokenizer.from_pretrained(tmp_path / "stock")(text) == AutoTokenizer.from_pretrained(source)(text)


def test_layers_that_differ_are_refused_and_nothing_is_left(gqa_model: Path, tmp_path: Path) -> None:
    done = export(pruned(gqa_model, tmp_path / "pruned", (20, 20, 24)))
    assert done.exit_code == 2
    assert "differ in shape, and a stock class has one shape for all: prune with --uniform" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


def test_what_is_there_stays_unless_it_is_to_be_replaced(gqa_model: Path, tmp_path: Path) -> None:
    source = pruned(gqa_model, tmp_path / "pruned")
    assert export(source).exit_code == 0
    again = export(source)
    assert again.exit_code == 2
    assert "is not empty: choose another --output, or pass --overwrite" in again.output
    assert export(source, "--overwrite").exit_code == 0


@pytest.mark.parametrize("missing", ["nothing", "empty"])
def test_what_is_no_model_is_refused_in_one_line(tmp_path: Path, missing: str) -> None:
    (tmp_path / "empty").mkdir()
    done = export(tmp_path / missing)
    assert done.exit_code == 2
    assert len(done.output.splitlines()) == 1


def test_every_family_is_listed() -> None:
    said = CliRunner().invoke(main, ["families"]).output.splitlines()
    assert len(said) >= 14
    assert "llama         heads and channels" in said
    assert any(line.startswith("olmo2") and "no heads, since its q_norm and k_norm" in line for line in said)
