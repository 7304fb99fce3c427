"""`slimllm export OUTPUT --to current`: an earlier version's checkpoint gets today's code, and keeps its tensors."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from orchestrator.cli import main
from orchestrator.completion import find_damage
from slimllm_ops.models.families import family_named
from slimllm_ops.models.pruned import pruned_layers
from tests.slimllm_ops.pruned import write_uneven


def export(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["export", "--to", "current", *map(str, arguments)])


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A checkpoint as an earlier version wrote it: no base class, and other code."""
    directory = write_uneven(family_named("phi3"), tmp_path)
    config = json.loads((directory / "config.json").read_text())
    del config["auto_map"]["AutoModel"]
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "pruned_layers.py").write_text("# an earlier version\n")
    (directory / "README.md").write_text("# Mine\n")
    (directory / "LICENSE").write_text("licence\n")
    (directory / "pruning").mkdir()
    (directory / "pruning" / "plan.json").write_text("{}")
    return directory


def test_it_has_todays_code_and_the_same_tensors(earlier: Path) -> None:
    done = export(earlier)
    assert done.exit_code == 0, done.output
    written = earlier.with_name("pruned-current")
    assert (written / "pruned_layers.py").read_bytes() == Path(pruned_layers.__file__).read_bytes()
    assert json.loads((written / "config.json").read_text())["auto_map"]["AutoModel"] == "pruned_phi3.PrunedPhi3Model"
    for name, text in {"README.md": "# Mine\n", "LICENSE": "licence\n", "pruning/plan.json": "{}"}.items():
        assert (written / name).read_text() == text
    shards = sorted(path.name for path in earlier.glob("*.safetensors"))
    assert shards == sorted(path.name for path in written.glob("*.safetensors"))
    assert all((written / name).read_bytes() == (earlier / name).read_bytes() for name in shards)
    assert load_file(written / shards[0])
    assert find_damage(written) is None


def test_it_can_replace_the_checkpoint_itself(earlier: Path) -> None:
    assert export(earlier, "--output", earlier).exit_code == 2
    assert (earlier / "pruned_layers.py").read_text() == "# an earlier version\n"
    done = export(earlier, "--output", earlier, "--overwrite")
    assert done.exit_code == 0, done.output
    assert "class PrunedModelMixin" in (earlier / "pruned_layers.py").read_text()


def test_a_dense_model_is_refused(gqa_model: Path) -> None:
    done = export(gqa_model)
    assert (done.exit_code, len(done.output.splitlines())) == (2, 1)
    assert "is not a pruned model (its type is llama): pass what slimllm prune wrote" in done.output


def test_a_card_that_leads_out_does_not_come_along(earlier: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (earlier / "README.md").unlink()
    (earlier / "README.md").symlink_to(tmp_path / "secret")
    assert export(earlier).exit_code == 0
    assert not (earlier.with_name("pruned-current") / "README.md").exists()
