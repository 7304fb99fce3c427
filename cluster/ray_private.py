"""Uses private interfaces of Ray. tests/cluster/test_ray_private.py says what we expect of each name.

`JobClient` in job_client.py and `OwnPaths` in driver_paths.py also override a private method of Ray, and local_ray.py
starts a Ray with the help of private names. Ray is imported only when it is used.
"""

from typing import Any

# The module of the command `ray`, and loggers that report every uploaded package and every closed connection.
COMMAND_MODULE = "ray.scripts.scripts"
CHATTY = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging")


def find_local_head() -> str | None:
    """Return the address of the Ray that runs on this machine; None if there is none.

    Raises:
        ConnectionError: There is none.
    """
    from ray._private.services import canonicalize_bootstrap_address

    return canonicalize_bootstrap_address("auto")


def job_records() -> Any:
    """Return the store of what the job server knows of jobs. Ray must be connected."""
    from ray._private.worker import global_worker
    from ray.dashboard.modules.job.common import JobInfoStorageClient

    return JobInfoStorageClient(global_worker.gcs_client)  # type: ignore[attr-defined]


def asks_for_token() -> bool:
    """Return whether the Ray that this program is connected to asks for a token."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    return is_token_auth_enabled()
