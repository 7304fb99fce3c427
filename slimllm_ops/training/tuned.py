r"""Reads a checkpoint as it is after training: each stored tensor, changed by what was trained.

    adapters    W + (alpha / rank) B A      (Hu et al. 2021), rounded to the stored dtype
    weights     the trained tensor, rounded to the stored dtype

No process holds the whole model: a tensor is changed when it is read.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.files import read_plain

# Returns a tensor as it is after training, from its full name and its value before.
Change = Callable[[str, Tensor], Tensor]

ADAPTERS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# What peft puts before a module's name.
_WRAPPED = "base_model.model."


@dataclass(frozen=True)
class TunedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are changed as they are read."""

    change: Change = lambda name, tensor: tensor

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Return tensors after training by their full names, in their stored dtype."""
        before = super().read(names)
        return {name: self.change(name, tensor).to(tensor.dtype) for name, tensor in before.items()}


def tuned(checkpoint: Checkpoint, trained: Path) -> TunedCheckpoint:
    """Return a checkpoint as it is after training.

    Args:
        checkpoint: The checkpoint that was trained.
        trained: What the trainer saved: adapters, or all weights.
    """
    if (trained / ADAPTERS).is_file():
        return _changed(checkpoint, _merged(trained))
    weights = Checkpoint.open(trained)
    return _changed(checkpoint, lambda name, tensor: weights.read([name])[name])


def _changed(checkpoint: Checkpoint, change: Change) -> TunedCheckpoint:
    return TunedCheckpoint(**{one.name: getattr(checkpoint, one.name) for one in fields(checkpoint)}, change=change)


def _merged(trained: Path) -> Change:
    """Return the change that adds a folder's adapters to the weights that they are on."""
    adapters = load_file(trained / ADAPTERS)
    config = json.loads(read_plain(trained / ADAPTER_CONFIG, 1 << 20))
    scale = config["lora_alpha"] / config["r"]

    def merge(name: str, weight: Tensor) -> Tensor:
        module = _WRAPPED + name.removesuffix(".weight")
        if (down := adapters.get(f"{module}.lora_A.weight")) is None:
            return weight
        up = adapters[f"{module}.lora_B.weight"]
        return weight.to(torch.float32) + scale * (up.float() @ down.float())

    return merge
