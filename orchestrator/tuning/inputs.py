"""Finds and checks what `tune` reads: the checkpoint, its plan, the dense model and the data."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from orchestrator.calibration import BUILTIN_CALIBRATION, load_blocks
from orchestrator.config import SELF
from orchestrator.data import DataError, TextOptions, TokenBlocks
from orchestrator.data.examples import Examples, load_examples, split
from orchestrator.inputs import model_name, resolve_recorded
from orchestrator.sources import storage
from orchestrator.sources.models import Model, resolve_model
from orchestrator.tuning.config import BLOCKS, DISTIL, FULL, LORA, TuneConfig
from slimllm_ops.checkpoint.companions import plan_companions
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.tokenizer import same_vocabulary
from slimllm_ops.decide.plan import Plan
from slimllm_ops.errors import InputError

# The part of the data that is held out for validation, if none is named.
HELD_OUT = 20
# The most sequences of the data that are held out; more make evaluations slow and tell little more.
MOST_HELD_OUT = 32
# As many tokens of a text are read, if the training passes over all of it.
MOST_TOKENS = 1 << 28
PLAN = Path("pruning/plan.json")


@dataclass(frozen=True, kw_only=True)
class TuneInputs:
    """The models and the data of a training.

    Attributes:
        name: The checkpoint's name in paths and runs.
        model: The checkpoint's directory.
        checkpoint: The checkpoint.
        plan: Its plan; None if slimllm did not prune it.
        teacher: The dense model; None if the method has none.
        dense: The dense model to measure beside the tuned one; None if it is not known or there is nothing to measure.
        dense_digest: The digest of the dense model's weights.
        data: What it is trained on.
        validation: What chooses the best step.
        held_out: The texts that perplexity is measured on.
    """

    name: str
    model: Model
    checkpoint: Checkpoint
    plan: Plan | None
    teacher: Checkpoint | None
    dense: Checkpoint | None
    dense_digest: str | None
    data: Examples
    validation: Examples
    held_out: tuple[TokenBlocks, ...]

    @cached_property
    def digest(self) -> str:
        """The digest of the checkpoint's weights."""
        return self.checkpoint.digest()

    @property
    def teacher_digest(self) -> str | None:
        """The digest of the teacher's weights."""
        return self.dense_digest if self.teacher else None


def load_tune_inputs(config: TuneConfig, warn: Callable[[str], None]) -> TuneInputs:
    """Find the checkpoint, its plan and dense model, and the data; warn of what the user may not expect.

    Raises:
        CheckpointError: A model is missing, broken or unknown.
        InputError: The dense model is not the one that was pruned, or has another vocabulary; or the method needs a
            checkpoint that slimllm pruned.
        DataError: The data cannot be used.
    """
    model = resolve_model(config.checkpoint)
    with storage.naming_uri(config.checkpoint, model.directory, InputError):
        checkpoint = Checkpoint.open(model.directory)
        plan_companions(model.directory)
        plan = _plan_of(checkpoint)
    _require_pruned(config, plan, warn)
    dense, dense_digest = _dense_of(config, checkpoint, plan, warn)
    data, validation = _load_data(config, checkpoint, plan)
    if config.data is None:
        warn(
            f"the training reads {data.spec}, which the pruning was calibrated on: the pruned model fits it already, "
            f"so little comes back; pass other text as --data SPEC"
        )
    return TuneInputs(
        name=model_name(config.checkpoint),
        model=model,
        checkpoint=checkpoint,
        plan=plan,
        teacher=dense if config.has_teacher else None,
        dense=dense,
        dense_digest=dense_digest,
        data=data,
        validation=validation,
        held_out=tuple(_load_held_out(config, checkpoint, spec) for spec in config.evaluate),
    )


def _plan_of(checkpoint: Checkpoint) -> Plan | None:
    """Return the plan of a checkpoint that slimllm pruned; None for another model.

    Raises:
        InputError: The plan is missing or broken.
    """
    if getattr(checkpoint.config, "num_attention_heads_per_layer", None) is None:
        return None
    path = checkpoint.directory / PLAN
    try:
        return Plan.read(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read ({error}), and it says what was pruned: pass the whole directory that slimllm wrote"
        ) from error


def _require_pruned(config: TuneConfig, plan: Plan | None, warn: Callable[[str], None]) -> None:
    if plan is not None:
        return
    if config.method in (LORA, BLOCKS):
        raise InputError(
            f"{config.checkpoint} is not a model that slimllm pruned, and --method {config.method} trains what was "
            f"pruned: pass a pruned checkpoint, or --method {DISTIL} or {FULL}"
        )
    warn(f"{config.checkpoint} is not a model that slimllm pruned: every layer of it is trained")


