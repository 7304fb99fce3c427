"""Uses private interfaces of Ray. tests/cluster/test_ray_private.py says what we expect of each name.

`JobClient` in job_client.py and `OwnPaths` in driver_paths.py also override a private method of Ray, and local_ray.py
starts a Ray with the help of private names. Ray is imported only when it is used.
"""

from typing import Any

# Loggers that report every uploaded package and every closed connection.
CHATTY = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging")
# A program that fails unless a Ray of this release answers at the address that it is given, and lets us in. Ray's own
# command does the same, and imports all other commands first, which takes seconds.
HEALTH_CHECK = """
import sys
import ray
from ray._common.usage.usage_lib import get_cluster_metadata
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray._raylet import GcsClient

theirs = get_cluster_metadata(GcsClient(address=canonicalize_bootstrap_address_or_die(sys.argv[1])))["ray_version"]
if theirs != ray.__version__:
    sys.exit(f"Ray version mismatch: cluster has Ray version {theirs} but local Ray version is {ray.__version__}")
"""


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
