"""What a run is asked to do: one frozen value, checked when it is made."""

import math
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from orchestrator.sources.storage import is_uri

METHODS = ("slimllm", "gram")


class ConfigError(ValueError):
    """A setting is out of range, unknown, or contradicts another; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """The settings of `prune`; the command line's options of the same names, and the keys of a `--config` file.

    Raises:
        ConfigError: a setting is out of range or contradicts another.
    """

    model: str | None = None
    output: str | None = None
    overwrite: bool = False
    resume: bool = False
    method: str = "slimllm"
    sparsity: tuple[float, ...] = ()
    refine: bool = False
    moments: str | None = None
    ratio: float | None = None
    pruned_layers: int | None = None
    alpha: float | None = None
    keep_lowest: float = 0.01
    uniform: bool = False
    multiple_of: int = 1
    no_bias: bool = False
    drop_layers: bool = False
    calibration: str | None = None
    samples: int = 128
    sequence_length: int = 2048
    seed: int = 0
    evaluate: tuple[str, ...] = ()
    local: bool = False
    workers: int | None = None
    gpus_per_worker: float | None = None
    offload: bool = False
    shared_storage: bool = False
    address: str | None = None
    experiment: str = "slimllm"
    tracking_uri: str | None = None
    run_name: str | None = None
    register: str | None = None

    def __post_init__(self) -> None:
        """Check every setting that can be checked without the model."""
        object.__setattr__(self, "evaluate", tuple(self.evaluate))
        # One sparsity is the usual case, and may be given as a plain number.
        sparsity = (self.sparsity,) if isinstance(self.sparsity, int | float) else tuple(self.sparsity)
        object.__setattr__(self, "sparsity", sparsity)
        _require(self.method in METHODS, f"method {self.method!r} is unknown: choose one of {', '.join(METHODS)}")
        self._check_ranges()
        self._check_combinations()

    def _check_ranges(self) -> None:
        for name, values in (("sparsity", self.sparsity), ("ratio", () if self.ratio is None else (self.ratio,))):
            for value in values:
                _require(0 < value < 1, f"{name} is {value}: it must lie between 0 and 1, both excluded")
        _require(0 <= self.keep_lowest < 1, f"keep_lowest is {self.keep_lowest}: it must lie in [0, 1)")
        for name in ("samples", "sequence_length", "workers", "pruned_layers", "multiple_of"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} is {value}: it must be at least 1")
        _require(
            self.alpha is None or math.isfinite(self.alpha), f"alpha is {self.alpha}: it must be a number, such as 10"
        )
        _require(0 <= self.seed < 2**63, f"seed is {self.seed}: it must be at least 0, and less than 2^63")
        _require(self.sequence_length >= 2, "sequence_length is 1: a block must have two tokens at least")
        _require(
            self.gpus_per_worker is None or 0 <= self.gpus_per_worker <= 1,
            f"gpus_per_worker is {self.gpus_per_worker}: a worker computes on one GPU at most, so pass 0 to 1",
        )

    def _check_targets(self) -> None:
        _require(
            not self.sparsity or self.ratio is None,
            "sparsity and ratio were both given: sparsity solves for the ratio, so give one of them",
        )
        _require(len(set(self.sparsity)) == len(self.sparsity), "a sparsity was given twice: give each once")

    def _check_combinations(self) -> None:
        self._check_targets()
        for name in ("pruned_layers", "alpha"):
            _require(
                not self.uniform or getattr(self, name) is None,
                f"{name} says how layers differ, and uniform that they do not: give one of them",
            )
        if self.method == "slimllm":
            for name in ("refine", "moments", "drop_layers"):
                _require(not getattr(self, name), f"{name} belongs to --method gram: add that, or leave {name} out")
        else:
            for name in ("ratio", "pruned_layers", "alpha"):
                _require(
                    getattr(self, name) is None,
                    f"{name} belongs to --method slimllm: {self.method} meets a sparsity by error alone",
                )

    @property
    def targets(self) -> tuple[float | None, ...]:
        """The sparsities to meet: .2 by default, None where the paper's own ratio was given."""
        return (None,) if self.ratio is not None else self.sparsity or (0.2,)


@dataclass(frozen=True, kw_only=True)
class CompareConfig(PruneConfig):
    """The settings of `compare`: those of `prune`, the methods that take part (all by default), and what is kept.

    `ratio`, `pruned_layers`, `alpha` and `keep_lowest` are for `slimllm`, which is always one of them.
    """

    methods: tuple[str, ...] = ()
    keep_checkpoints: bool = False

    def __post_init__(self) -> None:
        """Check every setting that can be checked without the model."""
        object.__setattr__(self, "methods", tuple(self.methods))
        super().__post_init__()

    def _check_combinations(self) -> None:
        self._check_targets()
        _require(
            not is_uri(self.output or ""),
            f"output {self.output} is a URI, and a comparison is written to a directory: pass one, and copy it there",
        )
        _require(len(set(self.methods)) == len(self.methods), "a method was given twice: give each once")
        _require(self.method == "slimllm", "method is a setting of prune: a comparison takes methods")
        for name in ("refine", "moments", "register", "resume", "uniform", "no_bias", "drop_layers"):
            _require(not getattr(self, name), f"{name} is a setting of prune: leave it out of a comparison")


def read_config_file(path: Path, kind: type[PruneConfig] = PruneConfig) -> dict[str, Any]:
    """Return the settings of a TOML file, with the names of a config's fields; dashes count as underscores.

    Raises:
        ConfigError: the file is missing, is not TOML, or holds an unknown key or a value of the wrong type.
    """
    try:
        read = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"config file {path} does not exist") from error
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}; pass a TOML file") from error
    except RecursionError as error:
        raise ConfigError(f"config file {path} is nested too deeply: settings are names and values") from error
    # Not only TOML's own: numbers of very many digits are refused by Python.
    except ValueError as error:
        raise ConfigError(f"config file {path} is not TOML: {error}") from error
    settings = {key.replace("-", "_"): value for key, value in read.items()}
    known = {field.name: field for field in fields(kind)}
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(f"config file {path} has an unknown key {key!r}; known are: {', '.join(sorted(known))}")
        annotation = known[key].type
        _require_type(path, key, value, annotation.__name__ if isinstance(annotation, type) else str(annotation))
    return settings


def _require_type(path: Path, key: str, value: Any, annotation: str) -> None:
    """Check a TOML value against a field's annotation; TOML writes whole floats as integers."""
    expected = {
        "str": (str,),
        "bool": (bool,),
        "int": (int,),
        "float": (float, int),
        "tuple[str, ...]": (list,),
        "tuple[float, ...]": (list, float),
    }[annotation.removesuffix(" | None")]
    items = value if isinstance(value, list) else []
    kinds = (str,) if "str" in annotation else (int, float)
    if type(value) not in expected or not all(type(item) in kinds for item in items):
        raise ConfigError(f"config file {path}: {key} is {value!r}, expected {annotation}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)
