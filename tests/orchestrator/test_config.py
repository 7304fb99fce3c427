"""A run's settings: which are refused, what a file may contain, and the defaults."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import ConfigError, PruneConfig, read_config_file


def test_the_default_is_a_sparsity_of_a_fifth_by_the_papers_method() -> None:
    config = PruneConfig()
    assert config.method == "slimllm"
    assert config.targets == (0.2,)


def test_one_sparsity_may_be_a_plain_number() -> None:
    assert PruneConfig(sparsity=0.3).targets == (0.3,)


def test_a_ratio_takes_the_place_of_the_sparsity() -> None:
    assert PruneConfig(ratio=0.25).targets == (None,)


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
    ],
)
def test_a_setting_out_of_range_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PruneConfig(**settings)


def test_a_file_holds_the_settings_by_their_names(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'model = "m"\nsparsity = 0.3\nalpha = 7\nsequence-length = 64\noverwrite = true\n'
        'evaluate = ["a.txt", "b.txt"]\n'
    )
    config = PruneConfig(**read_config_file(file))
    assert (config.model, config.targets, config.alpha) == ("m", (0.3,), 7)
    assert (config.sequence_length, config.overwrite, config.evaluate) == (64, True, ("a.txt", "b.txt"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sparsty = 0.3", "unknown key 'sparsty'; known are: .*sparsity"),
        ('samples = "many"', "samples is 'many', expected int"),
        ("overwrite = 1", "overwrite is 1, expected bool"),
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
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_config_file(tmp_path)
