"""A run's settings: which are refused, what a file may contain, and the defaults."""

import json
from enum import StrEnum
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.config import CompareConfig, ConfigError, PruneConfig, read_config_file
from orchestrator.settings import Setting, declared

SETTINGS = declared(CompareConfig)


class Name(StrEnum):
    """What programs use for the names of methods."""

    A = "a"


# For each type, values that Python users pass, and what each stands for.
TAKEN: dict[type, list[tuple[Any, Any]]] = {
    str: [(Path("a/b"), "a/b"), (PurePosixPath("a"), "a"), (np.str_("a"), "a"), (Name.A, "a"), ("c%20d/é", "c%20d/é")],
    bool: [(np.True_, True), (np.bool_(False), False), (torch.tensor(True), True)],
    int: [(np.int64(3), 3), (np.uint8(3), 3), (np.array(3), 3), (torch.tensor(3), 3)],
    float: [(np.float64(0.5), 0.5), (np.float32(0.5), 0.5), (1, 1.0), (np.int16(1), 1.0), (Fraction(1, 2), 0.5)],
}
# Values of other types, and numbers that are none.
REFUSED: dict[type, list[Any]] = {
    str: [3, 0.5, True, b"a", object(), {"a": 1}, "a\0b", ("a", 3), Path("s3://bucket/model")],
    bool: [0, 1, "true", 1.0, [], np.int64(1), object()],
    int: ["3", 3.0, True, np.float64(3), np.True_, float("nan"), b"3", {"a": 1}, 10**5000, [[3]], np.array([[3]])],
    float: ["0.5", True, float("nan"), np.nan, 1j, b"1", {"a": 1}, 10**5000, np.True_, np.array(["0.5"])],
}


def each(values: dict[type, list[Any]], chosen: Any = lambda one: True) -> list[Any]:
    """Return every setting with every value for its type."""
    return [
        pytest.param(one, value, id=f"{name}-{index}")
        for name, one in SETTINGS.items()
        if chosen(one)
        for index, value in enumerate(values[one.kind])
    ]


def test_the_default_is_a_sparsity_of_a_fifth_by_the_papers_method() -> None:
    config = PruneConfig()
    assert config.method == "slimllm"
    assert config.targets == (0.2,)


def test_one_sparsity_may_be_a_plain_number() -> None:
    assert PruneConfig(sparsity=0.3).targets == (0.3,)


def test_a_ratio_takes_the_place_of_the_sparsity() -> None:
    assert PruneConfig(ratio=0.25).targets == (None,)


@pytest.mark.parametrize(("one", "case"), each(TAKEN))
def test_every_setting_takes_what_python_users_pass(one: Setting, case: tuple[Any, Any]) -> None:
    given, expected = case
    for value, result in (
        [(given, expected)]
        if not one.repeated
        else [
            (given, (expected,)),
            ([given], (expected,)),
            (iter((given,)), (expected,)),
            (np.array([given] * 2), (expected,) * 2) if isinstance(given, np.generic) else ((given,), (expected,)),
        ]
    ):
        found = one.normalised(value)
        assert found == result
        items = found if one.repeated else (found,)
        assert [type(item) for item in items] == [one.kind] * len(items)


def test_a_config_holds_what_its_values_stand_for() -> None:
    plain = PruneConfig(model="m", evaluate=("a", "b"), sparsity=(0.25, 0.5), workers=2, local=True, samples=7)
    passed = PruneConfig(
        model=Path("m"),  # type: ignore[arg-type]
        evaluate=[Path("a"), "b"],  # type: ignore[arg-type]
        sparsity=np.array([0.25, 0.5], dtype=np.float32),  # type: ignore[arg-type]
        workers=np.int64(2),  # type: ignore[arg-type]
        local=np.True_,  # type: ignore[arg-type]
        samples=torch.tensor(7),  # type: ignore[arg-type]
    )
    assert passed == plain
    assert repr(passed) == repr(plain)
    assert CompareConfig(methods=["gram"], output=Path("o")).methods == ("gram",)  # type: ignore[arg-type]


@pytest.mark.parametrize(("one", "value"), each(REFUSED))
def test_every_setting_refuses_other_types(one: Setting, value: Any) -> None:
    for given in [value, [value], {"set": value}] if one.repeated else [value]:
        with pytest.raises(ConfigError, match=f"^{one.name} is ") as error:
            (CompareConfig if "compare" in one.commands else PruneConfig)(**{one.name: given})
        assert len(str(error.value).splitlines()) == 1
        assert len(str(error.value)) < 200


