"""Computes a whole model's results in one call, for comparison with a stream."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from slimllm_ops.models.families import family_of

NUM_LAYERS = 3


class Whole:
    """What the whole model computes: each layer's output, and what enters its modules."""

    def __init__(self, model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
        self.entered: dict[str, list[torch.Tensor]] = {}
        layers = model.get_submodule(family_of(model.config).layers)
        self.states: list[list[torch.Tensor]] = [[] for _ in range(NUM_LAYERS + 1)]
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._noter(name), with_kwargs=True)
        for index, layer in enumerate(layers):
            layer.register_forward_hook(self._keeper(index + 1))
        with torch.inference_mode():
            outputs = [model(ids, labels=ids) for ids in batches]
        self.states[0] = self.entered[f"{family_of(model.config).layers}.0"]
        self.losses = [float(output.loss) for output in outputs]

    def _noter(self, name: str) -> Any:
        def note(module: torch.nn.Module, arguments: tuple, keywords: dict) -> None:
            given = (*arguments, *keywords.values())
            self.entered.setdefault(name, []).append(given[0])

        return note

    def _keeper(self, index: int) -> Any:
        def keep(module: torch.nn.Module, arguments: tuple, output: torch.Tensor) -> None:
            self.states[index].append(output)

        return keep


def whole(directory: Path, batches: list[torch.Tensor]) -> Whole:
    return Whole(AutoModelForCausalLM.from_pretrained(directory).eval(), batches)
