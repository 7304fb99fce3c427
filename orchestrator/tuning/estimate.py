"""Estimates what a training takes, and refuses one that certainly does not fit.

A worker holds the student, the gradients and Adam's two moments of what is trained, the teacher, and the activations of
a micro-batch: the states that each layer keeps for the way back, and the logits.
"""

from pathlib import Path

import psutil

from cluster import Resources, WorkerPlan
from orchestrator.preflight.checks import Check, check_fit, check_nodes, inspect_cluster, refuse_certain_failure
from orchestrator.preflight.dry_run import RunPlan
from orchestrator.preflight.estimate import Estimate, Stage
from orchestrator.progress import Reporter
from orchestrator.tracking import TrackingOptions
from orchestrator.tuning.config import BLOCKS, TuneConfig
from orchestrator.tuning.inputs import TuneInputs
from orchestrator.tuning.training import trained_modules
from slimllm_ops.checkpoint.reading import Checkpoint

# Host memory of the libraries of a training's worker: torch, transformers' trainer, peft.
LIBRARIES = 600_000_000
# Copies of the logits in float32: both models', their log-softmax, and the gradient.
LOGIT_COPIES = 6
# What a layer keeps for the way back, in multiples of a token's states and of its channels.
KEPT_STATES, KEPT_CHANNELS = 14, 4
FLOAT32, BFLOAT16 = 4, 2
# Gradients and Adam's two moments.
PER_TRAINED = 3 * FLOAT32


def require_room_to_train(
    config: TuneConfig, inputs: TuneInputs, output: Path, resources: Resources, workers: WorkerPlan, reporter: Reporter
) -> RunPlan:
    """Report what a training will take, and refuse it if the machines certainly lack it.

    Raises:
        ConfigError: It would certainly fail.
    """
    plan = plan_training(config, inputs, output, resources, workers)
    reporter.note(f"estimate: {plan.estimate.describe()}")
    refuse_certain_failure(plan.checks, reporter.warn)
    return plan


def plan_training(
    config: TuneConfig, inputs: TuneInputs, output: Path, resources: Resources, workers: WorkerPlan
) -> RunPlan:
    """Return what a training takes, and whether it fits."""
    nodes = inspect_cluster(resources, 0.0)
    estimate = estimate_training(config, inputs, workers)
    checks: tuple[Check, ...] = (
        *check_nodes(nodes, workers),
        *check_fit(config, output, estimate, nodes, workers),
    )
    return RunPlan(output=output, workers=workers, estimate=estimate, checks=checks)


def estimate_training(config: TuneConfig, inputs: TuneInputs, workers: WorkerPlan) -> Estimate:
    """Estimate what a training takes."""
    on_gpu, stored = workers.gpus_per_worker > 0, inputs.checkpoint.num_bytes()
    held = 0 if config.method == BLOCKS else _models_bytes(config, inputs, on_gpu)
    libraries = 0 if on_gpu else LIBRARIES
    share = workers.num_workers if config.fsdp else 1
    driver = psutil.Process().memory_full_info().uss
    stage = Stage(
        name="training",
        worker=libraries + held // share + _activation_bytes(config, inputs),
        required=held // share,
        driver=driver,
    )
    return Estimate(
        stages=(Stage(name="start", driver=driver), stage),
        num_workers=workers.num_workers,
        device="cuda" if on_gpu else "cpu",
        shared=0,
        output=stored,
        # The trainer's best and latest checkpoints, with Adam's moments.
        beside=2 * (_trained(config, inputs) * PER_TRAINED + (0 if config.with_adapters else stored)),
        tracked=0 if TrackingOptions(tracking_uri=config.tracking_uri).journal_only else stored,
        spilled=0,
        weights=0,
        moments=0,
        tokens=0,
    )


def _models_bytes(config: TuneConfig, inputs: TuneInputs, on_gpu: bool) -> int:
    """Return the bytes of both models, and of what the optimiser keeps."""
    frozen = BFLOAT16 if on_gpu else FLOAT32
    student = _parameters(inputs.checkpoint) * (frozen if config.with_adapters else FLOAT32)
    teacher = 0 if inputs.teacher is None else _parameters(inputs.teacher) * frozen
    return student + teacher + _trained(config, inputs) * PER_TRAINED


def _trained(config: TuneConfig, inputs: TuneInputs) -> int:
    """Return the number of parameters that are trained."""
    checkpoint = inputs.checkpoint
    if not config.with_adapters:
        return _parameters(checkpoint)
    shapes = checkpoint.shapes([f"{module}.weight" for module in trained_modules(inputs)])
    return config.rank * sum(sum(shape) for shape in shapes.values())


def _activation_bytes(config: TuneConfig, inputs: TuneInputs) -> int:
    """Return the bytes of a micro-batch's activations."""
    model, length = inputs.checkpoint.config, inputs.data.input_ids_BT.shape[1]
    per_layer = KEPT_STATES * model.hidden_size + KEPT_CHANNELS * model.intermediate_size
    kept = model.hidden_size if config.gradient_checkpointing else per_layer
    per_token = FLOAT32 * (model.num_hidden_layers * kept + LOGIT_COPIES * model.vocab_size)
    return config.micro_batch_size * length * per_token


def _parameters(checkpoint: Checkpoint) -> int:
    return checkpoint.num_parameters(list(checkpoint.files))
