"""Estimates the memory of each stage of a run from the shapes of the model and the tokens.

A worker's memory is that of its libraries plus what it will likely hold (`slimllm_ops.stream.footprint`). A solve's
memory is counted the same way.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from actors.batching import BATCH_TOKENS, SEQUENCES_AT_ONCE, blocks_at_once
from orchestrator.preflight.estimate import Stage
from orchestrator.preflight.workload import Text, Workload
from slimllm_ops.stream.footprint import Footprint, layerwise_bytes, moment_bytes, solve_bytes
from slimllm_ops.stream.passes import LOGIT_TOKENS
from slimllm_ops.stream.sensitivity import sensitivity_blocks
from slimllm_ops.stream.weights import compute_dtype

# Host memory of a worker's libraries, measured on a worker with a tiny model (benchmarks/memory.py).
LIBRARIES = 344_000_000
# The same of a solve's process, which imports torch but not transformers.
SOLVE_LIBRARIES = 195_000_000
# Memory of the libraries that the driver loads later: MLflow's uploads, matplotlib (benchmarks/results/memory.md).
LATER_LIBRARIES = 200_000_000
# Copies of the head's logits in memory: the logits, and the log-softmax that cross-entropy makes of them.
LOGIT_COPIES = 2
# The same where tokens are sampled and the loss goes back: probabilities, their sums, and the logits' gradients too.
LOSS_COPIES = 6
# A pass of a few blocks reads every layer twice: forward, then backward.
SENSITIVITY_PASSES = 2


@dataclass(frozen=True, kw_only=True)
class Passes:
    """The passes of a method over the calibration data.

    Attributes:
        stages: The stages that pass the data and decide.
        sums: For each pass that observes activations, the bytes of one layer's sums.
        forward: Number of other passes.
        kept: Bytes of moments that stay on disk while the run goes on.
    """

    stages: Sequence[Stage]
    sums: Sequence[int]
    forward: int
    kept: int


def layerwise_passes(work: Workload) -> Passes:
    """Return the passes of the paper's method: one that measures similarities, then one for each target."""
    passing, deciding = (read(work.source, work.device) for read in (Footprint.of, Footprint.of_layerwise))
    stages = (_stage(work, "layer similarities", passing.passing()), _stage(work, "pruning", deciding))
    sums = [layerwise_bytes(work.source, work.device)] * len(work.config.targets)
    return Passes(stages=stages, sums=sums, forward=1, kept=0)


def one_pass_passes(work: Workload) -> Passes:
    """Return the passes of a one-pass method: one, or none if moments are given."""
    calibrating = work.config.moments is None
    return Passes(
        stages=tuple(_one_pass_stages(work)),
        sums=[moment_bytes(work.source, work.device)] * calibrating,
        forward=SENSITIVITY_PASSES if calibrating else 0,
        kept=work.kept_moments if calibrating else 0,
    )


def _one_pass_stages(work: Workload) -> Iterator[Stage]:
    """Yield the calibration pass unless moments are given, the decisions, and the refining pass if asked for."""
    if work.config.moments is None:
        yield sensitivity_stage(work)
        yield calibration_stage(work)
    yield deciding_stage(work)
    if work.config.refine:
        yield refining_stage(work)


def generating_stages(work: Workload) -> Iterator[Stage]:
    """Yield the stage in which the model samples sequences, if a run asks for any."""
    if work.sampled is None:
        return
    whole, by_layer = (Footprint.of_generation(work.source, work.device, keep_layers=keep) for keep in (True, False))
    at_once = min(SEQUENCES_AT_ONCE, work.sampled.num_blocks) * work.sampled.length
    yield Stage(
        name="generating",
        worker=_library_memory(work, LIBRARIES) + whole.likely_peak(0, at_once),
        required=by_layer.fixed + by_layer.activations_per_token * work.sampled.length,
        driver=work.driver,
    )


def deciding_stage(work: Workload) -> Stage:
    """Return the stage that decides from moments."""
    return Stage(name="deciding", solve=_solve_memory(work), driver=_driver_memory(work))


def refining_stage(work: Workload) -> Stage:
    """Return the stage that passes dense and pruned models side by side, and refits what is left."""
    return _stage(work, "refining", Footprint.of_refinement(work.source, work.source, work.device))


