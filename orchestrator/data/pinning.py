"""Finds the commit of data on the hub, so that a run reads one version of it and its record names that version."""

from orchestrator.data.blocks import DataError
from orchestrator.data.files import HUB_NAME, local_file
from orchestrator.data.forms import SUFFIXES
from orchestrator.sources import hub, storage


def pin(spec: str) -> str | None:
    """Return a spec of the hub with the commit that it has now; None for any other spec, and in offline mode.

    Raises:
        DataError: The hub has no such dataset, file or revision, or does not answer.
    """
    try:
        if storage.is_uri(spec):
            pinned, commit = hub.pin_uri(spec) if hub.is_hub_uri(spec) else (spec, None)
            return pinned if commit else None
        if spec.startswith("builtin:") or local_file(spec) is not None:
            return None
        return _pinned_name(spec)
    except hub.HubError as error:
        raise hub_error(spec, error) from error


def _pinned_name(spec: str) -> str | None:
    match = HUB_NAME.fullmatch(spec)
    assert match is not None  # local_file refuses other names
    commit = hub.find_commit(match["name"], match["revision"])
    return f"{match['name']}@{commit}{match['rest']}" if commit else None


def hub_error(spec: str, error: hub.HubError) -> DataError:
    """Return the error for a spec that is no file here, and that the hub does not provide."""
    if storage.is_uri(spec):
        return DataError(f"{spec}: the hub did not provide it ({error}): check the URI and the network")
    return DataError(
        f"{spec}: no such file, and the Hugging Face hub did not provide such a dataset "
        f"({error}): give a local file ({', '.join(SUFFIXES)}), or use builtin:calibration"
    )
