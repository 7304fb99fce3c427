"""Reads a model's layers in order, each in the background while the one before it computes."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from slimllm_ops.checkpoint.reading import Checkpoint

Tensors = dict[str, Tensor]


class LayerReader:
    """A reader of layers by number that reads one layer ahead, so at most two are in memory.

    Args:
        checkpoint: The model to read.
        place: Function that moves a tensor to the device and dtype to compute in.
    """

    def __init__(self, checkpoint: Checkpoint, place: Callable[[Tensor], Tensor]) -> None:
        self._checkpoint = checkpoint
        self._place = place
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="layer-reader")
        self._ahead: tuple[int, Future[Tensors]] | None = None

    def read(self, layer: int) -> Tensors:
        """Return a layer's tensors by their names in it, and start reading the next layer."""
        if self._ahead is not None and self._ahead[0] == layer:
            tensors = self._ahead[1].result()
        else:
            self._forget()
            tensors = self._read(layer)
        self._ahead = None
        if layer + 1 < self._checkpoint.num_layers:
            self._ahead = (layer + 1, self._executor.submit(self._read, layer + 1))
        return tensors

    def close(self) -> None:
        """Discard the layer that was read ahead, and end the reader thread."""
        self._forget()
        self._executor.shutdown(wait=False)

    def _forget(self) -> None:
        if self._ahead is not None:
            self._ahead[1].cancel()
        self._ahead = None

    def _read(self, layer: int) -> Tensors:
        stored = self._checkpoint.read_layer(layer)
        # Move tensors one by one, so that the layer is never in memory twice.
        return {name: self._place(stored.pop(name)) for name in list(stored)}
