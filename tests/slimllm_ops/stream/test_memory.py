"""Free memory is the machine's, or less if a container's limit leaves less."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from slimllm_ops.stream import memory

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]
# Prints what ten blocks take, and what is left of it when they are freed. The first block, freed at once, would make
# glibc keep blocks of its size. A small block, which stays, lies behind each of the ten, so that no heap could shrink.
HELD_AND_FREED = """
import psutil, torch
from benchmarks.sampling import private_memory
from slimllm_ops.stream import memory

torch.ones(6 << 20)
memory.return_large_blocks()
process = psutil.Process()
before = private_memory(process)
blocks = [(torch.ones(5 << 20), torch.ones(100)) for _ in range(10)]
held = private_memory(process) - before
small = [small for _, small in blocks]
del blocks
print(held, private_memory(process) - before)
"""


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
    # In a process of its own: a heap that other tests have left full of holes would take some of the blocks.
    ended = subprocess.run([sys.executable, "-c", HELD_AND_FREED], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    held, left = map(int, ended.stdout.split())
    assert held > 9 * (20 << 20)
    assert left < 20 << 20
