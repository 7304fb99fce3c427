"""Engines with known times, which write down when they were asked."""

import fcntl
from pathlib import Path

from slimllm_ops.timing.generation import Generation

# Seconds of a prompt's token, by the model's folder.
SECONDS = {"dense": 0.004, "pruned": 0.002}
LATER = 0.5


class FakeEngine:
    """An engine whose times are known; it computes nothing."""

    described = "nothing"

    def __init__(self, directory: Path, most_tokens: int) -> None:
        self.directory, self.seconds = directory, SECONDS[directory.name]

    def generate(self, batch_size: int, length: int, new_tokens: int, seed: int) -> Generation:
        with (self.directory.parent / "asked").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(f"{self.directory.name} {batch_size} {length} {new_tokens} {seed}\n")
        # The machine slows down from round to round.
        slower = 1.0 + seed
        first, later = slower * self.seconds * batch_size * length, slower * LATER * self.seconds
        steps = (later,) * (new_tokens - 1)
        return Generation(first, sum(steps), steps, ((0,) * new_tokens,) * batch_size)

    def profile(self, batch_size: int, length: int, seed: int) -> dict[str, float]:
        return {}


class FailingEngine(FakeEngine):
    """An engine that has too little memory for two sequences."""

    def generate(self, batch_size: int, length: int, new_tokens: int, seed: int) -> Generation:
        if batch_size > 1:
            raise MemoryError("no room for 2 sequences\nand more")
        return super().generate(batch_size, length, new_tokens, seed)
