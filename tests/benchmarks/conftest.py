"""A store for the runs that benchmarks start."""

import shutil
from pathlib import Path

import pytest

from benchmarks import memory, sampling, stages


@pytest.fixture
def migrated_store(first_run: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the store of a benchmark's runs exist before the first: to make one takes seconds."""

    def run_slimllm(arguments: list[str]) -> sampling.Measured:
        start = "--tracking-uri=sqlite:///"
        (store,) = [Path(word.removeprefix(start)) for word in arguments if word.startswith(start)]
        if not store.exists():
            shutil.copyfile(first_run[0] / "copy.db", store)
        return sampling.run_slimllm(arguments)

    for benchmark in (memory, stages):
        monkeypatch.setattr(benchmark, "run_slimllm", run_slimllm)
