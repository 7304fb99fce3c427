"""Chooses what sequences begin with, which the model itself samples for calibration.

Shapes: N sequences, P tokens of a prompt, B blocks of T tokens.
"""

import numpy as np
from transformers import PretrainedConfig

from orchestrator.config import SELF
from orchestrator.data.blocks import DataError
from slimllm_ops.errors import InputError
from slimllm_ops.stream.padding import PADDING

# Tokens of a prompt that is taken from text: enough to say what the text is about.
PROMPT_TOKENS = 32


def sequences_asked(spec: str) -> int:
    """Return N of the data spec `self:N`; 0 for any other spec.

    Raises:
        DataError: N is not a number of sequences.
    """
    if not spec.startswith(SELF):
        return 0
    number = spec.removeprefix(SELF)
    if not (number.isascii() and number.isdigit() and int(number)):
        raise DataError(f"{spec} is to name how many sequences the model samples: pass {SELF}128, for example")
    return int(number)


def begin_prompts(config: PretrainedConfig, number: int) -> np.ndarray:
    """Return prompts (N, 1), int32, of the token that begins the model's texts: BOS, or EOS if there is no BOS.

    Raises:
        InputError: The model has neither.
    """
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(config, name, None)
        first = token[0] if isinstance(token, list) and token else token
        if isinstance(first, int) and 0 <= first < config.vocab_size:
            return np.full((number, 1), first, dtype=np.int32)
    raise InputError(
        "the model's config.json names neither bos_token_id nor eos_token_id, so no token begins a text: calibrate on "
        "text, and add sequences with --generate"
    )


def draw_prompts(ids_BT: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Return prompts (N, P), int32: tokens that follow each other in a block, drawn at random.

    Args:
        ids_BT: The blocks, int32; padding stands at their ends.
        number: How many prompts to draw.
        seed: The seed of the draw.

    Raises:
        DataError: Blocks are too short to begin with tokens of the text and go on.
    """
    lengths_B = (ids_BT != PADDING).sum(axis=1)
    size = min(PROMPT_TOKENS, int(lengths_B.max()), ids_BT.shape[1] - 1)
    if size < 1:
        raise DataError("blocks of one token leave the model nothing to sample: calibrate on longer blocks")
    places_B = np.maximum(lengths_B - size + 1, 0)
    drawn_N = np.random.default_rng(seed).integers(places_B.sum(), size=number)
    ends_B = places_B.cumsum()
    blocks_N = np.searchsorted(ends_B, drawn_N, side="right")
    starts_N = drawn_N - (ends_B - places_B)[blocks_N]
    return ids_BT[blocks_N[:, None], starts_N[:, None] + np.arange(size)].astype(np.int32)
