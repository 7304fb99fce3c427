"""The settings of `tune`: what contradicts, and what each method takes by default."""

from typing import Any

import pytest

from orchestrator.config import ConfigError, PruneConfig
from orchestrator.settings import declared
from orchestrator.tuning.config import TuneConfig


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"checkpoint": None}, "no checkpoint is named"),
        ({"steps": 10, "epochs": 2}, "steps and epochs were both given"),
        ({"method": "full", "full": True}, "full belongs to --method distil"),
        ({"method": "full", "teacher": "x"}, "full has no teacher, only a dense model to measure beside"),
        ({"pack": True}, "pack belongs to --method lora"),
        ({"method": "blocks", "steps": 3}, "pass epochs"),
        ({"method": "blocks", "fsdp": True}, "holds one layer at a time"),
        ({"method": "blocks", "batch_size": 4}, "a step for each sequence"),
        ({"local": True, "address": "host:1"}, "give one of them"),
        ({"learning_rate": 0.0}, "it must be greater than 0"),
        ({"method": "sft"}, "choose one of distil, lora, full, blocks"),
    ],
)
def test_what_contradicts_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TuneConfig(**{"checkpoint": "pruned", **settings})


def test_steps_follow_from_passes_or_from_the_method() -> None:
    assert TuneConfig(checkpoint="x").steps_for(1000) == 200
    assert TuneConfig(checkpoint="x", epochs=3, batch_size=10).steps_for(100) == 30
    assert TuneConfig(checkpoint="x", method="lora").steps_for(640) == 20
    assert TuneConfig(checkpoint="x", steps=7).steps_for(1000) == 7


def test_the_paper_s_recipe_is_the_default_of_lora() -> None:
    config = TuneConfig(checkpoint="x", method="lora")
    assert (config.rank, config.alpha, config.peak_learning_rate, config.sequences_per_step) == (8, 16, 1e-4, 64)
    assert config.passes == 2
    assert config.on_responses


def test_shared_settings_are_those_of_prune() -> None:
    ours, theirs = declared(TuneConfig), declared(PruneConfig)
    for name in ("output", "seed", "workers", "address", "experiment", "register", "offload"):
        assert ours[name].option == theirs[name].option
        assert ours[name].effect == theirs[name].effect
        assert ours[name].default == theirs[name].default
