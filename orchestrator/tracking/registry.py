"""Registers a run's checkpoint as a version of a registered model, with an alias to load it by."""

import re
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit


class Registry:
    """MLflow's model registry, for one run. Every method raises what MLflow raises.

    If the run was found again, its versions may exist already; none is created twice.
    """

    def __init__(self, client: Any, uri: str, run_id: str, found_again: bool) -> None:
        self._client, self._uri, self._run_id, self._found_again = client, uri, run_id, found_again

    def register(self, model_id: str, name: str, checkpoint: dict[str, Any]) -> str:
        """Make a logged model a version of a registered model, which is created if it is missing.

        Args:
            model_id: The logged model.
            name: The registered model.
            checkpoint: The journal's event, which has the version's alias, tags and description.

        Returns:
            The version.
        """
        version = self._find(model_id, name) or self._create(model_id, name, checkpoint)
        if alias := alias_of(checkpoint):
            self._move_forward(name, alias, version)
        return version

    def has(self, model_id: str, name: str, checkpoint: dict[str, Any]) -> bool:
        """Return whether an earlier attempt registered a logged model, and some version has the alias."""
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
        # A database does not store the model's id with the version, but the source always contains it.
        found = [version for version in versions if version.name == name and model_id in version.source]
        return str(found[0].version) if found else None

    def _move_forward(self, name: str, alias: str, version: str) -> None:
        # A run that is resumed or logged late must not take the alias from a newer version.
        holder = self._client.get_registered_model(name).aliases.get(alias, 0)
        if int(holder) < int(version):
            self._client.set_registered_model_alias(name, alias, version)


def alias_of(checkpoint: dict[str, Any]) -> str | None:
    """Return the alias of a journal's checkpoint in the form MLflow accepts: sparsity-0.20 becomes sparsity-0-20."""
    alias = checkpoint.get("alias")
    return alias and re.sub(r"[^\w-]", "-", alias)
