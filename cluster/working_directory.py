"""Prepares the folder that travels with a job, without Python code.

Ray puts a copy of the folder on the path of the job and of its workers, where a stranger's `yaml.py` could take the
place of a package. Ray's own list of files to exclude cannot help: it also holds for the packages that travel.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from cluster.errors import ClusterError

CODE = ("*.py", "*.pyc", "*.so", "*.so.*")


@contextmanager
def without_code(folder: Path) -> Iterator[Path]:
    """Make a folder of links to the files of another, except Python code, for as long as the context lasts.

    Raises:
        ClusterError: The folder is missing, or something in it is neither a file nor a folder.
    """
    if not folder.is_dir():
        raise ClusterError(f"the working directory {folder} is not there: pass a directory")
    with tempfile.TemporaryDirectory(prefix="slimllm-upload-") as made:
        for file in _files(folder.resolve()):
            link = Path(made, file.relative_to(folder.resolve()))
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
        yield Path(made)


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and its subfolders that are no code."""
    for place, folders, names in os.walk(folder, followlinks=True):
        # A link to a folder above would lead in a circle.
        folders[:] = [name for name in folders if not Path(place).is_relative_to(Path(place, name).resolve())]
        for path in (Path(place, name) for name in names):
            if path.exists() and not path.is_file():
                # Opening a pipe would block, and a device has no end.
                raise ClusterError(f"{path} is neither a file nor a folder, and cannot be uploaded: remove it")
            if path.exists() and not any(fnmatch(path.name, pattern) for pattern in CODE):
                yield path
