"""Widths of a model's layers are rounded to each multiple, and the least multiple that costs nothing is advised."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from transformers import AutoConfig, PretrainedConfig

from orchestrator.speed.widths import MOST_WIDTHS, Kind, kinds_of, sweep_widths


@pytest.fixture
def config(gqa_model: Path) -> PretrainedConfig:
    return AutoConfig.from_pretrained(gqa_model)


def slow_unless_by(multiple: int) -> Callable[[tuple[int, ...]], Mapping[int, float]]:
    """Times by which widths that are no multiple take half as long again."""
    return lambda widths: {width: 2.0 if width % multiple == 0 else 3.0 for width in widths}


def test_a_model_s_units_have_the_multiples_that_divide_them(config: PretrainedConfig) -> None:
    channels, heads = kinds_of(config)
    assert (channels.counts, channels.width, channels.multiples) == ((48,), 1, (1, 8, 16))
    assert (heads.counts, heads.width, heads.multiples) == ((2,), 16, (1, 2))


def test_units_without_a_multiple_to_try_are_left_out(make_llama: Callable[..., Path]) -> None:
    model = make_llama(num_attention_heads=3, num_key_value_heads=3, hidden_size=24)
    assert [kind.units for kind in kinds_of(AutoConfig.from_pretrained(model))] == ["channels"]


def test_widths_are_rounded_up() -> None:
    assert Kind("channels", "--multiple-of", (33, 48), 1, (1, 16)).widths(16) == [48, 48]
    assert Kind("heads", "--heads-multiple-of", (1, 3), 64, (1, 2)).widths(2) == [128, 256]


def test_the_least_multiple_that_costs_nothing_is_advised(config: PretrainedConfig) -> None:
    config.update({"intermediate_size_per_layer": [33, 40, 48]})
    config.update({"num_attention_heads_per_layer": [4] * 3, "num_key_value_heads_per_layer": [2] * 3})
    channels, heads = sweep_widths("model", config, slow_unless_by(8))
    assert channels.costs == {1: pytest.approx((3 + 2 + 2) / 6), 8: 1.0, 16: 1.0}
    assert channels.advice == (
        "model: layer widths such as 33 take 1.50 x the time of 40 for the same work, and all of them 1.17 x that of "
        "the best: prune with --multiple-of 8"
    )
    assert heads.advice == "model: its numbers of key/value heads cost no speed as they are"


def test_of_many_widths_some_are_timed(config: PretrainedConfig) -> None:
    config.num_hidden_layers = 40
    config.update({"intermediate_size_per_layer": list(range(1, 41))})
    config.update({"num_attention_heads_per_layer": [4] * 40, "num_key_value_heads_per_layer": [2] * 40})
    assert 1 < len(kinds_of(config)[0].counts) <= MOST_WIDTHS
