"""Finds and checks the models of a bench, and counts their parameters, bytes and work, before any of them runs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from orchestrator.config import ConfigError
from orchestrator.inputs import model_names
from orchestrator.sources.models import resolve_model
from orchestrator.speed.config import LLAMA_CPP, BenchConfig
from orchestrator.speed.engines import require_installed
from orchestrator.speed.widths import kinds_of
from slimllm_ops.checkpoint.resolution import weight_files
from slimllm_ops.checkpoint.whole import read_whole_config
from slimllm_ops.errors import CheckpointError
from slimllm_ops.timing.macs import Macs, count_macs, count_parameters, empty_model


@dataclass(frozen=True, kw_only=True)
class BenchModel:
    """A model to measure.

    Attributes:
        name: Its name in tables and in MLflow.
        place: Its directory, or its GGUF file.
        num_bytes: The bytes of its weights on disk.
        config: Its config; None for a GGUF file.
        parameters: Its parameters; None for a GGUF file.
        macs: Its multiply-accumulates; None if they cannot be counted.
    """

    name: str
    place: Path
    num_bytes: int
    config: PretrainedConfig | None = None
    parameters: int | None = None
    macs: Macs | None = None


def load_bench_models(config: BenchConfig, warn: Callable[[str], None]) -> tuple[BenchModel, ...]:
    """Find and check the models; warn of what cannot be counted.

    Raises:
        CheckpointError: A model is missing, broken, or no causal language model.
        ConfigError: Two models are the same, the engine is not installed, or a model takes no prompts of that length.
    """
    require_installed(config.engine)
    load = _load_gguf if config.engine == LLAMA_CPP else _load_directory
    named = zip(config.models, model_names(config.models), strict=True)
    models = tuple(load(spec, name, config, warn) for spec, name in named)
    _require_different(config.models, models)
    return models


def _load_directory(spec: str, name: str, config: BenchConfig, warn: Callable[[str], None]) -> BenchModel:
    place = resolve_model(spec).directory
    known = read_whole_config(place)
    files = [place / name for name in weight_files(place)]
    _require_length(spec, known, config)
    if config.widths:
        # Refuses a family whose layers' sizes are not known.
        kinds_of(known)
    model = empty_model(known)
    try:
        macs = count_macs(model)
    except CheckpointError as error:
        warn(f"{spec}: {error}; what they promise stays unknown")
        macs = None
    return BenchModel(
        name=name,
        place=place,
        num_bytes=sum(file.stat().st_size for file in files),
        config=known,
        parameters=count_parameters(model),
        macs=macs,
    )


def _load_gguf(spec: str, name: str, config: BenchConfig, warn: Callable[[str], None]) -> BenchModel:
    place = Path(spec).expanduser().absolute()
    if place.suffix != ".gguf" or not place.is_file():
        raise ConfigError(
            f"engine {LLAMA_CPP} runs a .gguf file, and {spec} is none: pass one that `slimllm export --to gguf` wrote"
        )
    return BenchModel(name=name.removesuffix(place.suffix), place=place, num_bytes=place.stat().st_size)


def _require_length(spec: str, known: PretrainedConfig, config: BenchConfig) -> None:
    most = getattr(known.get_text_config(), "max_position_embeddings", None)
    if most is not None and config.most_tokens > most:
        raise ConfigError(
            f"prompt_length {max(config.prompt_length)} and new_tokens {config.new_tokens} make {config.most_tokens} "
            f"tokens, and {spec} takes {most} at most: pass a shorter --prompt-length"
        )


def _require_different(specs: tuple[str, ...], models: tuple[BenchModel, ...]) -> None:
    seen: dict[Path, str] = {}
    for spec, model in zip(specs, models, strict=True):
        other = seen.setdefault(model.place.resolve(), spec)
        if other != spec:
            raise ConfigError(f"{other} and {spec} are the same model, {model.place.resolve()}: give each once")
