"""Windows: every next token counts once, in the window that shows most of the text before it."""

import numpy as np
import pytest

from orchestrator.evaluation.windows import cut_windows
from slimllm_ops.stream.padding import PADDING


@pytest.mark.parametrize("stride", [1, 3, 4, 8])
def test_with_a_stride_every_next_token_counts_once(stride: int) -> None:
    text = np.arange(48, dtype=np.int32)
    windows = cut_windows(text.reshape(6, 8), stride)
    counted = windows.ids_WT[:, 1:][windows.counted_WT].tolist()
    if stride == 8:
        # Windows that do not overlap never predict their first token.
        assert counted == [one for one in range(48) if one % 8]
        return
    last = 8 + (48 - 8) // stride * stride
    assert counted == list(range(1, last))
    seen = [int(place[0]) for place in np.argwhere(windows.counted_WT)]
    assert all(windows.ids_WT[window, 0] == window * stride for window in seen)


def test_padding_never_counts() -> None:
    ids_BT = np.array([[1, 2, 3, PADDING], [4, 5, 6, 7]], dtype=np.int32)
    windows = cut_windows(ids_BT, None)
    assert windows.counted_WT.tolist() == [[True, True, False], [True, True, True]]
    assert windows.num_counted == 5
