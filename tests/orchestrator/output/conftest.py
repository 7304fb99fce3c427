"""Fixtures for tests that disturb a run at many moments."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.record import figures
from tests.orchestrator.conftest import save_nothing


@pytest.fixture(scope="module")
def figures_are_not_rendered() -> Iterator[None]:
    """Leave empty files in place of figures, for all runs of a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_save", save_nothing)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all outputs of a file, below which a disk is full or loses its power."""
    return tmp_path_factory.mktemp("disk")
