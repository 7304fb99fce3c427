"""No code of a stranger's model passes into the pruned one, where `trust_remote_code=True` would run it."""

import json
import shutil
from pathlib import Path

import pytest

from slimllm_ops.models.pruned import pruned_layers, pruned_llama
from tests.elsewhere import Elsewhere
from tests.orchestrator.conftest import PruneModel

EVIL = "raise SystemExit('evil was run')\n"
HUB = "evil/repo--evil.Evil"


@pytest.fixture
def strange(gqa_model: Path, shared: Path, tmp_path: Path) -> Path:
    """A model that works, and tries every way to have its code run."""
    directory = shutil.copytree(gqa_model, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shared / "models/stories260k-gqa" / name, directory / name)
    for name in ("evil.py", "pruned_llama.py", "pruned_layers.py", "Pruned_Llama.PY", "more/evil.py", "evil.pyc"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(EVIL)
    maps = {"AutoConfig": HUB, "AutoModelForCausalLM": HUB, "AutoTokenizer": [HUB, HUB], "AutoProcessor": HUB}
    ways = {
        "auto_map": maps,
        "attn_implementation": "evil/repo",
        "_attn_implementation": "evil/repo:evil",
        "kernel_config": {"RMSNorm": "evil/repo:evil"},
        "custom_pipelines": {"text-generation": {"impl": HUB, "pt": ["AutoModelForCausalLM"]}},
    }
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "generation_config.json"):
        path = directory / name
        held = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(held | ways if name == "config.json" else held | {"auto_map": maps}))
    (directory / "modules.json").write_text(json.dumps([{"type": HUB}]))
    return directory


@pytest.mark.parametrize("settings", [{}, {"method": "gram", "refine": True}], ids=["slimllm", "refined"])
def test_the_only_code_in_an_output_is_ours(
    strange: Path, prune_model: PruneModel, settings: dict[str, object]
) -> None:
    output = Path(prune_model(strange, **settings).output)
    code = {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob("*") if is_code(path)}
    assert code == {Path(one.__file__).name: Path(one.__file__).read_bytes() for one in (pruned_llama, pruned_layers)}
    for path in output.rglob("*.json"):
        assert "evil" not in path.read_text(), path
    described = json.loads((output / "config.json").read_text())
    assert described["auto_map"] == {
        "AutoConfig": "pruned_llama.PrunedLlamaConfig",
        "AutoModel": "pruned_llama.PrunedLlamaModel",
        "AutoModelForCausalLM": "pruned_llama.PrunedLlamaForCausalLM",
    }


def is_code(path: Path) -> bool:
    return path.is_file() and (".py" in path.name.lower() or EVIL.encode() in path.read_bytes())


def test_the_model_card_loads_both_where_slimllm_is_not(
    strange: Path, prune_model: PruneModel, elsewhere: Elsewhere, tmp_path: Path
) -> None:
    output = Path(prune_model(strange).output)
    program = (output / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert program.count("trust_remote_code") == 1
    program = program.replace("<this directory>", str(output)) + "print(model.num_parameters(), len(tokenizer('a b')))"
    ended = elsewhere.run(program, tmp_path)
    assert ended.code == 0, ended.stderr
    assert "evil" not in ended.stdout + ended.stderr
