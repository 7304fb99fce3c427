"""Free memory is the machine's, or less if a container's limit leaves less."""

import sys
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.sampling import private_memory
from slimllm_ops.stream import memory

CPU = torch.device("cpu")


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    return tmp_path


def test_without_a_limit_it_is_the_machines(container: Path) -> None:
    assert memory.free_memory(CPU) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    (container / "memory.max").write_text("max\n")
    assert memory.free_memory(CPU) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


@pytest.mark.parametrize(("used", "free"), [(400, 600), (1200, 0)])
def test_a_containers_limit_counts(container: Path, used: int, free: int) -> None:
    (container / "memory.max").write_text("1000\n")
    (container / "memory.current").write_text(f"{used}\n")
    assert memory.free_memory(CPU) == free


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's way")
def test_large_blocks_go_back_when_they_are_freed() -> None:
    memory.return_large_blocks()
    process = psutil.Process()
    before = private_memory(process)
    # Each below glibc's own limit of 32 MiB, and a small one kept behind each, so that no heap could shrink.
    held = [(torch.ones(5 << 20), torch.ones(100)) for _ in range(10)]
    assert private_memory(process) - before > 9 * (20 << 20)
    kept = [small for _, small in held]
    del held
    assert private_memory(process) - before < 20 << 20
    assert len(kept) == 10
