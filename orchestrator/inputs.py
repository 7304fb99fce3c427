"""Finds and checks a run's inputs, the model's directory and its token blocks, before anything starts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orchestrator.calibration import Calibration, Sampling, load_blocks, load_calibration, stored_calibration
from orchestrator.config import PruneConfig
from orchestrator.data import DataError, TextOptions, TokenBlocks
from orchestrator.data.prompts import sequences_asked
from orchestrator.sources import storage
from orchestrator.sources.models import Model, resolve_model
from slimllm_ops.allocate.form import Form, layers_named
from slimllm_ops.allocate.layer_size import measure_layer
from slimllm_ops.allocate.reachable import require_reachable
from slimllm_ops.checkpoint.companions import plan_companions
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.errors import InputError
from slimllm_ops.stream.padding import count_tokens
from slimllm_ops.stream.refinement import require_refinable

BUILTIN_NAME = "builtin"
BUILTIN_HELDOUT = "builtin:heldout"


@dataclass(frozen=True)
class Inputs:
    """The model and the data of a run."""

    name: str
    model: Model
    source: Checkpoint
    source_digest: str
    calibration: Calibration
    held_out: tuple[TokenBlocks, ...]
    form: Form
    moments: Path | None = None
    # What the dense model samples before the calibration data are complete.
    sampling: Sampling | None = None

    def calibration_blocks(self) -> np.ndarray:
        """Return the calibration blocks (B, T), int32."""
        assert self.calibration.blocks is not None, "moments stand for the blocks, or the model has yet to sample some"
        return self.calibration.blocks.input_ids_BT


def load_inputs(config: PruneConfig, warn: Callable[[str], None]) -> Inputs:
    """Find the model, then its calibration and held-out blocks; warn of what the user may not expect.

    Raises:
        CheckpointError: The model is missing, broken or unknown, or a file beside its weights cannot be copied.
        InputError: The moments are missing or belong to something else, a sparsity is more than the model can give, or
            refinement was requested for a model that cannot be refined.
        DataError: A data spec does not give token blocks.
    """
    model = resolve_model(config.model, config.revision)
    with storage.naming_uri(config.model, model.directory, InputError):
        source = Checkpoint.open(model.directory)
        # Before anything opens the tokenizer's files: opening a pipe would block.
        plan_companions(model.directory)
    for warning in (*warnings_of(config), *source.warnings):
        warn(warning)
    if config.refine:
        require_refinable(source.family)
    form = _form_of(config, source)
    for warning in _require_possible(config, source, form):
        warn(warning)
    defaults = (BUILTIN_HELDOUT,) if config.calibration is None and config.moments is None else ()
    specs = config.evaluate or defaults
    digest, moments, sampling = source.digest(), resolve_moments(config.moments), None
    if moments is None:
        calibration, sampling = load_calibration(config, source)
    else:
        calibration = stored_calibration(config, source, digest, moments)
    return Inputs(
        model_name(config.model),
        model,
        source,
        digest,
        calibration,
        tuple(_load_held_out(config, source, spec) for spec in specs),
        form,
        moments,
        sampling,
    )


def _form_of(config: PruneConfig, source: Checkpoint) -> Form:
    """Return the form of a source's pruned models.

    Raises:
        InputError: A layer that should stay whole does not exist, or none or too few are left to prune.
    """
    whole = layers_named(config.keep_layers, source.num_layers)
    others = source.num_layers - len(whole)
    if whole and not others:
        raise InputError(f"all {source.num_layers} layers are to stay whole: leave one out of --keep-layers")
    if whole and config.pruned_layers and config.pruned_layers > others:
        raise InputError(
            f"{config.pruned_layers} layers are to be pruned, but only {others} need not stay whole: "
            f"lower --pruned-layers, or name fewer --keep-layers"
        )
    return Form(
        uniform=config.uniform,
        uniform_heads=config.uniform_heads,
        multiple_of=math.lcm(config.multiple_of, config.for_tp),
        heads_multiple_of=math.lcm(config.heads_multiple_of, config.for_tp),
        with_bias=not config.no_bias,
        drop_layers=config.drop_layers,
        whole_layers=whole,
        limit=config.max_layer_sparsity or 1.0,
    )


def _require_possible(config: PruneConfig, source: Checkpoint, form: Form) -> list[str]:
    """Check that a source's layers can take a form and reach the sparsities; return what to warn of.

    Raises:
        InputError: They cannot.
    """
    layers = [measure_layer(source, layer, form.with_bias) for layer in range(source.num_layers)]
    sizes = form.sizes(layers)
    for sparsity in config.targets:
        if sparsity is not None:
            require_reachable(sizes, sparsity, drop_layers=form.drop_layers)
    return form.warnings(layers)


def warnings_of(config: PruneConfig) -> list[str]:
    """Return what a user should know of the defaults that a run takes."""
    if config.model is None or config.calibration is not None or config.moments is not None:
        return []
    measured = "" if config.evaluate else ", and its perplexity is measured on it"
    return [
        f"{model_name(config.model)} is calibrated on the built-in text, Python's documentation{measured}: pass text "
        f"like that which the model will read (--calibration SPEC), or let it write some (--calibration self:128), and "
        f"held-out text (--evaluate SPEC)"
    ]


def model_name(model: str | None) -> str:
    """Return the name of a model in paths and runs: that of its directory, or of the link that the user gave."""
    if model is None:
        return BUILTIN_NAME
    if storage.is_uri(model):
        return storage.name_of(model)
    path = Path(model)
    return path.resolve().name if path.name in ("", "..") else path.name


def model_names(models: Sequence[str]) -> list[str]:
    """Return a name for each of several models: with its folder where two have the same, and else with its number."""
    names = [model_name(one) for one in models]
    longer = [f"{_folder_of(one)}/{name}" for one, name in zip(models, names, strict=True)]
    chosen = [long if names.count(name) > 1 else name for name, long in zip(names, longer, strict=True)]
    return [f"{name}#{number}" if chosen.count(name) > 1 else name for number, name in enumerate(chosen, start=1)]


def _folder_of(model: str) -> str:
    return model.rstrip("/").split("/")[-2] if storage.is_uri(model) else Path(model).resolve().parent.name


def resolve_recorded(named: str, revision: str | None) -> Path:
    """Return the directory of the model that a record names, which may be the built-in one.

    Raises:
        CheckpointError, InputError: It cannot be found.
    """
    is_builtin = named == BUILTIN_NAME and not Path(named).exists()
    return resolve_model(None if is_builtin else named, revision).directory


def resolve_moments(moments: str | None) -> Path | None:
    """Return the directory of stored moments, fetched if it is a URI.

    Raises:
        InputError: The store cannot provide it.
    """
    if moments is None:
        return None
    if not storage.is_uri(moments):
        return Path(moments)
    try:
        return storage.fetch_directory(moments)
    except storage.StorageError as error:
        raise InputError(f"moments {error}") from error


def _load_held_out(config: PruneConfig, source: Checkpoint, spec: str) -> TokenBlocks:
    if sequences_asked(spec):
        raise DataError(f"--evaluate {spec}: perplexity needs text that the model did not write; pass held-out text")
    # Blocks in their order, so that perplexity does not depend on what a run calibrates on.
    taken = TextOptions(samples=None, sequence_length=config.sequence_length, tokens=config.evaluate_tokens)
    blocks = load_blocks(source, spec, taken)
    if not count_tokens(blocks.input_ids_BT[:, 1:]):
        raise DataError(f"{spec} has blocks of one token: perplexity needs at least two")
    return blocks
