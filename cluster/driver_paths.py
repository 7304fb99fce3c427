"""Keeps the driver's folders off the paths that Ray's workers import from."""

import site
from pathlib import Path
from typing import Any

from ray.job_config import JobConfig

CLIENT = "ray://"


class OwnPaths(JobConfig):
    """A job whose workers import from the given folders, and not from the driver's working directory.

    Ray puts that directory first on each worker's path. A `yaml.py` in it, or an innocent folder `actors/`, would take
    the place of the package of that name. Ray adds it to this private list, and has no setting that leaves it out.
    """

    def __init__(self, *folders: Path) -> None:
        super().__init__()
        self._folders = folders

    def _serialize(self) -> str:
        self._py_driver_sys_path = list(map(str, self._folders))
        return super()._serialize()


def paths_of_a_new_ray(root: Path) -> JobConfig:
    """Return the job of a Ray on this machine.

    Args:
        root: The folder that holds this project's packages. Its workers find those that are installed without it.
    """
    installed = (*site.getsitepackages(), site.getusersitepackages())
    return OwnPaths() if str(root) in installed else OwnPaths(root)


def paths_of_a_cluster(address: str) -> dict[str, Any]:
    """Return the argument for the job of a cluster, whose workers get the packages.

    There is none for Ray's client, which adds no directory.
    """
    return {} if address.startswith(CLIENT) else {"job_config": OwnPaths()}