def sensitivity_stage(work: Workload) -> Stage:
    """Return the pass of a few blocks, forward and backward, whose states are in files."""
    return _stage(
        work,
        "sensitivities",
        Footprint.of_sensitivity(work.source, work.device),
        text=sensitivity_text(work),
        outside=_head_bytes(work, LOSS_COPIES),
    )


def sensitivity_text(work: Workload) -> Text:
    """Return the start of the calibration text that sensitivities are measured on."""
    num_blocks, length = work.calibration.num_blocks, work.calibration.length
    return Text(min(num_blocks, sensitivity_blocks(length)), length)


def calibration_stage(work: Workload) -> Stage:
    """Return the pass that observes the dense model while modules are solved."""
    measures = work.config.drop_layers
    footprint = Footprint.of(work.source, work.device, measures_change=measures)
    return _stage(work, "calibrating", footprint, solve=_solve_memory(work))


def final_stages(work: Workload) -> Iterator[Stage]:
    """Yield the stages after the models are written: each is read back, and measured against the dense one."""
    yield Stage(name="read back", driver=_driver_memory(work))
    for name in ("perplexity, dense", "perplexity, pruned"):
        if work.held_out:
            measured = [_perplexity_stage(work, name, text) for text in work.held_out]
            largest = max(measured, key=lambda stage: stage.worker)
            yield Stage(name=name, worker=largest.worker, required=largest.required, driver=work.driver)


def _perplexity_stage(work: Workload, name: str, text: Text) -> Stage:
    """Return the stage that passes a held-out text and computes its logits."""
    footprint = Footprint.of(work.source, work.device).passing()
    return _stage(work, name, footprint, text=text, outside=_head_bytes(work, LOGIT_COPIES))


def _head_bytes(work: Workload, copies: int) -> int:
    """Return the bytes of the head, with that many copies of the logits that it computes at once."""
    vocabulary, hidden = work.source.config.vocab_size, work.source.config.hidden_size
    head = compute_dtype(work.device).itemsize * vocabulary * hidden
    return head + max(work.embedding_bytes, copies * torch.float32.itemsize * LOGIT_TOKENS * vocabulary)


def _stage(
    work: Workload,
    name: str,
    footprint: Footprint,
    *,
    text: Text | None = None,
    outside: int = 0,
    solve: int = 0,
) -> Stage:
    """Return a stage in which workers pass a text, by default the calibration text, through the layers.

    Args:
        work: The run.
        name: The stage's name.
        footprint: The memory that the stream takes.
        text: The text.
        outside: Bytes taken outside the layers, when no layer is loaded.
        solve: Bytes of a solve that runs at the same time.
    """
    text = text or work.calibration
    at_once = blocks_at_once(text.num_blocks, text.length, BATCH_TOKENS) * text.length
    held = 0 if work.config.offload else tokens_per_worker(work, text)
    # The table of embeddings is loaded when a stream is opened, before its first layer.
    outside = max(outside, work.embedding_bytes) + footprint.states_per_token * held
    likely = max(footprint.likely_peak(held, at_once), outside)
    return Stage(
        name=name,
        worker=_library_memory(work, LIBRARIES) + likely,
        required=footprint.fixed + footprint.states_per_token * held + footprint.activations_per_token * text.length,
        solve=solve,
        driver=_driver_memory(work),
    )


def tokens_per_worker(work: Workload, text: Text) -> int:
    """Return the most tokens of a text that one worker gets."""
    return -(-text.num_blocks // work.workers.num_workers) * text.length


def _library_memory(work: Workload, on_cpu: int) -> int:
    # The GPU memory that CUDA takes for each process is not known beforehand, and not counted.
    return on_cpu if work.device.type == "cpu" else 0


def _solve_memory(work: Workload) -> int:
    return _library_memory(work, SOLVE_LIBRARIES) + solve_bytes(work.source, work.device)


def _driver_memory(work: Workload) -> int:
    """Return the driver's bytes while it writes layers and passes a few tokens through them, always on the CPU."""
    footprint = Footprint.of(work.source, torch.device("cpu"))
    return work.driver + LATER_LIBRARIES + max(footprint.layers + 2 * footprint.stored_layer, work.embedding_bytes)
