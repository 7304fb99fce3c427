"""Compares a local file with what a store reports of its copy, so that an upload sends only what is missing.

A file that a store has no digest of, or a digest that nobody can compute here, counts as different.

    S3      ETag        the MD5 digest; of an upload in parts, that of the parts' digests, and their number
    GCS     md5Hash     the MD5 digest, in base64
    hub     lfs.sha256  the SHA-256 digest of a large file
            blob_id     git's digest of another
"""

import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.sources import watched_process

# The size of the parts that s3fs sends; a file of less than two is sent whole.
PART_BYTES = 50 * 2**20
_ETAG = re.compile(r'"?([0-9a-f]{32})(?:-(\d+))?"?')


def is_same(file: Path, info: dict[str, Any]) -> bool:
    """Return whether a store's copy of a file has the same size and the same digest.

    Args:
        file: The local file.
        info: The store's details of its copy.
    """
    if info["size"] != file.stat().st_size:
        return False
    if lfs := info.get("lfs"):
        return bool(lfs["sha256"] == _digest(file, "sha256").hexdigest())
    if (blob_id := info.get("blob_id")) is not None:
        return bool(blob_id == _digest(file, "sha1", b"blob %d\0" % file.stat().st_size).hexdigest())
    if (md5 := info.get("md5Hash")) is not None:
        return bool(md5 == base64.b64encode(_digest(file, "md5").digest()).decode())
    if etag := _ETAG.fullmatch(str(info.get("ETag"))):
        return etag[1] == (_digest_of_parts(file) if etag[2] else _digest(file, "md5").hexdigest())
    return False


def _digest(file: Path, algorithm: str, prefix: bytes = b"") -> "hashlib._Hash":
    digest = hashlib.new(algorithm, prefix, usedforsecurity=False)
    for part in _parts(file):
        digest.update(part)
    return digest


def _digest_of_parts(file: Path) -> str:
    digests = (hashlib.md5(part, usedforsecurity=False).digest() for part in _parts(file))
    return hashlib.md5(b"".join(digests), usedforsecurity=False).hexdigest()


def _parts(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while part := opened.read(PART_BYTES):
            yield part
            watched_process.give_sign_of_life()
