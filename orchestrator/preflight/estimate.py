"""What a run will need, told from shapes before anything is computed: memory and seconds by stage, disk, and travel.

A worker's memory is that of its libraries plus what it will likely hold (`slimllm_ops.stream.footprint`). A solve's is
counted the same way. Seconds are operations divided by a measured rate (`slimllm_ops.stream.operations`). They
leave out the network and other work on the machine.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import psutil
import torch

from actors.batching import BATCH_TOKENS, blocks_at_once
from actors.pool import IN_FLIGHT
from cluster import WorkerPlan
from orchestrator.config import PruneConfig
from orchestrator.inputs import Inputs
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.stream.footprint import Footprint, moment_bytes, solve_bytes
from slimllm_ops.stream.operations import OBSERVING_SHARE, SOLVING_SHARE, LayerOperations, Rates
from slimllm_ops.stream.passes import LOGIT_TOKENS
from slimllm_ops.stream.weights import compute_dtype

# The host's memory that a worker's libraries take: a worker on a model of next to nothing (benchmarks/memory.py).
LIBRARIES = 344_000_000
# What a driver loads only as it goes on: MLflow's uploads, matplotlib (benchmarks/results/memory.md).
LATER_LIBRARIES = 200_000_000
# Workers import torch and transformers before they answer.
STARTING_SECONDS = 5.0
# Weights come from and go to disks at some such rate: assumed, for nobody waits for a file to be read to know it.
BYTES_PER_SECOND = 1e9
# Of a head's logits: as they are computed, and what their logarithms are taken from.
LOGIT_COPIES = 2


@dataclass(frozen=True)
class Text:
    """Token blocks, without the tokens."""

    num_blocks: int
    length: int

    @property
    def num_tokens(self) -> int:
        """Tokens in all."""
        return self.num_blocks * self.length


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a run is made of.

    Attributes:
        config: what is asked.
        source: the model.
        calibration: the blocks that pass it, or those that kept moments are of.
        held_out: what perplexity is measured on.
        workers: who does it.
        rates: what a worker was seen to reach; None where that is not known.
        driver: bytes that the driver takes already.
    """

    config: PruneConfig
    source: Checkpoint
    calibration: Text
    held_out: tuple[Text, ...]
    workers: WorkerPlan
    rates: Rates | None
    driver: int

    @classmethod
    def of(cls, config: PruneConfig, inputs: Inputs, workers: WorkerPlan, rates: Rates | None) -> "Workload":
        """Describe a run whose inputs are at hand."""
        calibration = Text(inputs.calibration.num_blocks, inputs.calibration.block_length)
        held_out = tuple(Text(*blocks.input_ids_BT.shape) for blocks in inputs.held_out)
        return cls.described(config, inputs.source, calibration, held_out, workers, rates)

    @classmethod
    def described(
        cls,
        config: PruneConfig,
        source: Checkpoint,
        calibration: Text,
        held_out: tuple[Text, ...],
        workers: WorkerPlan,
        rates: Rates | None,
    ) -> "Workload":
        """Describe a run from this process, which will drive it."""
        return cls(
            config=config,
            source=source,
            calibration=calibration,
            held_out=held_out,
            workers=workers,
            rates=rates,
            driver=psutil.Process().memory_full_info().uss,
        )

    @property
    def device(self) -> torch.device:
        """Where workers compute."""
        return torch.device("cuda" if self.workers.gpus_per_worker else "cpu")

    @cached_property
    def layers(self) -> list[LayerOperations]:
        """The operations of every layer, for blocks of the calibration's length."""
        return [
            LayerOperations.of(self.source, layer, self.calibration.length) for layer in range(self.source.num_layers)
        ]

    @cached_property
    def stored_bytes(self) -> int:
        """The model as it is stored."""
        return self.source.num_bytes()

    @cached_property
    def embedding_bytes(self) -> int:
        """A table of the vocabulary as stored: of the embeddings, or of the head."""
        parameters = self.source.num_parameters(list(self.source.files))
        return self.source.config.vocab_size * self.source.config.hidden_size * self.stored_bytes // parameters


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage of a run will likely take; its name is that by which the run reports its seconds.

    Attributes:
        name: the stage.
        worker: bytes of a worker at its peak, its libraries included; on a GPU, those of the GPU; 0 where none works.
        required: bytes without which a worker refuses the stage, above its libraries.
        solve: bytes of a task that solves, its libraries included; 0 where there is none.
        driver: bytes of the driver.
        seconds: in all; None where no rate is known.
    """

    name: str
    worker: int = 0
    required: int = 0
    solve: int = 0
    driver: int = 0
    seconds: float | None = None

    def describe(self) -> str:
        """Return it in a line."""
        sizes = {"worker": self.worker, "solve": self.solve, "driver": self.driver}
        parts = [f"{name} {readable(size)}" for name, size in sizes.items() if size]
        return f"{self.name}: " + ", ".join(parts + ([] if self.seconds is None else [f"{self.seconds:.1f} s"]))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will likely take.

    Attributes:
        stages: in the order in which they come.
        num_workers: how many workers there are.
        device: where they compute, "cpu" or "cuda".
        shared: bytes of moments on their way, in Ray's object store, of all nodes together.
        output: bytes of the result on the disk.
        beside: bytes beside it as long as the run goes on.
        tracked: bytes that MLflow is given.
        spilled: bytes that each worker holds in files.
        weights: bytes of weights that are sent to each node but the driver's.
        moments: bytes of moments that travel between workers.
        tokens: bytes of tokens that are sent to workers.
    """

    stages: tuple[Stage, ...]
    num_workers: int
    device: str
    shared: int
    output: int
    beside: int
    tracked: int
    spilled: int
    weights: int
    moments: int
    tokens: int

    @property
    def worker(self) -> int:
        """Bytes of a worker at its peak."""
        return max(stage.worker for stage in self.stages)

    @property
    def required(self) -> int:
        """Bytes above its libraries without which a worker refuses to begin."""
        return max(stage.required for stage in self.stages)

    @property
    def solve(self) -> int:
        """Bytes of a solve at its peak."""
        return max(stage.solve for stage in self.stages)

    @property
    def driver(self) -> int:
        """Bytes of the driver at its peak."""
        return max(stage.driver for stage in self.stages)

    @property
    def further_driver(self) -> int:
        """Bytes of the driver above those that it takes before it begins."""
        return self.driver - self.stages[0].driver

    @property
    def seconds(self) -> float | None:
        """Seconds in all, if they can be told."""
        seconds = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(seconds) if seconds else None

    def lines(self) -> list[str]:
        """Return it in a few lines."""
        solves = f", solves of {readable(self.solve)}" if self.solve else ""
        where = "of its GPU" if self.device == "cuda" else "of memory"
        memory = (
            f"{self.num_workers} worker(s) with {readable(self.worker)} {where}{solves}, driver {readable(self.driver)}"
        )
        beside = f", and {readable(self.beside)} while it runs" if self.beside else ""
        lines = [f"{memory}; {readable(self.output)} on the disk{beside}"]
        if self.seconds is not None:
            parts = [f"{stage.name} {stage.seconds:.0f}" for stage in self.stages if (stage.seconds or 0) >= 1]
            lines.append(f"very roughly {self.seconds:.0f} s: {', '.join(parts)}")
        return lines

    def described(self) -> dict[str, Any]:
        """Return all of it, as JSON has it."""
        totals = {name: getattr(self, name) for name in ("worker", "solve", "driver", "seconds")}
        return asdict(self) | totals


