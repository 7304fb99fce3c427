"""Reads a whole model onto the device that evaluates it."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from slimllm_ops.checkpoint.whole import read_whole
from slimllm_ops.stream.weights import compute_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_on(directory: Path, device: torch.device) -> "PreTrainedModel":
    """Return a model on a device, in float32 on a CPU and in bfloat16 on a GPU."""
    model = read_whole(directory, compute_dtype(device)).eval()
    nn.Module.to(model, device)
    return model
