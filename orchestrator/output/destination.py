"""Delivers an output to a local directory, or uploads it to a store once it is complete.

An output for a URI is made in the cache (`storage.outgoing_directory`), and stays there until it is uploaded.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orchestrator.completion import ASKED, JOURNAL, MARK, find_damage, is_marked
from orchestrator.config import ConfigError, PruneConfig
from orchestrator.output.lock import hold_lock
from orchestrator.output.staging import has_unfinished_run, is_finished, require_same
from orchestrator.sources import storage
from orchestrator.tracking import TrackingError
from slimllm_ops.errors import InputError


class DeliveryError(RuntimeError):
    """A failed upload of an output that is complete on this machine; the message says how to continue."""


@dataclass(frozen=True)
class Destination:
    """Where an output goes.

    Attributes:
        directory: The local directory it is made in.
        uri: Where it is uploaded; None if it stays in `directory`.
    """

    directory: Path
    uri: str | None = None

    @classmethod
    def of(cls, output: str) -> "Destination":
        """Return the destination for a path or a URI.

        Raises:
            ConfigError: The URI contains no name.
        """
        if not storage.is_uri(output):
            return cls(Path(output))
        try:
            return cls(storage.outgoing_directory(output), output.rstrip("/"))
        except storage.StorageError as error:
            raise ConfigError(f"output {error}") from error

    @property
    def place(self) -> Path | str:
        """The output's final location."""
        return self.uri or self.directory

    def place_of(self, relative: Path) -> Path | str:
        """Return the final location of a directory inside the output."""
        if self.uri is None:
            return self.directory / relative
        return "/".join([self.uri, *relative.parts])


def finish_delivery(output: Destination, asked: dict[str, Any], overwrite: bool, note: Callable[[str], None]) -> bool:
    """Upload the output if it is complete on this machine; return whether it is complete at its destination.

    Raises:
        ConfigError: A complete output was made with other settings, or the store cannot be read.
        DeliveryError: The upload failed.
    """
    if output.uri is not None and is_finished(output.directory, asked):
        with _lock_upload(output.directory, output.uri):
            _upload(output.directory, output.uri, overwrite, note)
        return True
    return is_whole(output, asked)


def is_whole(output: Destination, asked: dict[str, Any]) -> bool:
    """Return whether the output is complete, here or at its destination; upload nothing.

    Raises:
        ConfigError: A complete output was made with other settings, or the store cannot be read.
    """
    if is_finished(output.directory, asked):
        return True
    if output.uri is None or has_unfinished_run(output.directory):
        return False
    with _as_config_errors():
        # The mark is uploaded last.
        if storage.read_text(output.uri, MARK) is None:
            return False
        earlier = storage.read_text(output.uri, str(ASKED))
    if earlier is None:
        return False
    require_same(json.loads(earlier), asked, f"output {output.uri}")
    return True


@contextmanager
def deliver_output(output: Destination, overwrite: bool, note: Callable[[str], None]) -> Iterator[Path]:
    """Yield the directory to make an output in; upload it at the end if it goes to a store.

    Raises:
        ConfigError: The store has something there and `overwrite` is off, or the store cannot be written to; another
            run on this machine is writing the same output; or an earlier, complete output has not been uploaded.
        DeliveryError: The upload failed.
    """
    if output.uri is None:
        yield output.directory
        return
    with _lock_upload(output.directory, output.uri):
        if is_marked(output.directory) and not overwrite:
            raise ConfigError(
                f"an earlier run of {output.uri} was finished but not uploaded, and is in {output.directory}: "
                f"pass --resume to upload it, or --overwrite to start over"
            )
        with _as_config_errors():
            storage.require_writable(output.uri, overwrite)
        yield output.directory
        _upload(output.directory, output.uri, overwrite, note)


@contextmanager
def fetch_output(uri: str) -> Iterator[Path]:
    """Fetch a copy of an output from a store for a command that reads it; upload the journals that changed.

    Raises:
        ConfigError: The output is missing or incomplete, or a journal cannot be uploaded.
    """
    with _as_config_errors():
        fetched = storage.fetch_directory(uri)
    if not is_marked(fetched):
        raise ConfigError(f"{uri} is incomplete (it has no {MARK}): upload it again with --resume, or prune again")
    if damage := find_damage(fetched):
        raise ConfigError(f"{uri} is damaged: {damage}; upload it again, or prune again")
    with (
        TemporaryDirectory(dir=fetched.parents[1]) as folder,
        storage.naming_uri(uri, copy := Path(folder) / fetched.name, ConfigError, InputError, TrackingError),
    ):
        # Journals are copied, because they are written to; the fetched files must not change.
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
    """Hold the lock for uploads to a URI; at the end remove the folder if only the lock is left in it."""
    holder = directory.parent / "holder"
    with hold_lock(holder, uri):
        try:
            yield
        finally:
            if list(directory.parent.iterdir()) == [holder]:
                shutil.rmtree(directory.parent)


@contextmanager
def _as_config_errors() -> Iterator[None]:
    """Turn a store's error into a ConfigError: nothing is computed yet, and the user can fix it."""
    try:
        yield
    except storage.StorageError as error:
        raise ConfigError(str(error)) from error


def _upload(directory: Path, uri: str, overwrite: bool, note: Callable[[str], None]) -> None:
    """Upload a complete output, then remove the local copy."""
    sizes = [path.stat().st_size for path in directory.rglob("*") if path.is_file()]
    note(f"uploading {len(sizes)} files, {sum(sizes) / 1e6:,.1f} MB, to {uri}")
    waits = f"the complete output is in {directory}: run the same command with --resume to upload it"
    try:
        if kept := storage.upload_directory(uri, directory, MARK, overwrite):
            note(f"{kept} of them were there already")
    except storage.StorageError as error:
        raise DeliveryError(f"{error}; {waits}") from error
    except BaseException as error:
        error.add_note(waits)
        raise
    shutil.rmtree(directory)


def checkpoints_output(config: PruneConfig, name: str) -> Destination:
    """Return where a model's checkpoints go: by default pruned/<model>-<sparsity>."""
    return Destination.of(config.output or f"pruned/{name}-{sparsity_label(config)}")


def moments_output(config: PruneConfig, name: str) -> Destination:
    """Return where a model's moments go: by default moments/<model>."""
    return Destination.of(config.output or f"moments/{name}")


def sparsity_label(config: PruneConfig) -> str:
    """Return the sparsity or ratio as it appears in the names of outputs and runs."""
    if config.ratio is not None:
        return f"ratio-{config.ratio:g}"
    return "-".join(f"{sparsity:g}" for sparsity in config.targets)