def estimate_pruning(work: Workload) -> Estimate:
    """Return what `prune` will take."""
    config, targets = work.config, len(work.config.targets)
    passes = _PRUNING[config.method](work)
    observing = {"slimllm": targets, "gram": config.moments is None}[config.method] + 2 * targets * config.refine
    return _estimate(
        work,
        [*passes, *_finishing(work)],
        observing=observing,
        passing=observing + (config.method == "slimllm") + len(work.held_out) * (1 + targets),
        output=_output_bytes(work),
        tracked=_output_bytes(work),
        beside=config.refine * _output_bytes(work)
        + (_kept_moments(work) if config.method == "gram" and config.moments is None else 0),
    )


def estimate_calibration(work: Workload) -> Estimate:
    """Return what `calibrate` will take."""
    output = _kept_moments(work)
    return _estimate(work, [_calibrating(work)], observing=1, passing=1, output=output, beside=0, tracked=0)


def _estimate(
    work: Workload, stages: Sequence[Stage], *, observing: int, passing: int, output: int, beside: int, tracked: int
) -> Estimate:
    """Gather an estimate; the numbers are of passes that observe moments, and of all passes."""
    workers, moments = work.workers, moment_bytes(work.source, work.device)
    start = [Stage(name="start", driver=work.driver, seconds=STARTING_SECONDS if work.rates else None)]
    return Estimate(
        stages=(*start, *stages),
        num_workers=workers.num_workers,
        device=work.device.type,
        shared=moments * (workers.num_workers + IN_FLIGHT) if observing else 0,
        output=output,
        beside=beside,
        tracked=tracked,
        spilled=_spilled(work) if observing else 0,
        weights=passing * work.stored_bytes if workers.weights_travel else 0,
        moments=observing * (workers.num_workers - 1) * moments * work.source.num_layers,
        tokens=4 * observing * work.calibration.num_tokens,
    )


