"""Stores the activations of a stream's batches in memory, or in a temporary file that cannot outlive its process."""

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class States(Protocol):
    """The tensors of a stream's batches, in order; a list qualifies."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Tensor]: ...

    def __getitem__(self, index: int, /) -> Tensor: ...

    def __setitem__(self, index: int, tensor: Tensor, /) -> None: ...

    def append(self, tensor: Tensor, /) -> None:  # noqa: D102
        ...


# Returns an empty store.
StateStore = Callable[[], States]


@dataclass(frozen=True)
class _Place:
    """A tensor's position in the file, dtype and shape."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size


class SpilledStates:
    """Tensors in an unnamed file, with one at a time in memory; the file disappears when its process ends.

    The file is read and written, not mapped: mapped pages would count as memory of the process.

    Args:
        directory: The directory that the file is created in.
        device: The device that tensors are returned on.
    """

    def __init__(self, directory: Path, device: torch.device) -> None:
        self._device = device
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - open for as long as this object lives
        self._places: list[_Place] = []
        self._end = 0

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Tensor:
        place = self._places[index]
        content = bytearray(place.shape.numel() * place.dtype.itemsize)
        read = os.preadv(self._file.fileno(), [content], place.offset)
        if read != len(content):
            raise OSError(f"the spilled states of batch {index} end after {read} of {len(content)} bytes")
        return torch.frombuffer(content, dtype=place.dtype).view(place.shape).to(self._device)

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        place = self._places[index]
        assert (place.dtype, place.shape) == (tensor.dtype, tensor.shape), "a batch keeps its shape in all layers"
        self._write(tensor, place.offset)

    def append(self, tensor: Tensor) -> None:
        """Add a batch's tensor."""
        self._places.append(_Place(self._end, tensor.dtype, tensor.shape))
        self._write(tensor, self._end)
        self._end += tensor.nbytes

    def _write(self, tensor: Tensor, offset: int) -> None:
        content = tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().data
        while content:
            written = os.pwrite(self._file.fileno(), content, offset)
            content, offset = content[written:], offset + written
