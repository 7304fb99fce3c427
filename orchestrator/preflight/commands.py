"""Estimates what each command will take, from its stages and what stays on the disk."""

from collections.abc import Sequence

from actors.pool import IN_FLIGHT
from orchestrator.preflight.estimate import Estimate, Stage
from orchestrator.preflight.stages import (
    SENSITIVITY_PASSES,
    calibration_stage,
    deciding_stage,
    final_stages,
    generating_stages,
    layerwise_passes,
    one_pass_passes,
    refining_stage,
    sensitivity_stage,
    sensitivity_text,
    tokens_per_worker,
)
from orchestrator.preflight.workload import Workload
from orchestrator.tracking import TrackingOptions
from slimllm_ops.stream.footprint import Footprint, moment_bytes
from slimllm_ops.stream.weights import compute_dtype


def estimate_pruning(work: Workload) -> Estimate:
    """Estimate what `prune` will take."""
    config, targets = work.config, len(work.config.targets)
    passes = one_pass_passes(work) if config.in_one_pass else layerwise_passes(work)
    sums = [*passes.sums, *[_moment_bytes(work)] * (2 * targets * config.refine)]
    return _estimate(
        work,
        [*generating_stages(work), *passes.stages, *final_stages(work)],
        sums=sums,
        passing=bool(work.sampled) + len(sums) + passes.forward + len(work.held_out) * (1 + targets),
        output=work.output_bytes,
        tracked=0 if TrackingOptions(tracking_uri=config.tracking_uri).journal_only else work.output_bytes,
        beside=config.refine * work.output_bytes + passes.kept,
    )


def estimate_calibration(work: Workload) -> Estimate:
    """Estimate what `calibrate` will take."""
    output = work.kept_moments
    stages = [*generating_stages(work), sensitivity_stage(work), calibration_stage(work)]
    passing = bool(work.sampled) + 1 + SENSITIVITY_PASSES
    return _estimate(work, stages, sums=[_moment_bytes(work)], passing=passing, output=output, beside=0, tracked=0)


def estimate_comparison(work: Workload, *, one_pass: int, refined: int, kept: bool) -> Estimate:
    """Estimate what `compare` will take: the paper's method, and others that share one calibration pass.

    Args:
        work: The comparison.
        one_pass: The number of methods that decide from the shared moments.
        refined: How many of these refine their models.
        kept: Whether every model is kept; otherwise, those of one method at a time are on the disk.
    """
    targets, models = len(work.config.targets), work.output_bytes
    layerwise = layerwise_passes(work)
    sampling = generating_stages(work)
    stages = [*sampling, sensitivity_stage(work), calibration_stage(work), *layerwise.stages]
    if one_pass:
        stages.append(deciding_stage(work))
    if refined:
        stages.append(refining_stage(work))
    sums = [*layerwise.sums, *[_moment_bytes(work)] * (1 + 2 * targets * refined)]
    measured = len(work.held_out) * (1 + targets * (1 + one_pass))
    return _estimate(
        work,
        [*stages, *final_stages(work)],
        sums=sums,
        passing=bool(work.sampled) + len(sums) + SENSITIVITY_PASSES + layerwise.forward + measured,
        output=models * (1 + one_pass) if kept else 0,
        beside=work.kept_moments + (1 - kept + bool(refined)) * models,
        tracked=0,
    )


def _estimate(
    work: Workload,
    stages: Sequence[Stage],
    *,
    sums: Sequence[int],
    passing: int,
    output: int,
    beside: int,
    tracked: int,
) -> Estimate:
    """Gather an estimate.

    Args:
        work: The run.
        stages: Its stages.
        sums: For each pass that observes activations, the bytes of one layer's sums.
        passing: The number of all passes.
        output: Bytes of the models on the disk.
        beside: Bytes on the disk while the run goes on.
        tracked: Bytes that go to MLflow.
    """
    workers = work.workers
    return Estimate(
        stages=(Stage(name="start", driver=work.driver), *stages),
        num_workers=workers.num_workers,
        device=work.device.type,
        shared=max(sums, default=0) * (workers.num_workers + IN_FLIGHT),
        output=output,
        beside=beside,
        tracked=tracked,
        spilled=_spilled_bytes(work) if sums else 0,
        weights=passing * work.stored_bytes if workers.weights_travel else 0,
        moments=sum(sums) * (workers.num_workers - 1) * work.source.num_layers,
        tokens=4 * len(sums) * work.calibration.num_tokens,
    )


def _moment_bytes(work: Workload) -> int:
    """Return the bytes of the moments of one layer."""
    return moment_bytes(work.source, work.device)


def _spilled_bytes(work: Workload) -> int:
    """Return the most bytes of states that a worker holds in files."""
    in_one_pass = work.config.in_one_pass
    backward = _sensitivity_bytes(work) if in_one_pass and work.config.moments is None else 0
    if not work.config.offload:
        return backward
    if in_one_pass:
        footprint = Footprint.of(work.source, work.device, measures_change=work.config.drop_layers)
    else:
        footprint = Footprint.of_layerwise(work.source, work.device)
    if work.config.refine:
        footprint = Footprint.of_refinement(work.source, work.source, work.device)
    return max(backward, footprint.states_per_token * tokens_per_worker(work, work.calibration))


def _sensitivity_bytes(work: Workload) -> int:
    """Return the bytes of the states that enter each layer, which a worker holds in files to go back from them."""
    per_token = compute_dtype(work.device).itemsize * work.source.config.hidden_size * (work.source.num_layers + 2)
    return per_token * tokens_per_worker(work, sensitivity_text(work))