def _dense_of(
    config: TuneConfig, checkpoint: Checkpoint, plan: Plan | None, warn: Callable[[str], None]
) -> tuple[Checkpoint | None, str | None]:
    """Return the dense model and its digest; None if the training does without it and it is not known.

    Raises:
        InputError: See `_named_dense`.
    """
    if config.has_teacher or config.teacher is not None:
        return _named_dense(config, checkpoint, plan)
    if plan is None or not config.evaluate:
        return None, None
    try:
        return _named_dense(config, checkpoint, plan)
    except InputError as error:
        warn(f"how much of the loss comes back will not be known: {error}")
        return None, None


def _named_dense(config: TuneConfig, checkpoint: Checkpoint, plan: Plan | None) -> tuple[Checkpoint, str]:
    """Return the dense model, and the digest of its weights, which takes long to compute for a large model.

    Raises:
        InputError: It is not named, is not the one that was pruned, or has another vocabulary.
    """
    params = {} if plan is None else plan.header["params"]
    named, revision = config.teacher or params.get("model"), None if config.teacher else params.get("revision")
    if named is None:
        raise InputError(f"{config.checkpoint} has no plan that names its dense model: pass it as --teacher MODEL")
    try:
        teacher = Checkpoint.open(resolve_recorded(named, revision))
    except InputError as error:
        raise InputError(f"the dense model {named} cannot be read: {error}; pass it as --teacher MODEL") from error
    expected, found = params.get("model_digest"), teacher.digest()
    if (config.teacher is None or config.method == BLOCKS) and found != expected:
        raise InputError(
            f"{named} has the weights {found[:12]}, and {config.checkpoint} was pruned from {str(expected)[:12]}: pass "
            f"the model that was pruned as --teacher MODEL"
        )
    _require_vocabulary(checkpoint, teacher)
    return teacher, found


def _require_vocabulary(checkpoint: Checkpoint, teacher: Checkpoint) -> None:
    ours, theirs = checkpoint.config.vocab_size, teacher.config.vocab_size
    if ours != theirs or not same_vocabulary(checkpoint.directory, teacher.directory):
        raise InputError(
            f"the dense model {teacher.directory} has another vocabulary ({theirs:,} tokens) than "
            f"{checkpoint.directory} ({ours:,}): pass one with the same tokenizer"
        )


def _load_data(config: TuneConfig, checkpoint: Checkpoint, plan: Plan | None) -> tuple[Examples, Examples]:
    """Load what the checkpoint is trained on, and what is held out."""
    spec = config.data or _calibration_of(config, plan)
    if config.validation is not None:
        validation = _load(config, checkpoint, config.validation, samples=MOST_HELD_OUT)
        return _load(config, checkpoint, spec, samples=_wanted(config, 0)), validation
    data = _load(config, checkpoint, spec, samples=_wanted(config, MOST_HELD_OUT))
    found = len(data.input_ids_BT)
    return split(data, min(MOST_HELD_OUT, max(1, found // HELD_OUT)))


def _wanted(config: TuneConfig, held_out: int) -> int | None:
    """Return how many sequences are drawn: as many as the steps read, or all."""
    return None if config.passes is not None else config.steps_for(0) * config.sequences_per_step + held_out


def _calibration_of(config: TuneConfig, plan: Plan | None) -> str:
    """Return the text that a checkpoint was calibrated on."""
    spec = None if plan is None or config.on_responses else plan.header["params"].get("calibration")
    if spec is None:
        kind = "instructions" if config.on_responses else "text"
        raise DataError(f"no data are named: pass {kind} to train on as --data SPEC")
    if spec.startswith(SELF):
        raise DataError(
            f"{config.checkpoint} was calibrated on {spec}, which the dense model sampled: pass text as --data SPEC, "
            f"such as {BUILTIN_CALIBRATION}"
        )
    return spec


def _load(config: TuneConfig, checkpoint: Checkpoint, spec: str, samples: int | None) -> Examples:
    tokens = None if samples else MOST_TOKENS
    return load_examples(
        spec,
        model_dir=checkpoint.directory,
        vocab_size=checkpoint.config.vocab_size,
        max_length=checkpoint.config.max_position_embeddings,
        options=TextOptions(samples=samples, sequence_length=config.sequence_length, seed=config.seed, tokens=tokens),
        responses=config.on_responses,
        pack=config.pack,
    )


def _load_held_out(config: TuneConfig, checkpoint: Checkpoint, spec: str) -> TokenBlocks:
    taken = TextOptions(samples=None, sequence_length=config.sequence_length, tokens=config.evaluate_tokens)
    return load_blocks(checkpoint, spec, taken)
