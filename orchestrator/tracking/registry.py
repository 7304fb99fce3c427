"""The registry: a run's checkpoint as a version of a registered model, and the alias that it is loaded by."""

import re
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit


class Registry:
    """The registered models, as one run adds to them. Every method raises what MLflow raises.

    Of a run that was found again, versions may be there already; none is made twice.
    """

    def __init__(self, client: Any, uri: str, run_id: str, found_again: bool) -> None:
        self._client, self._uri, self._run_id, self._found_again = client, uri, run_id, found_again

    def register(self, model_id: str, name: str, checkpoint: dict[str, Any]) -> str:
        """Make a logged model a version of a registered model, which is made where it is missing.

        Args:
            model_id: The logged model.
            name: The registered model.
            checkpoint: The journal's event, which says what the version is called and what is known of it.
        """
        version = self._find(model_id, name) or self._create(model_id, name, checkpoint)
        if alias := alias_of(checkpoint):
            self._move_forward(name, alias, version)
        return version

    def has(self, model_id: str, name: str, checkpoint: dict[str, Any]) -> bool:
        """Whether an earlier attempt registered a logged model, and some version has the alias."""
        if self._find(model_id, name) is None:
            return False
        alias = alias_of(checkpoint)
        return alias is None or alias in self._client.get_registered_model(name).aliases

    def _create(self, model_id: str, name: str, checkpoint: dict[str, Any]) -> str:
        from mlflow.exceptions import MlflowException

        with suppress(MlflowException):
            self._client.create_registered_model(name)
        source = f"models:/{model_id}"
        if not urlsplit(self._uri).scheme.startswith(("http", "databricks")):
            # A database store resolves models:/ID by the process's global tracking URI, which is not ours.
            source = self._client.get_logged_model(model_id).artifact_location
        tags = checkpoint["params"] | checkpoint.get("measured", {})
        version = self._client.create_model_version(
            name,
            source,
            self._run_id,
            tags={key: str(value) for key, value in tags.items()},
            description=checkpoint.get("description"),
            await_creation_for=0,
            model_id=model_id,
        )
        return str(version.version)

    def _find(self, model_id: str, name: str) -> str | None:
        if not self._found_again:
            return None
        versions = self._client.search_model_versions(f"run_id = '{self._run_id}'")
        # A database keeps no id of the model with the version, but its source is of that model either way.
        found = [version for version in versions if version.name == name and model_id in version.source]
        return str(found[0].version) if found else None

    def _move_forward(self, name: str, alias: str, version: str) -> None:
        # A run that is resumed, or logged late, takes no alias from what was registered after it.
        holder = self._client.get_registered_model(name).aliases.get(alias, 0)
        if int(holder) < int(version):
            self._client.set_registered_model_alias(name, alias, version)


def alias_of(checkpoint: dict[str, Any]) -> str | None:
    """Return the alias of a journal's checkpoint as MLflow takes it: sparsity-0.20 becomes sparsity-0-20."""
    alias = checkpoint.get("alias")
    return alias and re.sub(r"[^\w-]", "-", alias)