def _layerwise(work: Workload) -> Iterator[Stage]:
    """Yield the stages of the paper's method: a pass that measures similarities, then one for each target."""
    targets, tokens = len(work.config.targets), work.calibration.num_tokens
    passing, deciding = (Footprint.of(work.source, work.device, deciding=one) for one in (False, True))
    forward = _seconds(work, tokens, sum(layer.forward for layer in work.layers))
    yield _stage(work, "layer similarities", passing.passing(), forward)
    observing = _seconds(
        work,
        tokens,
        sum(layer.forward + layer.moments for layer in work.layers),
        # Where the moments were merged: one worker decides, and the others wait.
        solves=work.workers.num_workers * sum(layer.decision for layer in work.layers),
    )
    yield _stage(work, "pruning", deciding, _times(targets, observing))


def _one_pass(work: Workload) -> Iterator[Stage]:
    """Yield the stages of `gram`: a pass if there are no moments, decisions, and another pass to refine."""
    config, targets = work.config, len(work.config.targets)
    if config.moments is None:
        yield _calibrating(work)
    refits = _seconds(work, 0, 0, solves=targets * sum(layer.refit for layer in work.layers))
    yield Stage(name="deciding", solve=_solving(work), driver=_driving(work), seconds=refits)
    if config.refine:
        footprint = Footprint.of_refinement(work.source, work.source, work.device)
        both = sum(2 * layer.forward + 3 * layer.moments for layer in work.layers)
        solves = work.workers.num_workers * sum(3 * layer.refit for layer in work.layers)
        refining = _seconds(work, work.calibration.num_tokens, both, solves=solves)
        yield _stage(work, "refining", footprint, _times(targets, refining))


_PRUNING = {"slimllm": _layerwise, "gram": _one_pass}


def _calibrating(work: Workload) -> Stage:
    """Return the pass that observes the dense model while modules are solved."""
    measures = work.config.drop_layers
    footprint = Footprint.of(work.source, work.device, deciding=False, measures_change=measures)
    operations = sum(layer.forward + layer.moments for layer in work.layers)
    solves = sum(layer.elimination for layer in work.layers)
    seconds = _seconds(work, work.calibration.num_tokens, operations, solves=solves)
    return _stage(work, "calibrating", footprint, seconds, solve=_solving(work))


def _finishing(work: Workload) -> Iterator[Stage]:
    """Yield what follows when models are written: each is read back, and measured beside the dense one."""
    targets = len(work.config.targets)
    seconds = _seconds(work, 0, 0)
    yield Stage(name="read back", driver=_driving(work), seconds=_times(targets, seconds))
    for name, models in (("perplexity, dense", 1), ("perplexity, pruned", targets)):
        if work.held_out:
            measured = [_measuring(work, name, text) for text in work.held_out]
            largest = max(measured, key=lambda stage: stage.worker)
            seconds = None if work.rates is None else models * sum(stage.seconds or 0.0 for stage in measured)
            yield Stage(
                name=name, worker=largest.worker, required=largest.required, driver=work.driver, seconds=seconds
            )


