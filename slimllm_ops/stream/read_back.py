"""Reads a written checkpoint back, and checks that it computes what the run computed.

The embeddings, the final norm and the head must be those of the source, bit by bit.

Each written layer gets the hidden states that entered that layer in the run, and its output is compared with the
states that left it in the run. So errors do not add up over layers: only the rounding of one layer is allowed.

Shapes: T tokens, D hidden size.
"""

from collections.abc import Sequence

import numpy as np
import torch

from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.errors import ReadBackError
from slimllm_ops.stream.passes import LayerStream

# A layer may be off by this many roundings of the coarser dtype, stored or computed in, and by a sum in float32.
ROUNDINGS = 4
SUMMATION = 1e-4


def read_back(
    checkpoint: Checkpoint, ids_T: np.ndarray, states_TD: Sequence[np.ndarray], computed_in: torch.dtype
) -> float:
    """Compare every written layer with the states of the run; return the largest relative error.

    Args:
        checkpoint: The written checkpoint.
        ids_T: The ids of the tokens that the states belong to.
        states_TD: The hidden states before the first layer and after each layer.
        computed_in: The dtype that the run computed in.

    Raises:
        ReadBackError: The embedding or a layer differs by more than rounding.
    """
    tolerance = ROUNDINGS * max(torch.finfo(checkpoint.dtype).eps, torch.finfo(computed_in).eps) + SUMMATION
    ids = torch.from_numpy(ids_T.astype(np.int64))[None]
    stream = LayerStream(checkpoint, [ids], torch.device("cpu"))
    expected = [torch.from_numpy(state_TD.copy())[None] for state_TD in states_TD]
    # A state is rounded after each branch, so a small addition to a large state is known less precisely.
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


def require_outside_unchanged(source: Checkpoint, written: Checkpoint) -> None:
    """Check that all tensors outside the layers are the source's.

    Raises:
        ReadBackError: One is missing or differs, or one model ties its head and the other does not.
    """
    if written.config.tie_word_embeddings != source.config.tie_word_embeddings:
        raise ReadBackError(f"{written.directory} ties its head to the embeddings, or not, unlike {source.directory}")
    for module in sorted({*source.outside(), *written.outside()}):
        expected, found = source.read_module(module), written.read_module(module)
        if expected.keys() != found.keys() or any(not torch.equal(expected[name], found[name]) for name in expected):
            raise ReadBackError(
                f"{module} as written differs from that of {source.directory}: the disk is at fault, the source "
                f"changed while the run read it, or this is a bug worth reporting"
            )


def _require_close(
    found: torch.Tensor,
    expected: torch.Tensor,
    added: torch.Tensor,
    described: str,
    tolerance: float,
    rounding: float,
) -> float:
    """Check that rounding explains the error; return it relative to what was added, or 0 if nothing was added."""
    error, scale = float((found - expected).norm()), float(added.norm())
    allowed = tolerance * scale + rounding * float(expected.norm())
    if not error <= allowed:
        raise ReadBackError(
            f"{described} as written differs by {error:.2g} from what the run computed, and rounding "
            f"explains only {allowed:.2g}: the disk is at fault, or this is a bug worth reporting"
        )
    return error / scale if scale else 0.0
