"""A model's layers one after the other, each read while the one before it is at work."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from slimllm_ops.checkpoint.reading import Checkpoint

Tensors = dict[str, Tensor]


class LayerReader:
    """Reads layers by number and keeps one ahead: two layers are the most that is in memory.

    Args:
        checkpoint: what is read.
        place: brings a tensor to where it computes, in the precision that it computes in.
    """

    def __init__(self, checkpoint: Checkpoint, place: Callable[[Tensor], Tensor]) -> None:
        self._checkpoint = checkpoint
        self._place = place
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="layer-reader")
        self._ahead: tuple[int, Future[Tensors]] | None = None

    def read(self, layer: int) -> Tensors:
        """Return a layer's tensors by their names in it, and begin to read the next."""
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
        """Let go of what was read ahead, and end the thread that reads."""
        self._forget()
        self._executor.shutdown(wait=False)

    def _forget(self) -> None:
        if self._ahead is not None:
            self._ahead[1].cancel()
        self._ahead = None

    def _read(self, layer: int) -> Tensors:
        stored = self._checkpoint.read_layer(layer)
        # One by one, so that a layer is never held twice.
        return {name: self._place(stored.pop(name)) for name in list(stored)}
