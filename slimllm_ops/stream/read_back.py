"""Reading back what was written: does the checkpoint compute what the run computed?

Each written layer is given the hidden states that entered that layer in the run, and its output is compared with
the states that left it. Errors do not add up over layers, so one layer's rounding is all that may be seen.

Shapes: T tokens, D hidden size.
"""

from collections.abc import Sequence

import numpy as np
import torch

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.errors import ReadBackError
from slimllm_ops.stream.passes import LayerStream

# A layer is right if its error is below so many roundings of the stored dtype, and of a sum in float32.
ROUNDINGS = 4
SUMMATION = 1e-4


def read_back(
    checkpoint: Checkpoint, ids_T: np.ndarray, states_TD: Sequence[np.ndarray], computed_in: torch.dtype
) -> float:
    """Compare every written layer with the states seen in the run; return the largest relative error.

    Args:
        checkpoint: what was written.
        ids_T: the tokens that the states belong to.
        states_TD: hidden states before the first layer and after each.
        computed_in: the dtype that the run computed in.

    Raises:
        ReadBackError: a layer differs by more than rounding.
    """
    tolerance = ROUNDINGS * max(torch.finfo(checkpoint.dtype).eps, torch.finfo(computed_in).eps) + SUMMATION
    ids = torch.from_numpy(ids_T.astype(np.int64))[None]
    stream = LayerStream(checkpoint, [ids], torch.device("cpu"))
    expected = [torch.from_numpy(state_TD.copy())[None] for state_TD in states_TD]
    # A state is rounded after each branch: beside a large state, a small addition is seen less sharply.
    rounding = torch.finfo(computed_in).eps
    worst = _require_close(stream.hidden[0], expected[0], expected[0], "the embedding", tolerance, rounding)
    for layer in range(checkpoint.num_layers):
        stream.hidden = [expected[layer]]
        stream.forward(layer)
        added = expected[layer + 1] - expected[layer]
        error = _require_close(stream.hidden[0], expected[layer + 1], added, f"layer {layer}", tolerance, rounding)
        worst = max(worst, error)
    stream.close()
    return worst


def _require_close(
    found: torch.Tensor,
    expected: torch.Tensor,
    added: torch.Tensor,
    described: str,
    tolerance: float,
    rounding: float,
) -> float:
    """Return the error relative to what was added; it is 0 where nothing was added and nothing differs."""
    error, scale = float((found - expected).norm()), float(added.norm())
    allowed = tolerance * scale + rounding * float(expected.norm())
    if not error <= allowed:
        raise ReadBackError(
            f"{described} as written differs by {error:.2g} from what the run computed, where rounding "
            f"explains {allowed:.2g}: the disk is at fault, or this is a bug worth reporting"
        )
    return error / scale if scale else 0.0
