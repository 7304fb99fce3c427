"""Maps a layer's tensors in checkpoints to those of the model's class, where the two differ.

Transformers renames and merges such tensors when it loads a model, and reverses that when it saves one. In a mixture of
experts, for example, a checkpoint stores each expert's projections separately, while the class has one tensor for all.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A layer's tensor that checkpoints may store under another name or in parts; names are relative to the layer.

    Attributes:
        name: The tensor's name in the model's class.
        parts: The names of its parts in the files, in order; each part has an equal share of the rows. If the names
            contain {expert}, every expert has such parts, and the tensor is (experts, rows, columns).
    """

    name: str
    parts: tuple[str, ...]

    @property
    def by_expert(self) -> bool:
        """Whether every expert has its own parts."""
        return "{expert}" in self.parts[0]

    def names(self, num_experts: int) -> Iterator[str]:
        """Yield the names of all parts, one expert after another."""
        for expert in range(num_experts if self.by_expert else 1):
            yield from (part.format(expert=expert) for part in self.parts)

    def part_shape(self, shape: Shape) -> Shape:
        """Return the shape of each part from the shape of the tensor."""
        rows, *columns = shape[1:] if self.by_expert else shape
        return (rows // len(self.parts), *columns)

    def whole_shape(self, part_shape: Shape, num_experts: int) -> Shape:
        """Return the shape of the tensor from the shape of each part."""
        rows, *columns = part_shape
        whole = (rows * len(self.parts), *columns)
        return (num_experts, *whole) if self.by_expert else whole

    def merge(self, tensors: dict[str, Tensor], num_experts: int) -> Tensor:
        """Remove the parts from a layer's tensors, and return the tensor merged from them."""
        names = list(self.names(num_experts))
        first = tensors[names[0]]
        dtype = reduce(torch.promote_types, (tensors[name].dtype for name in names))
        whole = first.new_empty(self.whole_shape(tuple(first.shape), num_experts), dtype=dtype)
        # Copy parts one by one, so that the layer is never in memory twice.
        for part, name in zip(whole.view(len(names), *first.shape), names, strict=True):
            part.copy_(tensors.pop(name))
        return whole

    def split(self, whole: Tensor) -> dict[str, Tensor]:
        """Return the parts of the tensor by name."""
        num_experts = len(whole) if self.by_expert else 1
        names = list(self.names(num_experts))
        parts = whole.reshape(len(names), *self.part_shape(tuple(whole.shape)))
        return dict(zip(names, parts, strict=True))
