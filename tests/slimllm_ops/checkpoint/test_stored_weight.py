"""A stored weight can be sent on its own, reads what its checkpoint reads, and does not need transformers."""

import pickle
import subprocess
import sys
from pathlib import Path

import torch

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.models.families import family_named
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[3]


def test_it_is_the_weight_that_reading_the_layer_gives(model_dir: Path) -> None:
    checkpoint = Checkpoint.open(model_dir)
    for layer in range(checkpoint.num_layers):
        tensors = checkpoint.read_layer(layer)
        for branch in (checkpoint.family.attention, checkpoint.family.mlp):
            for name in (*branch.input_weights, branch.output_weight):
                assert torch.equal(checkpoint.stored_weight(layer, name).read(), tensors[name]), (layer, name)


def test_a_process_without_transformers_unpickles_and_reads_it(tmp_path: Path) -> None:
    # Of a mixture, every expert has a tensor of its own, and they are merged where they are read.
    checkpoint = Checkpoint.open(save_tiny(family_named("mixtral"), tmp_path))
    weight = checkpoint.stored_weight(1, checkpoint.family.mlp.output_weight)
    assert len(weight.files) == 4
    (tmp_path / "weight.pickle").write_bytes(pickle.dumps(weight))
    program = """
import pickle, sys, torch
from pathlib import Path
sys.modules["transformers"] = None
folder = Path(sys.argv[1])
torch.save(pickle.loads((folder / "weight.pickle").read_bytes()).read(), folder / "weight.pt")
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "weight.pt"), weight.read())
