"""Cuts text into windows, and says which of their next tokens count.

Shapes: W windows of T tokens.
"""

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from slimllm_ops.stream.padding import PADDING


@dataclass(frozen=True)
class Windows:
    """Windows of a text.

    Attributes:
        ids_WT: Token ids, int32; padding stands at the end of a window.
        counted_WT: Which next tokens count (W, T - 1), bool.
    """

    ids_WT: np.ndarray
    counted_WT: np.ndarray

    @property
    def num_counted(self) -> int:
        """The number of next tokens that count."""
        return int(self.counted_WT.sum())


def cut_windows(ids_BT: np.ndarray, stride: int | None) -> Windows:
    """Return blocks (B, T) as windows; with a stride, windows that overlap over the same running text.

    Without a stride, all next tokens in a window count. With one, each next token of the text counts once, in the
    window that shows most of the text before it.
    """
    if stride is None or stride == ids_BT.shape[1]:
        return Windows(ids_BT, ids_BT[:, 1:] != PADDING)
    windows_WT = np.ascontiguousarray(sliding_window_view(ids_BT.reshape(-1), ids_BT.shape[1])[::stride])
    counted_WT = np.zeros((len(windows_WT), ids_BT.shape[1] - 1), dtype=bool)
    counted_WT[:, -stride:] = True
    counted_WT[0] = True
    return Windows(windows_WT, counted_WT)
