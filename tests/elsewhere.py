"""Runs programs in a Python that cannot import this project, like that of a user who receives a pruned model."""

import tempfile
from pathlib import Path

import torch

from tests.forks import Ended, Forks

# An editable install is hidden from imports too.
IMPORTS = """
import sys

class WithoutThisProject:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"slimllm_ops", "orchestrator", "actors", "cluster"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, WithoutThisProject())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
"""
LOGITS = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({directory!r}, trust_remote_code=True)
with torch.inference_mode():
    torch.save(model(torch.load({ids!r})).logits, {logits!r})
"""


class Elsewhere:
    """Programs that run where this project is not, for a whole session of tests."""

    def __init__(self, home: Path) -> None:
        self._home = home
        environment = {"HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self._forks = Forks(IMPORTS, environment, home, isolated=True)

    def run(self, program: str, folder: Path, seconds: int = 180, **environment: str) -> Ended:
        """Run a program in a folder, with nobody to ask and more variables."""
        return self._forks.run(program, folder, seconds, **environment)

    def logits(self, directory: Path | str, ids: torch.Tensor) -> torch.Tensor:
        """Load a checkpoint with `trust_remote_code=True` and return its logits of some token ids."""
        with tempfile.TemporaryDirectory(dir=self._home) as folder:
            places = {"ids": f"{folder}/ids.pt", "logits": f"{folder}/logits.pt"}
            torch.save(ids, places["ids"])
            ended = self.run(LOGITS.format(directory=str(directory), **places), Path(folder))
            assert ended.code == 0, ended.stderr
            return torch.load(places["logits"])

    def close(self) -> None:
        """End the process."""
        self._forks.close()
