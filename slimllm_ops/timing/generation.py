"""Times the generation of tokens: the prompt's pass with the first token, and each later token."""

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# Passes tokens (B, T) and a cache through a model; returns the logits of the last position (B, V) and the cache.
Pass = Callable[[Tensor, Any], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Generation:
    """The times of a generation.

    Attributes:
        first_seconds: From the prompt to the first token of every sequence.
        later_seconds: The same for all later tokens.
        token_seconds: The time of each later token, for all sequences at once; empty if the engine does not tell.
        tokens: The tokens of each sequence.
    """

    first_seconds: float
    later_seconds: float
    token_seconds: tuple[float, ...]
    tokens: tuple[tuple[int, ...], ...]


def random_prompts(vocab_size: int, batch_size: int, length: int, seed: int) -> Tensor:
    """Return random token ids (B, T) on the CPU; the same seed gives the same ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (batch_size, length), generator=generator)


def generate(forward: Pass, ids_BT: Tensor, new_tokens: int, cache: Any = None) -> Generation:
    """Generate the likeliest tokens with a cache, and time each step; no token ends a sequence.

    Args:
        forward: Passes tokens through the model.
        ids_BT: The prompts, on the model's device.
        new_tokens: How many tokens to generate.
        cache: The empty cache to fill; None if the model makes its own.
    """
    _wait_for(ids_BT.device)
    times, chosen = [time.perf_counter()], []
    ids = ids_BT
    for _ in range(new_tokens):
        logits_BV, cache = forward(ids, cache)
        ids = logits_BV.argmax(dim=-1, keepdim=True)
        _wait_for(ids.device)
        times.append(time.perf_counter())
        chosen.append(ids)
    steps = tuple(after - before for before, after in pairwise(times))
    tokens = tuple(map(tuple, torch.cat(chosen, dim=1).tolist()))
    return Generation(steps[0], times[-1] - times[1], steps[1:], tokens)


def pass_of(model: Any) -> Pass:
    """Return the pass of a model, which computes the logits of the last position only where the model can."""
    asked = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}

    def forward(ids_BT: Tensor, cache: Any) -> tuple[Tensor, Any]:
        output = model(input_ids=ids_BT, past_key_values=cache, use_cache=True, **asked)
        return output.logits[:, -1], output.past_key_values

    return forward


def _wait_for(device: torch.device) -> None:
    """Wait until the device has computed everything; a GPU computes while Python goes on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
