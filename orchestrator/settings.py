"""Declares settings, and reads what derives from a declaration (docs/settings.md).

A setting is a field of a config with a `Setting` in its metadata. Options, `--config` files, checks, each command's
options, the values that `--resume` compares and docs/options.md all read it. Nothing here knows a setting by name.
"""

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from orchestrator.methods import Methods
from orchestrator.values import items_of, read_value, shown_briefly

# The largest config file that is read.
MOST_BYTES = 1 << 20


class ConfigError(ValueError):
    """A wrong setting: out of range, unknown, or in conflict with another; the message says what to change."""


class Effect(Enum):
    """What a setting changes, which decides where its value is recorded."""

    RESULT = "the result: `--resume` needs the same value, and every record has it"
    INPUT = "the data: `--resume` compares digests of the files that it names, and every record has it"
    PLACE = "where a run writes or how its workers share files: only MLflow has it"
    ATTEMPT = "one attempt at a run: the next may use another value, and no record has it"


@dataclass(frozen=True)
class Check:
    """A condition for a value, and the words for it: "it must be at least 1"."""

    holds: Callable[[Any], bool]
    must: str


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The declaration of a setting.

    Attributes:
        help: What it does, in one sentence for `--help` and docs/options.md.
        group: Its heading in `--help`; None if it is the command's argument and not an option.
        commands: The commands that take it.
        methods: The methods that take it; None for all.
        effect: What it changes.
        check: The condition for each value.
        choices: The allowed values; empty for any.
        metavar: The placeholder for the value in help texts; by default it follows from the type.
        shown: The default in help texts, if it is not the value itself.
        flag: The option, if it is not the name with dashes.
        by_commas: Whether the option takes several values with commas between them.
        tags_models: Whether MLflow's model page shows it when it is set.
        name: The field's name.
        annotation: The field's type.
        default: The field's default.
    """

    help: str
    group: str | None
    commands: tuple[str, ...]
    methods: Methods | None = None
    effect: Effect = Effect.RESULT
    check: Check | None = None
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    shown: str | None = None
    flag: str | None = None
    by_commas: bool = False
    tags_models: bool = False
    name: str = ""
    annotation: Any = None
    default: Any = None

    @property
    def kind(self) -> type:
        """The type of one value: str, bool, int or float."""
        return _kind_of(self.annotation)[0]

    @property
    def repeated(self) -> bool:
        """Whether it takes several values."""
        return _kind_of(self.annotation)[1]

    @property
    def optional(self) -> bool:
        """Whether None is a value, which stands for "not given"."""
        return isinstance(self.annotation, UnionType)

    @property
    def described_type(self) -> str:
        """The name of the type in messages."""
        several, absent = ", or a list of them" * self.repeated, ", or None" * self.optional
        return f"{self.kind.__name__}{several}{absent}"

    @property
    def option(self) -> str:
        """The option on the command line, such as "--keep-lowest"."""
        return self.flag or f"--{self.name.replace('_', '-')}"

    @property
    def placeholder(self) -> str | None:
        """The placeholder for the value in help texts; None for a flag."""
        return self.metavar or {bool: None, int: "N", float: "F", str: "NAME"}[self.kind]

    @property
    def shown_default(self) -> str:
        """The default in help texts, such as ".01"; empty for a flag and for a setting without a default."""
        if self.shown is not None:
            return self.shown
        if self.kind is bool or self.default in (None, ()):
            return ""
        return f"{self.default:g}".replace("0.", ".", 1) if self.kind is float else str(self.default)

    def describe(self) -> str:
        """Return the help text and the methods that take the setting, without a full stop."""
        return self.help.removesuffix(".") + (f" ({self.methods.label})" if self.methods else "")

    def is_set(self, config: object) -> bool:
        """Return whether a config's value differs from the default."""
        return bool(getattr(config, self.name) != self.default)

    def normalised(self, value: Any) -> Any:
        """Return a value as its declared type: paths become text, NumPy's numbers Python's, and lists tuples.

        Raises:
            ConfigError: It has another type.
        """
        if value is None and self.optional:
            return None
        try:
            if self.repeated:
                return tuple(read_value(self.kind, item) for item in items_of(value))
            return read_value(self.kind, value)
        except TypeError:
            raise ConfigError(f"{self.name} is {shown_briefly(value)}, expected {self.described_type}") from None
        except ValueError as error:
            raise ConfigError(f"{self.name} is {error}") from None

    def require(self, value: Any) -> None:
        """Check a value against the choices and the condition.

        Raises:
            ConfigError: It is not one of the choices, or does not meet the condition.
        """
        for item in value if self.repeated else () if value is None else (value,):
            known = ", ".join(self.choices)
            require(not known or item in self.choices, f"{self.name} {item!r} is unknown: choose one of {known}")
            if self.check:
                require(self.check.holds(item), f"{self.name} is {item}: {self.check.must}")

    def taken_by(self, method: str) -> bool:
        """Return whether a method takes the setting."""
        return self.methods is None or method in self.methods

    def require_method(self, method: str) -> None:
        """Check that a method takes the setting.

        Raises:
            ConfigError: The method does not take it.
        """
        if self.methods and not self.taken_by(method):
            ones = "that" if len(self.methods.names) == 1 else "one of them"
            raise ConfigError(
                f"{self.name} belongs to --method {self.methods}: choose {ones}, or leave {self.name} out"
            )


