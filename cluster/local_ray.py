"""Starts a Ray on this machine for one run alone: on the loopback interface, in a private folder, with its own token.

Ray's own `init` listens on all interfaces of Linux, and opens its folder to everyone. Ray has no public setting against
either, so this module, and no other, uses what it has inside. tests/cluster/test_local_ray.py checks what comes of it.
"""

import ipaddress
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from cluster.errors import ClusterError
from cluster.signals import sigterm_handler_kept
from cluster.sockets import PREFIX, SUBFOLDER, temporary_folder

# If all CPUs are taken, as in a run, Ray ends an idle process after one second. Then almost every solve would wait for
# a new process to start and import torch.
LOCAL_RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_idle_worker_killing_time_threshold_ms": "60000"}
# With this, Ray takes the loopback address for that of its node, as it does on other systems than Linux.
ONE_MACHINE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
TOKEN = "token"
TOKEN_BYTES = 32


@contextmanager
def local_ray(**settings: Any) -> Iterator[None]:
    """Start a Ray for as long as the context lasts.

    Args:
        settings: Settings of `ray.init`.

    Raises:
        ClusterError: Its folder cannot be made, or this release of Ray would listen to other machines.
    """
    with private_folder() as folder:
        try:
            with sigterm_handler_kept(), private_settings(folder):
                # "local" starts a new Ray, while None would join the one that last ran on this machine.
                ray.init("local", include_dashboard=False, _temp_dir=str(folder / SUBFOLDER), **settings)
            _require_loopback()
            yield
        finally:
            # Also if Ray has only begun to start.
            ray.shutdown()
            _reload()


@contextmanager
def private_folder() -> Iterator[Path]:
    """Make a folder that only this user can enter, with a new token in it; delete it with the context.

    Raises:
        ClusterError: It cannot be made.
    """
    root = temporary_folder()
    try:
        # With mode 0700, and a name that nobody can guess. Ray opens the folder that it is given to everyone, so it is
        # given one inside.
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
    except OSError as error:
        raise ClusterError(
            f"no folder for Ray's files can be made in {root} ({error.strerror}): set RAY_TMPDIR to a folder with room"
        ) from error
    try:
        (folder / TOKEN).touch(mode=0o600, exist_ok=False)
        (folder / TOKEN).write_text(secrets.token_hex(TOKEN_BYTES))
        yield folder
    finally:
        # Ray's processes may still write their last lines.
        for _ in range(2):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def private_settings(folder: Path) -> Iterator[None]:
    """Let Rays and clients that start in the context use the loopback address and the token of a private folder.

    This process keeps the token; its variables are then as before, so that what it starts has them unchanged.
    """
    variables = _private_variables(folder)
    before = {name: os.environ.get(name) for name in variables}
    several_machines = ray_constants.ENABLE_RAY_CLUSTER
    try:
        _set(variables)
        # Ray reads ONE_MACHINE when it is imported.
        ray_constants.ENABLE_RAY_CLUSTER = False
        _reload()
        yield
    finally:
        _set(before)
        ray_constants.ENABLE_RAY_CLUSTER = several_machines


def _private_variables(folder: Path) -> dict[str, str | None]:
    """Return the variables of a private Ray; None for those that it must not have."""
    by_default = {name: os.environ.get(name, value) for name, value in LOCAL_RAY.items()}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / TOKEN), "RAY_AUTH_TOKEN": None}
    return {**by_default, **token, ONE_MACHINE: "0"}


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _reload() -> None:
    """Let Ray read its settings and its token again, in this order: a thread that still ends may ask for the token."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _require_loopback() -> None:
    """Refuse a Ray that other machines can reach."""
    addresses = [str(node["NodeManagerAddress"]) for node in ray.nodes()]
    if others := [one for one in addresses if not ipaddress.ip_address(one).is_loopback]:
        raise ClusterError(
            f"Ray {ray.__version__} listens on {others[0]}, where other machines can reach it: install a release that "
            f"slimllm knows (constraints.txt), or pass --local"
        )
