"""One declaration defines an option, a key of a file, a check, and an entry in the records."""

from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from orchestrator.cli import main
from orchestrator.cli.options import option_of
from orchestrator.config import CompareConfig, PruneConfig
from orchestrator.methods import ONE_PASS, Methods
from orchestrator.settings import Check, ConfigError, Setting, declared, read_settings, setting
from slimllm_ops import methods


@dataclass(frozen=True, kw_only=True)
class Example:
    """Settings of every type."""

    share: float = setting(
        0.05,
        "Share that stays.",
        "What to remove",
        ("prune",),
        methods=Methods("two of them", ("gram", "flap")),
        check=Check(lambda value: value < 1, "it must be less than 1"),
    )
    kind: str = setting("a", "What it is.", "Form", ("prune",), choices=("a", "b"))
    places: tuple[str, ...] = setting((), "Where it goes; repeatable.", "Form", ("prune",), metavar="DIR")
    limit: int | None = setting(None, "At most so many.", "Form", ("prune",), shown="no limit")
    fast: bool = setting(False, "Do not wait.", "Form", ("prune",), flag="--at-once")


EXAMPLE = declared(Example)


def parsed(*words: str) -> dict[str, object]:
    """What a command with the options of the example reads; its help is printed."""
    seen: dict[str, object] = {}

    @click.command()
    def command(**read: object) -> None:
        seen.update(read)

    for one in EXAMPLE.values():
        command = option_of(one)(command)
    result = CliRunner().invoke(command, words)
    assert result.exit_code == 0, result.output
    return seen | {"output": result.output}


def test_a_declaration_is_an_option_of_its_type() -> None:
    read = parsed("--share", ".5", "--kind", "b", "--places", "x", "--places", "y", "--limit", "3", "--at-once")
    assert read == {"share": 0.5, "kind": "b", "places": ("x", "y"), "limit": 3, "fast": True, "output": ""}


def test_an_option_that_is_left_out_leaves_a_files_value_alone() -> None:
    assert parsed() == {"share": None, "kind": None, "places": (), "limit": None, "fast": None, "output": ""}


def test_help_says_what_it_does_which_methods_take_it_and_the_default() -> None:
    lines = " ".join(str(parsed("--help")["output"]).split())
    assert "--share F Share that stays (two of them). [.05]" in lines
    assert "--places DIR Where it goes; repeatable." in lines
    assert "--limit N At most so many. [no limit]" in lines
    assert "--at-once Do not wait." in lines


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("share", 1.5, "share is 1.5: it must be less than 1"),
        ("kind", "c", "kind 'c' is unknown: choose one of a, b"),
    ],
)
def test_a_value_is_checked(name: str, value: object, said: str) -> None:
    EXAMPLE[name].require(EXAMPLE[name].default)
    with pytest.raises(ConfigError, match=said):
        EXAMPLE[name].require(value)


def test_a_method_that_does_not_take_it_is_refused() -> None:
    EXAMPLE["share"].require_method("flap")
    EXAMPLE["kind"].require_method("magnitude")
    with pytest.raises(ConfigError, match="share belongs to --method gram or flap: choose one of them, or leave share"):
        EXAMPLE["share"].require_method("magnitude")


def test_a_file_has_values_of_the_type(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('share = 1\nplaces = ["x"]\nlimit = 3\nfast = true\n')
    assert read_settings(file, EXAMPLE) == {"share": 1, "places": ("x",), "limit": 3, "fast": True}
    for text, said in {
        'limit = "3"': "limit is '3', expected int, or None",
        "fast = 1": "fast is 1, expected bool",
        "places = [1]": r"places is \[1\], expected str, or a list of them$",
        "kind = []": r"kind is \[\], expected str",
        "limit = 3.0": "limit is 3.0, expected int",
    }.items():
        file.write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_settings(file, EXAMPLE)


@pytest.mark.parametrize("setting", declared(CompareConfig).values(), ids=lambda one: one.name)
def test_every_declaration_says_a_sentence_and_names_commands_that_there_are(setting: Setting) -> None:
    assert setting.help.endswith(".")
    assert set(setting.commands) <= set(main.commands)
    setting.require(() if setting.repeated else setting.default)


def test_the_methods_are_those_of_the_registry() -> None:
    assert ONE_PASS.names == tuple(methods.METHODS)


def test_a_row_of_a_users_own_is_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"method 'mine' is unknown: choose one of slimllm, gram, flap, .*, random$"):
        PruneConfig(method="mine")
    monkeypatch.setitem(methods.METHODS, "mine", methods.METHODS["flap"])
    assert PruneConfig(method="mine", refine=True).in_one_pass
    with pytest.raises(ConfigError, match=r"choose one of slimllm, gram, .*, random, mine$"):
        PruneConfig(method="yours")


@pytest.mark.parametrize("name", [name for name, one in declared(PruneConfig).items() if one.methods == ONE_PASS])
def test_what_one_pass_methods_take_the_papers_does_not(name: str) -> None:
    value = True if declared(PruneConfig)[name].kind is bool else "x"
    for method in ONE_PASS.names:
        assert PruneConfig(method=method, **{name: value}).in_one_pass
    said = f"{name} belongs to --method gram, flap, .* or random: choose one of them, or leave {name} out"
    with pytest.raises(ConfigError, match=said):
        PruneConfig(**{name: value})


def test_layers_are_dropped_by_gram_alone() -> None:
    assert PruneConfig(method="gram", drop_layers=True).drop_layers
    for method in ("flap", "slimllm"):
        with pytest.raises(ConfigError, match="drop_layers belongs to --method gram: choose that"):
            PruneConfig(method=method, drop_layers=True)


def test_one_process_needs_no_cluster() -> None:
    assert PruneConfig(local=True, workers=3).workers == 3
    with pytest.raises(ConfigError, match="local computes in this process, and address names a Ray cluster"):
        PruneConfig(local=True, address="h:1")