@pytest.mark.parametrize("one", SETTINGS.values(), ids=lambda one: one.name)
def test_none_stands_for_a_setting_that_is_not_given_where_that_may_be(one: Setting) -> None:
    if one.default is None:
        assert one.normalised(None) is None
        return
    with pytest.raises(ConfigError, match=f"{one.name} is None, expected {one.kind.__name__}"):
        CompareConfig(**{one.name: None})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sparsity": 0.0}, "sparsity is 0.0"),
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"sparsity": -0.5}, "between 0 and 1"),
        ({"sparsity": float("nan")}, "sparsity is nan"),
        ({"ratio": 1.5}, "ratio is 1.5"),
        ({"sparsity": 0.2, "ratio": 0.2}, "give one of them"),
        ({"sparsity": (0.2, 0.2)}, "given twice"),
        ({"method": "magic"}, "choose one of slimllm"),
        ({"moments": "directory"}, "moments belongs to --method gram"),
        ({"method": "gram", "alpha": 7.0}, "alpha belongs to --method slimllm"),
        ({"keep_lowest": 1.0}, "keep_lowest is 1.0"),
        ({"samples": 0}, "samples is 0"),
        ({"sequence_length": 1}, "two tokens"),
        ({"alpha": float("nan")}, "alpha is nan: it must be a number"),
        ({"alpha": float("-inf")}, "alpha is -inf"),
        ({"seed": -1}, "seed is -1: it must be at least 0"),
        ({"seed": 10**30}, "less than 2"),
        ({"keep_lowest": float("nan")}, "keep_lowest is nan"),
        ({"workers": 0}, "workers is 0"),
        ({"pruned_layers": 0}, "pruned_layers is 0"),
        ({"gpus_per_worker": -1.0}, "one GPU at most, so pass 0 to 1"),
        ({"gpus_per_worker": 1.5}, "one GPU at most, so pass 0 to 1"),
        ({"heads_multiple_of": 0}, "heads_multiple_of is 0: it must be at least 1"),
        ({"for_tp": -2}, "for_tp is -2: it must be at least 1"),
        ({"max_layer_sparsity": 1.0}, "max_layer_sparsity is 1.0: it must lie between"),
        (
            {"uniform": True, "keep_layers": 0},
            "keep_layers keeps every head of some layers, and uniform as many in all",
        ),
        ({"uniform_heads": True, "keep_layers": -1}, "every head of some layers, and uniform_heads as many in all"),
        (
            {"method": "gram", "drop_layers": True, "max_layer_sparsity": 0.5},
            "drop_layers takes whole layers: give one",
        ),
        (
            {"ratio": 0.5, "max_layer_sparsity": 0.3},
            "ratio 0.5 is the mean .* and max_layer_sparsity 0.3 the most: lower",
        ),
    ],
)
def test_a_setting_out_of_range_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PruneConfig(**settings)


def test_a_file_holds_the_settings_by_their_names(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'model = "m"\nsparsity = 0.3\nalpha = 7\nsequence-length = 64\nuniform = false\nevaluate = ["a.txt", "b.txt"]\n'
    )
    config = PruneConfig(**read_config_file(file))
    assert (config.model, config.targets, config.alpha) == ("m", (0.3,), 7)
    assert (config.sequence_length, config.uniform, config.evaluate) == (64, False, ("a.txt", "b.txt"))


# What deletes, where a run writes, and whom it talks to.
OPTIONS_ONLY = {
    **{"overwrite": True, "resume": True, "local": True, "output": "/home/me", "address": "far:6379"},
    **{"tracking_uri": "http://far", "register": "prod", "experiment": "x", "run_name": "x"},
    **{"offload": True, "shared_storage": True},
}


@pytest.mark.parametrize("kind", [PruneConfig, CompareConfig])
@pytest.mark.parametrize("name", OPTIONS_ONLY)
def test_a_file_neither_replaces_nor_says_where(tmp_path: Path, name: str, kind: type[PruneConfig]) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f"sparsity = 0.3\n{name.replace('_', '-')} = {json.dumps(OPTIONS_ONLY[name])}\n")
    option = f"--{name.replace('_', '-')}"
    with pytest.raises(ConfigError, match=rf"sets {name}: a file says what to compute, .* pass {option}$"):
        read_config_file(file, kind)


def test_every_setting_of_a_file_says_what_to_compute(tmp_path: Path) -> None:
    """A new setting is an option only unless its effect is on the result."""
    effects = {one.name: one.effect.name for one in declared(CompareConfig).values()}
    assert {name for name, effect in effects.items() if effect in ("PLACE", "ATTEMPT")} == OPTIONS_ONLY.keys()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sparsty = 0.3", "unknown key 'sparsty'; known are: .*sparsity"),
        ('samples = "many"', "samples is 'many', expected int"),
        ("uniform = 1", "uniform is 1, expected bool"),
        ("evaluate = [1]", "evaluate is"),
        ("sparsity = ", "is not TOML"),
        ("seed = " + "[" * 10**5, "is nested too deeply"),
        ("seed = " + "9" * 5000, "is not TOML"),
    ],
)
def test_a_file_with_a_mistake_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_config_file(file)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_config_file(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read: it is a directory"):
        read_config_file(tmp_path)
