"""Runs one model in a process of its own (process.py starts it).

The process gets functions with arguments by a pipe, and sends back what they return. The first opens the engine, and
the others get it. The process ends with the pipe.
"""

import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from slimllm_ops.timing.engines import Engine, TransformersEngine
from slimllm_ops.timing.generation import Generation
from slimllm_ops.timing.memory import PeakMemory, read_peak, reset_peak
from slimllm_ops.timing.widths import time_widths

# What passes at once when widths are timed: a prompt of this many tokens.
WIDTH_TOKENS = 512


@dataclass(frozen=True)
class Measured:
    """One generation, and the peak memory while it ran."""

    generation: Generation
    peak: PeakMemory


@dataclass(frozen=True)
class Failed:
    """Says in one line why a function raised an error."""

    reason: str


def measure(engine: Engine, batch_size: int, length: int, new_tokens: int, seed: int) -> Measured:
    """Generate once, and measure time and memory."""
    reset_peak()
    generation = engine.generate(batch_size, length, new_tokens, seed)
    return Measured(generation, read_peak())


def profile(engine: Engine, batch_size: int, length: int, seed: int) -> dict[str, float]:
    """Return the seconds of the operators of a prompt's pass, by kind."""
    return engine.profile(batch_size, length, seed)


def time_products(engine: Engine, widths: tuple[int, ...], hidden_size: int) -> dict[int, float]:
    """Return the seconds of a multiply-accumulate for each width, in the engine's dtype."""
    assert isinstance(engine, TransformersEngine), "widths are timed in torch only"
    return time_widths(widths, hidden_size, WIDTH_TOKENS, engine.dtype)


def describe(engine: Engine) -> str:
    """Return what an engine computes on."""
    return engine.described


def serve(descriptor: int) -> None:
    """Open an engine, and call functions with it, until the pipe with this file descriptor ends."""
    with Connection(descriptor) as pipe, suppress(EOFError):
        open_engine, *arguments = pipe.recv()
        engine = _answer(pipe, open_engine, *arguments, tells=False)
        while True:
            function, *arguments = pipe.recv()
            _answer(pipe, function, engine, *arguments)


def _answer(pipe: Connection, function: Callable[..., Any], *arguments: Any, tells: bool = True) -> Any:
    """Call a function, send its result or why it failed, and return the result; `tells` says whether to send it."""
    try:
        result = function(*arguments)
    except Exception as error:
        # `--verbose` shows it.
        traceback.print_exc()
        reason = next(iter(str(error).strip().splitlines()), "")[:300]
        pipe.send(Failed(reason if isinstance(error, ValueError) else f"{type(error).__name__}: {reason}"))
        return None
    pipe.send(result if tells else None)
    return result
