"""The settings of `bench`: contradictions end in an error, and the defaults measure four shapes."""

from typing import Any

import pytest

from orchestrator.config import ConfigError
from orchestrator.speed.config import BenchConfig, Shape


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"models": ()}, "no model is named"),
        ({"models": ("m", "m")}, "models is m, m: give each once"),
        ({"batch_size": ()}, "batch_size is empty"),
        ({"prompt_length": (8, 8)}, "prompt_length is 8, 8: give each once"),
        ({"new_tokens": 1}, "it must be at least 2"),
        ({"rounds": 0}, "it must be at least 1"),
        ({"engine": "onnx"}, "choose one of transformers, compiled, vllm, llama.cpp"),
        ({"engine": "vllm", "widths": True}, "leave widths out"),
        ({"engine": "llama.cpp"}, "pass --batch-size 1"),
    ],
)
def test_what_contradicts_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        BenchConfig(**{"models": ("model",)} | settings)


def test_every_batch_size_meets_every_length() -> None:
    config = BenchConfig(models=("model",), batch_size=(1, 2), prompt_length=(4, 8), new_tokens=3)
    assert config.shapes == (Shape(1, 4), Shape(1, 8), Shape(2, 4), Shape(2, 8))
    assert config.most_tokens == 11
