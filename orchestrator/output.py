"""The output directory: it appears under its name only when it is whole."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from orchestrator.config import ConfigError


@contextmanager
def staged(output: Path, overwrite: bool) -> Iterator[Path]:
    """Give a directory beside `output` to write in; rename it to `output` at the end, remove it after an error.

    Raises:
        ConfigError: the output exists and is not empty, or its place cannot be written to.
    """
    require_free(output, overwrite)
    # Of a name such as "." the place beside it is known only once it is absolute.
    output = output.absolute()
    made = [parent for parent in output.parents if not parent.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        _remove_empty(made)
        raise ConfigError(f"output {output} cannot be written: {error.strerror}; choose another --output") from error
    try:
        staging.chmod(0o755)
        yield staging
        _replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _remove_empty(made)


def require_free(output: Path, overwrite: bool) -> None:
    """Refuse an output that holds something, unless it may be overwritten.

    Raises:
        ConfigError: the output is a file, or a directory that is not empty.
    """
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output {output} is a file: choose another --output")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ConfigError(f"output {output} is not empty: choose another --output, or pass --overwrite to replace it")


def _remove_empty(directories: list[Path]) -> None:
    """Remove directories in order as long as they are empty; after a success they are not."""
    with suppress(OSError):
        for directory in directories:
            directory.rmdir()


def _replace(staging: Path, output: Path) -> None:
    """Move what was there aside, the new directory in, and then delete the old: never nothing in its place."""
    if not output.exists():
        staging.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent))
    output.rename(old)
    staging.rename(output)
    shutil.rmtree(old, ignore_errors=True)