def _measuring(work: Workload, name: str, text: Text) -> Stage:
    """Return a pass of held-out text with its logits."""
    vocabulary, hidden = work.source.config.vocab_size, work.source.config.hidden_size
    footprint = Footprint.of(work.source, work.device, deciding=False).passing()
    head = compute_dtype(work.device).itemsize * vocabulary * hidden
    logits = LOGIT_COPIES * torch.float32.itemsize * LOGIT_TOKENS * vocabulary
    operations = sum(layer.forward for layer in work.layers) + 2 * vocabulary * hidden
    seconds = _seconds(work, text.num_tokens, operations)
    return _stage(work, name, footprint, seconds, text=text, outside=head + max(work.embedding_bytes, logits))


def _stage(
    work: Workload,
    name: str,
    footprint: Footprint,
    seconds: float | None,
    *,
    text: Text | None = None,
    outside: int = 0,
    solve: int = 0,
) -> Stage:
    """Return a stage in which a text, by default the calibration's, passes the workers.

    Args:
        work: the run.
        name: the stage.
        footprint: what the stream takes.
        seconds: what the stage takes.
        text: what passes.
        outside: bytes that are taken outside the layers, when those are gone.
        solve: bytes of a solve beside it.
    """
    text = text or work.calibration
    at_once = blocks_at_once(text.num_blocks, text.length, BATCH_TOKENS) * text.length
    held = 0 if work.config.offload else _tokens_per_worker(work, text)
    # The table of embeddings is there when a stream is opened, before its first layer.
    outside = max(outside, work.embedding_bytes) + footprint.states_per_token * held
    likely = max(footprint.likely_peak(held, at_once), outside)
    return Stage(
        name=name,
        worker=_libraries(work) + likely,
        required=footprint.fixed + footprint.states_per_token * held + footprint.activations_per_token * text.length,
        solve=solve,
        driver=_driving(work),
        seconds=seconds,
    )


def _tokens_per_worker(work: Workload, text: Text) -> int:
    return -(-text.num_blocks // work.workers.num_workers) * text.length


def _spilled(work: Workload) -> int:
    """Return the bytes of the states that a worker holds in files, at most."""
    if not work.config.offload:
        return 0
    deciding = work.config.method == "slimllm"
    footprint = Footprint.of(work.source, work.device, deciding=deciding, measures_change=work.config.drop_layers)
    if work.config.refine:
        footprint = Footprint.of_refinement(work.source, work.source, work.device)
    return footprint.states_per_token * _tokens_per_worker(work, work.calibration)


def _libraries(work: Workload) -> int:
    # What CUDA takes of a GPU for each process is not known beforehand, and not counted.
    return LIBRARIES if work.device.type == "cpu" else 0


def _solving(work: Workload) -> int:
    return _libraries(work) + solve_bytes(work.source, work.device)


def _driving(work: Workload) -> int:
    """Return the driver's bytes while it writes layers and passes a few tokens through them: always on CPUs."""
    footprint = Footprint.of(work.source, torch.device("cpu"), deciding=False)
    return work.driver + LATER_LIBRARIES + max(footprint.layers + 2 * footprint.stored_layer, work.embedding_bytes)


def _output_bytes(work: Workload) -> int:
    """Return the bytes of all checkpoints; one of the paper's own ratio has the model's size at most."""
    names = [name for layer in range(work.source.num_layers) for name in work.source.layer_names(layer)]
    share = work.source.num_parameters(names) / work.source.num_parameters(list(work.source.files))
    return int(sum(work.stored_bytes * (1 - share * (sparsity or 0.0)) for sparsity in work.config.targets))


def _kept_moments(work: Workload) -> int:
    return work.source.num_layers * moment_bytes(work.source, work.device)


def _seconds(work: Workload, tokens: int, operations: float, *, solves: float = 0.0) -> float | None:
    """Return the seconds of a pass over the model: of tokens with so many operations each, and of solves.

    On one processor, solves beside a pass take from it what they gain; the weights are read while the pass computes.
    """
    if work.rates is None:
        return None
    workers = work.workers.num_workers
    computing = tokens * operations / (work.rates.products * OBSERVING_SHARE * workers)
    solving = solves / (work.rates.solves * SOLVING_SHARE * workers)
    return max(computing + solving, work.stored_bytes / BYTES_PER_SECOND)


def _times(number: int, seconds: float | None) -> float | None:
    return None if seconds is None else number * seconds


def readable(num_bytes: float) -> str:
    """Return bytes as people read them."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
