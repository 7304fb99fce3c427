"""Fixtures for tests of GGUF files: the packages that read and run them, and a pruned checkpoint."""

from pathlib import Path
from typing import Any

import pytest

from tests.orchestrator.exports.gguf_files import pruned_build


@pytest.fixture(scope="session")
def gguf() -> Any:
    return pytest.importorskip("gguf", reason="pip install -e '.[gguf]'")


@pytest.fixture(scope="session")
def llama_cpp(gguf: Any) -> Any:
    return pytest.importorskip("llama_cpp", reason="pip install -e '.[gguf-test]'")


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """A Llama of which every layer has another shape."""
    return pruned_build("llama", tmp_path)
