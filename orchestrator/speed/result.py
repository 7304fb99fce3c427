"""Computes the figures of a bench: rates, latencies, memory, and ratios to the first model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from orchestrator.speed.config import Shape
from orchestrator.speed.inputs import BenchModel
from orchestrator.speed.worker import Measured
from slimllm_ops.timing.generation import Generation

# What a round measured, by the model's position and the shape.
Round = Mapping[tuple[int, Shape], Measured]


@dataclass(frozen=True)
class Spread:
    """The median, least and greatest of the values of all rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of values."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model at one batch size and prompt length; rates and seconds are medians over the rounds.

    Attributes:
        model: The model's name.
        batch_size: Sequences at once.
        prompt_length: Tokens of each prompt.
        prefill_tokens_per_second: Tokens of prompts per second.
        decode_tokens_per_second: Tokens per second after the first, over all sequences.
        first_token_seconds: From the prompts to the first token of every sequence.
        token_p50, token_p90, token_p99: Percentiles of the seconds of a later token, over all rounds; None if the
            engine does not tell single tokens.
        peak_memory: Peak bytes of the process.
        peak_gpu_memory: Peak bytes of its tensors on the GPU; None without one.
        macs: Multiply-accumulates of a prompt's token; None if they cannot be counted.
        prefill_ratio, prefill_low, prefill_high: How many times faster than the first model a prompt passes, in rounds.
        decode_ratio, decode_low, decode_high: The same for later tokens.
        promised: How many times fewer multiply-accumulates than the first model; None if they cannot be counted.
        share: The prefill ratio as a share of the promised one; None for the first model.
    """

    model: str
    batch_size: int
    prompt_length: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    first_token_seconds: float
    token_p50: float | None
    token_p90: float | None
    token_p99: float | None
    peak_memory: int
    peak_gpu_memory: int | None
    macs: float | None
    prefill_ratio: float
    prefill_low: float
    prefill_high: float
    decode_ratio: float
    decode_low: float
    decode_high: float
    promised: float | None
    share: float | None


def rows_of(models: Sequence[BenchModel], shapes: Sequence[Shape], rounds: Sequence[Round]) -> tuple[Row, ...]:
    """Return a row for each shape and model."""
    return tuple(_row(models, number, shape, rounds) for shape in shapes for number in range(len(models)))


def _row(models: Sequence[BenchModel], number: int, shape: Shape, rounds: Sequence[Round]) -> Row:
    measured = [one[number, shape] for one in rounds]
    mine, first = ([one[place, shape].generation for one in rounds] for place in (number, 0))
    prefill = Spread.of([b.first_seconds / a.first_seconds for a, b in zip(mine, first, strict=True)])
    decode = Spread.of([b.later_seconds / a.later_seconds for a, b in zip(mine, first, strict=True)])
    first_seconds, later_seconds = (median(times) for times in zip(*map(_times, mine), strict=True))
    p50, p90, p99 = percentiles([seconds for one in mine for seconds in one.token_seconds])
    macs, reference = (_macs(models[place], shape.length) for place in (number, 0))
    promised = reference / macs if reference and macs else None
    gpu = [one.peak.gpu for one in measured if one.peak.gpu is not None]
    return Row(
        model=models[number].name,
        batch_size=shape.batch_size,
        prompt_length=shape.length,
        prefill_tokens_per_second=shape.batch_size * shape.length / first_seconds,
        decode_tokens_per_second=shape.batch_size * (len(mine[0].tokens[0]) - 1) / later_seconds,
        first_token_seconds=first_seconds,
        token_p50=p50,
        token_p90=p90,
        token_p99=p99,
        peak_memory=max(one.peak.process for one in measured),
        peak_gpu_memory=max(gpu, default=None),
        macs=macs,
        prefill_ratio=prefill.median,
        prefill_low=prefill.low,
        prefill_high=prefill.high,
        decode_ratio=decode.median,
        decode_low=decode.low,
        decode_high=decode.high,
        promised=promised,
        share=prefill.median / promised if promised and number else None,
    )


def percentiles(seconds: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Return the 50th, 90th and 99th percentile; None without values."""
    if not seconds:
        return None, None, None
    p50, p90, p99 = (float(value) for value in np.percentile(seconds, [50, 90, 99]))
    return p50, p90, p99


def _times(generation: Generation) -> tuple[float, float]:
    return generation.first_seconds, generation.later_seconds


def _macs(model: BenchModel, length: int) -> float | None:
    return None if model.macs is None else model.macs.of_prompt(length) / length
