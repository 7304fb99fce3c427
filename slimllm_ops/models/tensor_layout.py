"""What checkpoints on disk call the tensors of a layer, where that is not what the model's class calls them.

Transformers renames and merges such tensors as it loads a model, and undoes it as it saves one: of a mixture of
experts, a checkpoint holds every expert's projections by themselves, where the class has one tensor for all of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor of a layer that checkpoints may hold by another name, or in parts; names are relative to the layer.

    Attributes:
        name: what the class calls it.
        parts: what the files call its parts, whose rows lie one after the other in it, evenly many of each. Where they
            name an {expert}, every expert has such parts, and the tensor is (experts, rows, columns).
    """

    name: str
    parts: tuple[str, ...]

    @property
    def by_expert(self) -> bool:
        """Whether every expert has parts of its own."""
        return "{expert}" in self.parts[0]

    def names(self, num_experts: int) -> Iterator[str]:
        """Yield the names of all parts, expert by expert."""
        for expert in range(num_experts if self.by_expert else 1):
            yield from (part.format(expert=expert) for part in self.parts)

    def part_shape(self, shape: Shape) -> Shape:
        """Return the shape of each part, from that of the tensor."""
        rows, *columns = shape[1:] if self.by_expert else shape
        return (rows // len(self.parts), *columns)

    def whole_shape(self, part_shape: Shape, num_experts: int) -> Shape:
        """Return the shape of the tensor, from that of each part."""
        rows, *columns = part_shape
        whole = (rows * len(self.parts), *columns)
        return (num_experts, *whole) if self.by_expert else whole

    def merge(self, tensors: dict[str, Tensor], num_experts: int) -> Tensor:
        """Take the parts out of a layer's tensors, and return the tensor that they make."""
        names = list(self.names(num_experts))
        first = tensors[names[0]]
        dtype = reduce(torch.promote_types, (tensors[name].dtype for name in names))
        whole = first.new_empty(self.whole_shape(tuple(first.shape), num_experts), dtype=dtype)
        # One by one, so that a layer is never held twice.
        for part, name in zip(whole.view(len(names), *first.shape), names, strict=True):
            part.copy_(tensors.pop(name))
        return whole

    def split(self, whole: Tensor) -> dict[str, Tensor]:
        """Return the parts of the tensor, by their names."""
        num_experts = len(whole) if self.by_expert else 1
        names = list(self.names(num_experts))
        parts = whole.reshape(len(names), *self.part_shape(tuple(whole.shape)))
        return dict(zip(names, parts, strict=True))
