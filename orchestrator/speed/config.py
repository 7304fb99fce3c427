"""Declares the settings of `bench`; those that `prune` has too are declared there."""

from dataclasses import dataclass
from typing import NamedTuple

from orchestrator.config import AT_LEAST_ONE, PruneConfig
from orchestrator.settings import Check, Effect, check_settings, require, same_setting, setting

BENCH = ("bench",)
WORK = "What to measure"
TRANSFORMERS, COMPILED, VLLM, LLAMA_CPP = "transformers", "compiled", "vllm", "llama.cpp"
# Engines that compute with torch in a process of ours, so that its products can be timed alone.
IN_TORCH = (TRANSFORMERS, COMPILED)
AT_LEAST_TWO = Check(lambda value: value >= 2, "it must be at least 2, since the first token counts by itself")


class Shape(NamedTuple):
    """How many sequences pass at once, and the length of their prompts."""

    batch_size: int
    length: int


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """The settings of `bench`: the options of the command line, and those of a `--config` file.

    Raises:
        ConfigError: A setting has another type, is out of range or contradicts another.
    """

    models: tuple[str, ...] = setting(
        (),
        "The models: directories, URIs or hub ids; the first is what the others are measured against.",
        None,
        BENCH,
        effect=Effect.INPUT,
    )
    output: str | None = same_setting(
        PruneConfig, "output", help="Where the tables go: a directory; without it, nothing is written.", shown=""
    )
    overwrite: bool = same_setting(PruneConfig, "overwrite")
    engine: str = setting(
        TRANSFORMERS,
        "What runs the models: transformers; compiled, by torch.compile; vllm; llama.cpp, for GGUF files.",
        WORK,
        BENCH,
        choices=(TRANSFORMERS, COMPILED, VLLM, LLAMA_CPP),
    )
    batch_size: tuple[int, ...] = setting(
        (1, 8), "Sequences at once; repeatable.", WORK, BENCH, check=AT_LEAST_ONE, shown="1 and 8"
    )
    prompt_length: tuple[int, ...] = setting(
        (128, 512), "Tokens of each prompt; repeatable.", WORK, BENCH, check=AT_LEAST_ONE, shown="128 and 512"
    )
    new_tokens: int = setting(32, "Tokens to generate after each prompt.", WORK, BENCH, check=AT_LEAST_TWO)
    rounds: int = setting(
        5, "How often each model is measured, in turn with the others.", WORK, BENCH, check=AT_LEAST_ONE
    )
    threads: int | None = setting(
        None, "CPU threads of each model.", WORK, BENCH, check=AT_LEAST_ONE, shown="one per core"
    )
    widths: bool = setting(
        False,
        "Also time the layers' widths beside rounded ones, to say which --multiple-of costs no speed.",
        WORK,
        BENCH,
    )
    seed: int = same_setting(PruneConfig, "seed", group=WORK, help="Seed of the prompts, which are random tokens.")
    experiment: str = same_setting(PruneConfig, "experiment")
    tracking_uri: str | None = same_setting(PruneConfig, "tracking_uri")
    run_name: str | None = same_setting(PruneConfig, "run_name", shown="<model>-bench")

    def __post_init__(self) -> None:
        """Check every setting that can be checked without the models."""
        check_settings(self)
        require(
            bool(self.models), "no model is named: pass MODEL..., the first is what the others are measured against"
        )
        for name in ("models", "batch_size", "prompt_length"):
            values = getattr(self, name)
            require(bool(values), f"{name} is empty: give one at least")
            require(len(set(values)) == len(values), f"{name} is {', '.join(map(str, values))}: give each once")
        require(
            self.engine in IN_TORCH or not self.widths,
            f"widths are timed in torch, and engine {self.engine} computes otherwise: leave widths out",
        )
        require(
            self.engine != LLAMA_CPP or self.batch_size == (1,),
            f"engine {LLAMA_CPP} is measured one sequence at a time: pass --batch-size 1",
        )

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The batch sizes and prompt lengths to measure."""
        return tuple(Shape(batch, length) for batch in self.batch_size for length in self.prompt_length)

    @property
    def most_tokens(self) -> int:
        """The tokens of the longest sequence, with those that are generated."""
        return max(self.prompt_length) + self.new_tokens
