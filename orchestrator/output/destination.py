"""Where an output goes: a directory here, or a store, to which it is uploaded from a directory here once it is whole.

What is on its way to a URI waits in the cache (storage.outgoing_directory), unfinished or whole, until it is there.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orchestrator.config import ConfigError, PruneConfig
from orchestrator.output.staging import ASKED, has_unfinished_run, hold_lock, is_finished, require_same
from orchestrator.sources import storage
from orchestrator.tracking import TrackingError
from slimllm_ops.errors import InputError

JOURNAL = "metrics.jsonl"


class DeliveryError(RuntimeError):
    """A store did not take an output, which is whole on this machine; the message says how to go on."""


@dataclass(frozen=True)
class Destination:
    """Where an output goes.

    Attributes:
        directory: where it is made.
        uri: where it is uploaded; None where it stays.
    """

    directory: Path
    uri: str | None = None

    @classmethod
    def of(cls, output: str) -> "Destination":
        """Return what a path or a URI names.

        Raises:
            ConfigError: the URI has no name in it.
        """
        if not storage.is_uri(output):
            return cls(Path(output))
        try:
            return cls(storage.outgoing_directory(output), output.rstrip("/"))
        except storage.StorageError as error:
            raise ConfigError(f"output {error}") from error

    @property
    def place(self) -> Path | str:
        """Where the output is in the end."""
        return self.uri or self.directory

    def place_of(self, relative: Path) -> Path | str:
        """Where a directory of the output is in the end."""
        if self.uri is None:
            return self.directory / relative
        return "/".join([self.uri, *relative.parts])


def finish_delivery(output: Destination, asked: dict[str, Any], overwrite: bool, note: Callable[[str], None]) -> bool:
    """Upload an output that is whole here; return whether it is whole where it goes, and is what is asked.

    Raises:
        ConfigError: it is whole, but was asked to be something else; or the store does not say.
        DeliveryError: the store did not take it.
    """
    if output.uri is not None and is_finished(output.directory, asked):
        with _lock_upload(output.directory, output.uri):
            _upload(output.directory, output.uri, overwrite, note)
        return True
    return is_whole(output, asked)


def is_whole(output: Destination, asked: dict[str, Any]) -> bool:
    """Return whether an output is whole, here or where it goes, and is what is asked; nothing is uploaded.

    Raises:
        ConfigError: it is whole, but was asked to be something else; or the store does not say.
    """
    if is_finished(output.directory, asked):
        return True
    if output.uri is None or has_unfinished_run(output.directory):
        return False
    with _as_config_errors():
        earlier = storage.read_text(output.uri, str(ASKED))
    if earlier is None:
        return False
    require_same(json.loads(earlier), asked, f"output {output.uri}")
    return True


@contextmanager
def deliver_output(output: Destination, overwrite: bool, note: Callable[[str], None]) -> Iterator[Path]:
    """Give the directory to make an output in; upload it at the end, if it goes to a store.

    Raises:
        ConfigError: the store holds something there and is not to be overwritten, or cannot be written to; another
            run on this machine writes the same; or what an earlier run finished was not uploaded.
        DeliveryError: the store did not take the output.
    """
    if output.uri is None:
        yield output.directory
        return
    with _lock_upload(output.directory, output.uri):
        if (output.directory / ASKED).exists() and not overwrite:
            raise ConfigError(
                f"an earlier run of {output.uri} was finished and not uploaded, and is in {output.directory}: "
                f"pass --resume to upload it, or --overwrite to begin anew"
            )
        with _as_config_errors():
            storage.require_writable(output.uri, overwrite)
        yield output.directory
        _upload(output.directory, output.uri, overwrite, note)


@contextmanager
def fetch_output(uri: str) -> Iterator[Path]:
    """Fetch a copy of an output from a store for a command that reads it; put journals back that grew.

    Raises:
        ConfigError: it is not there, not whole, or the store does not take the journal.
    """
    with _as_config_errors():
        fetched = storage.fetch_directory(uri)
    if not (fetched / ASKED).exists():
        raise ConfigError(f"{uri} is no whole output (it has no {ASKED}): upload it again by --resume, or prune again")
    with (
        TemporaryDirectory(dir=fetched.parents[1]) as folder,
        storage.naming_uri(uri, copy := Path(folder) / fetched.name, ConfigError, InputError, TrackingError),
    ):
        # Only journals are written to, and what was fetched must stay as it is.
        shutil.copytree(fetched, copy, copy_function=_copy_or_link)
        journals = {path: path.read_bytes() for path in copy.rglob(JOURNAL)}
        yield copy
        with _as_config_errors():
            for path, before in journals.items():
                if path.read_bytes() != before:
                    storage.upload_file(uri, path, path.relative_to(copy).as_posix())


def _copy_or_link(source: str, copy: str) -> None:
    if Path(source).name == JOURNAL:
        shutil.copyfile(source, copy)
    else:
        Path(copy).symlink_to(Path(source).resolve())


@contextmanager
def _lock_upload(directory: Path, uri: str) -> Iterator[None]:
    """Hold the lock of an upload to a URI; remove its folder once nothing is left in it."""
    holder = directory.parent / "holder"
    with hold_lock(holder, uri):
        try:
            yield
        finally:
            if list(directory.parent.iterdir()) == [holder]:
                shutil.rmtree(directory.parent)


@contextmanager
def _as_config_errors() -> Iterator[None]:
    """Raise a refusal of a store as a ConfigError: nothing is computed yet, and the user can mend it."""
    try:
        yield
    except storage.StorageError as error:
        raise ConfigError(str(error)) from error


def _upload(directory: Path, uri: str, overwrite: bool, note: Callable[[str], None]) -> None:
    """Upload what is whole, and remove it here."""
    sizes = [path.stat().st_size for path in directory.rglob("*") if path.is_file()]
    note(f"uploading {len(sizes)} files, {sum(sizes) / 1e6:,.1f} MB, to {uri}")
    waits = f"the output is whole in {directory}: the same command with --resume uploads it"
    try:
        storage.upload_directory(uri, directory, str(ASKED), overwrite)
    except storage.StorageError as error:
        raise DeliveryError(f"{error}; {waits}") from error
    except BaseException as error:
        error.add_note(waits)
        raise
    shutil.rmtree(directory)


def checkpoints_output(config: PruneConfig, name: str) -> Destination:
    """Return where the checkpoints of a model of this name go: by default to pruned/<model>-<sparsity>."""
    return Destination.of(config.output or f"pruned/{name}-{sparsity_label(config)}")


def moments_output(config: PruneConfig, name: str) -> Destination:
    """Return where the moments of a model of this name go: by default to moments/<model>."""
    return Destination.of(config.output or f"moments/{name}")


def sparsity_label(config: PruneConfig) -> str:
    """Return how much goes, as outputs and runs are named by it."""
    if config.ratio is not None:
        return f"ratio-{config.ratio:g}"
    return "-".join(f"{sparsity:g}" for sparsity in config.targets)
