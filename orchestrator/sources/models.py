"""Finds a model's directory: the built-in one, a local one, or one fetched from a store or the hub at one commit."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator import builtin
from orchestrator.sources import hub, storage
from slimllm_ops.errors import CheckpointError, InputError, shown

DOWNLOADED = (
    *("*.safetensors", "*.json", "tokenizer*", "*.txt", "*.jinja", "*.model", "*.tiktoken", "*.vocab", "*.bpe"),
    *("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "*POLICY*"),
)


@dataclass(frozen=True)
class Model:
    """A model's directory on this machine.

    Attributes:
        directory: The directory.
        revision: The commit of the hub that the files are of; None for other models.
        settings: The settings that name this commit, in place of those that the user gave.
    """

    directory: Path
    revision: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)


def resolve_model(model: str | None, revision: str | None = None) -> Model:
    """Return a model's directory, fetched if it is not on this machine.

    Args:
        model: A directory, a URI or a hub id; None for the built-in model.
        revision: The branch, tag or commit of a hub id; None for its main branch.

    Raises:
        CheckpointError: There is no such directory, and the store or the hub cannot provide it.
        InputError: A revision is given for a model that is not named by a hub id.
    """
    if model is None:
        return Model(builtin.MODEL_DIR)
    if storage.is_uri(model):
        _require_no_revision(model, revision, "is a URI (the hub's take it in themselves, as hf://OWNER/NAME@REVISION)")
        return _fetched(model)
    if not is_hub_id(model):
        _require_no_revision(model, revision, "is a path")
        # The path must be absolute: workers have other working directories.
        return Model(Path(model).expanduser().absolute())
    try:
        directory = hub.download_model(model, DOWNLOADED, revision)
    except hub.HubError as error:
        asked = "the name" if revision is None else f"the name, the revision {revision}"
        raise CheckpointError(
            f"{model} is not a local directory, and the hub could not provide it ({error}): "
            f"check {asked} and the network, or pass the directory of a downloaded model"
        ) from error
    commit = hub.commit_of(directory)
    return Model(directory, commit, {"revision": commit})


def is_hub_id(model: str) -> bool:
    """Return whether a model is named by a hub id, and not by a path or a URI.

    Raises:
        CheckpointError: It is a path that cannot be read.
    """
    try:
        is_path = Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") != 1
        if is_path:
            Path(model).expanduser()
    # Path.expanduser raises RuntimeError if "~name" is not a user's home.
    except (OSError, RuntimeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise CheckpointError(f"model {shown(model)} is not a readable path ({reason}): check it") from error
    return not is_path and not storage.is_uri(model)


def _fetched(uri: str) -> Model:
    """Return a local copy of a URI's directory; one of the hub is fetched at one commit."""
    pinned, revision = uri, None
    try:
        if hub.is_hub_uri(uri):
            pinned, revision = hub.pin_uri(uri)
        directory = storage.fetch_directory(pinned, DOWNLOADED)
    except hub.HubError as error:
        raise CheckpointError(
            f"model {uri}: the hub could not provide it ({error}): check the URI and the network"
        ) from error
    except storage.StorageError as error:
        raise CheckpointError(f"model {error}") from error
    return Model(directory, revision, {} if revision is None else {"model": pinned})


def _require_no_revision(model: str, revision: str | None, kind: str) -> None:
    if revision is not None:
        raise InputError(
            f"revision {shown(revision)} is of a model that is named by its hub id, OWNER/NAME, and {shown(model)} "
            f"{kind}: leave the revision out"
        )
