"""The example in docs/quantise.md runs as written, on the built-in model, and does what the page says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator import PruneConfig, prune
from orchestrator.builtin import MODEL_DIR, heldout_text
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.errors import CheckpointError

PAGE = Path(__file__).parents[1] / "docs" / "quantise.md"
# int8 with a scale for each row: what its rounding may do to the logits, relative to their norm.
ROUNDING = 0.02


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder where the page's commands were run on a pruned model, and what they printed."""
    pytest.importorskip("torchao", reason="pip install '.[quantise]'")
    folder = tmp_path_factory.mktemp("quantise")
    pruned, small = folder / "pruned" / "model-0.2", {"samples": 4, "sequence_length": 64, "local": True}
    prune(PruneConfig(model=str(MODEL_DIR), output=str(pruned), method="gram", tracking_uri="none", **small))
    (folder / "heldout.txt").write_text("\n\n".join(heldout_text()[:3]))
    (folder / "example.py").write_text("".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)))
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "example.py"]
    done = subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    # A question would wait for whoever runs the example.
    assert "[y/N]" not in done.stdout + done.stderr
    return folder, done.stdout


def size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def test_the_example_prints_the_size_and_the_perplexity_of_both(workplace: tuple[Path, str]) -> None:
    folder, printed = workplace
    found = dict(re.findall(r"(\S+): ([\d,]+) bytes, perplexity \d+\.\d+", printed))
    assert {name: int(number.replace(",", "")) for name, number in found.items()} == {
        name: size(folder / name) for name in ("pruned/model-0.2", "pruned/model-0.2-int8")
    }


def test_the_files_are_smaller_and_the_logits_are_the_same_but_for_rounding(workplace: tuple[Path, str]) -> None:
    pruned, quantised = (workplace[0] / "pruned" / name for name in ("model-0.2", "model-0.2-int8"))
    assert size(quantised) < 0.7 * size(pruned)
    model = AutoModelForCausalLM.from_pretrained(pruned).eval()
    ids = torch.randint(model.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(ids).logits.float()
        # The package is imported here, so that no flag is needed for the quantised one either.
        found = AutoModelForCausalLM.from_pretrained(quantised).eval()(ids).logits.float()
    assert 0 < (found - expected).norm() < ROUNDING * expected.norm()


def test_what_is_quantised_is_not_pruned(workplace: tuple[Path, str]) -> None:
    with pytest.raises(CheckpointError, match="its weights are quantised"):
        Checkpoint.open(workplace[0] / "pruned" / "model-0.2-int8")