def check_settings(config: Any) -> None:
    """Give each of a config's settings its declared type, and check its value; for `__post_init__`.

    Raises:
        ConfigError: A value has another type, or is not allowed.
    """
    for name, one in declared(type(config)).items():
        value = one.normalised(getattr(config, name))
        object.__setattr__(config, name, value)
        one.require(value)


def require(holds: bool, message: str) -> None:
    """Check that a condition on the settings holds.

    Raises:
        ConfigError: It does not; the error has this message.
    """
    if not holds:
        raise ConfigError(message)


def setting(default: Any, help: str, group: str | None, commands: tuple[str, ...], **declared: Any) -> Any:
    """Declare a setting as a field of a dataclass, in place of `dataclasses.field`.

    Args:
        default: The field's default.
        help: What the setting does.
        group: Its heading in `--help`.
        commands: The commands that take it.
        declared: The other attributes of `Setting`.

    Example:
        `samples: int = setting(128, "Number of blocks of calibration text.", "Data", ("prune",))`
    """
    return field(
        default=default,
        metadata={"setting": Setting(help=help, group=group, commands=commands, default=default, **declared)},
    )


def same_setting(config: type, name: str, **changed: Any) -> Any:
    """Declare a setting as another config declares it, but for the attributes that are changed.

    Example:
        `seed: int = same_setting(PruneConfig, "seed")`
    """
    one = replace(declared(config)[name], **changed)
    return field(default=one.default, metadata={"setting": one})


def declared(config: type) -> dict[str, Setting]:
    """Return the settings of a config class by name, in declaration order."""
    return {one.name: replace(one.metadata["setting"], name=one.name, annotation=one.type) for one in fields(config)}


def read_settings(path: Path, known: Mapping[str, Setting]) -> dict[str, Any]:
    """Read the values in a TOML file, by the names of settings; dashes count as underscores.

    A file may be another's. It says what to compute; what a run replaces, where it writes and which servers it uses are
    options.

    Raises:
        ConfigError: The file is missing, is not TOML, or holds an unknown key, a value of the wrong type, or a setting
            that is an option only.
    """
    # This imports torch, which takes seconds, and most commands read no file.
    from slimllm_ops.files import read_plain

    try:
        read = tomllib.loads(read_plain(path, MOST_BYTES).decode("utf-8").replace("\r\n", "\n"))
    except FileNotFoundError as error:
        raise ConfigError(f"config file {path} does not exist") from error
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}; pass a TOML file") from error
    except RecursionError as error:
        raise ConfigError(f"config file {path} is nested too deeply: give each setting as NAME = VALUE") from error
    # Not only TOML errors: Python also refuses numbers with very many digits.
    except ValueError as error:
        raise ConfigError(f"config file {path} is not TOML: {error}") from error
    settings = {}
    for key, value in ((key.replace("-", "_"), value) for key, value in read.items()):
        if key not in known:
            raise ConfigError(f"config file {path} has an unknown key {key!r}; known are: {', '.join(sorted(known))}")
        try:
            settings[key] = known[key].normalised(value)
        except ConfigError as error:
            raise ConfigError(f"config file {path}: {error}") from None
        require(
            known[key].effect in (Effect.RESULT, Effect.INPUT),
            f"config file {path} sets {key}: a file says what to compute, and not where or what to replace; remove it "
            f"from the file, and pass {known[key].option}",
        )
    return settings


def _kind_of(annotation: Any) -> tuple[type, bool]:
    """Return the type of one value, and whether it is a tuple: int of `int | None`, str of `tuple[str, ...]`."""
    if isinstance(annotation, UnionType):
        annotation = next(one for one in get_args(annotation) if one is not NoneType)
    if get_origin(annotation) is tuple:
        return get_args(annotation)[0], True
    return annotation, False
