"""Runs a model by transformers, as it is or compiled, and times it."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import StaticCache

from slimllm_ops.errors import InputError
from slimllm_ops.evaluation.reading import read_on
from slimllm_ops.timing.generation import Generation, Pass, generate, pass_of, random_prompts
from slimllm_ops.timing.profile import profile_call


class Engine(Protocol):
    """Runs one model in this process.

    Attributes:
        described: What it computes on, and in which dtype.
    """

    described: str

    def generate(self, batch_size: int, length: int, new_tokens: int, seed: int) -> Generation:
        """Generate tokens after random prompts, and time them."""

    def profile(self, batch_size: int, length: int, seed: int) -> dict[str, float]:
        """Return the seconds of the operators of a prompt's pass, by kind; empty if the engine does not tell."""


OpenEngine = Callable[[Path, int], Engine]


class TransformersEngine:
    """A model as transformers runs it, in bfloat16 on a GPU and in float32 on a CPU."""

    def __init__(self, directory: Path, most_tokens: int) -> None:
        self.on_gpu = torch.cuda.is_available()
        self.model = read_on(directory, torch.device("cuda" if self.on_gpu else "cpu"))
        self.dtype = self.model.dtype
        self.forward: Pass = pass_of(self.model)
        place = torch.cuda.get_device_name() if self.on_gpu else f"CPU, {torch.get_num_threads()} threads"
        self.described = f"{place}, {str(self.dtype).removeprefix('torch.')}"

    def generate(self, batch_size: int, length: int, new_tokens: int, seed: int) -> Generation:
        """Generate tokens after random prompts, and time them."""
        ids_BT = self._prompts(batch_size, length, seed)
        with torch.inference_mode():
            return generate(self.forward, ids_BT, new_tokens, self.new_cache(batch_size, length + new_tokens))

    def profile(self, batch_size: int, length: int, seed: int) -> dict[str, float]:
        """Return the seconds of the operators of a prompt's pass, by kind."""
        ids_BT = self._prompts(batch_size, length, seed)
        with torch.inference_mode():
            cache = self.new_cache(batch_size, length)
            return profile_call(lambda: self.forward(ids_BT, cache), self.on_gpu)

    def new_cache(self, batch_size: int, length: int) -> Any:
        """Return an empty cache; None lets the model make its own, which grows."""
        return None

    def _prompts(self, batch_size: int, length: int, seed: int) -> Tensor:
        vocab_size = self.model.config.get_text_config().vocab_size
        return random_prompts(vocab_size, batch_size, length, seed).to(self.model.device)


class CompiledEngine(TransformersEngine):
    """A model whose passes `torch.compile` has compiled, with a cache of a fixed size."""

    def __init__(self, directory: Path, most_tokens: int) -> None:
        _require_compiler()
        super().__init__(directory, most_tokens)
        self.model.forward = torch.compile(self.model.forward)

    def new_cache(self, batch_size: int, length: int) -> Any:
        """Return an empty cache of a fixed size."""
        return StaticCache(config=self.model.config, max_cache_len=length)


def _require_compiler() -> None:
    """Compile one product.

    Raises:
        InputError: A compiler is missing, or does not work.
    """
    try:
        torch.compile(lambda x: x @ x)(torch.ones(2, 2))
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2))
    # Inductor raises errors of its own, and those of the compilers that it starts.
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise InputError(
            f"engine compiled needs a C++ compiler such as g++, and compiling failed ({reason}): install one, or pass "
            f"--engine transformers"
        ) from error
