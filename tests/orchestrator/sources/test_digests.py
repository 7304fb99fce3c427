"""A file is the same as a store's copy if its size and the digest that the store tells of it are."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.sources.storage.digests import is_same

# Of "hello" and the end of a line, by md5sum, sha256sum and git hash-object.
MD5 = "b1946ac92492d2347c6235b4d2611184"
SHA256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
GIT = "ce013625030ba8dba906f756967f9e9ca394464a"


@pytest.mark.parametrize(
    ("told", "same"),
    [
        ({"ETag": f'"{MD5}"'}, True),
        ({"ETag": f'"{MD5}"', "size": 7}, False),
        ({"ETag": f'"{MD5[::-1]}"'}, False),
        ({"ETag": f'"{MD5}-1"'}, False),
        # A web server's or Azure's, which says nothing of the content.
        ({"ETag": '"0x8D"', "etag": "CJ="}, False),
        ({"md5Hash": "sZRqySSS0jR8YjW00mERhA==", "etag": "CJ="}, True),
        ({"md5Hash": "AZRqySSS0jR8YjW00mERhA=="}, False),
        ({"blob_id": GIT, "lfs": None}, True),
        ({"blob_id": GIT[::-1], "lfs": None}, False),
        ({"blob_id": "of its pointer", "lfs": {"sha256": SHA256, "size": 6}}, True),
        ({"blob_id": GIT, "lfs": {"sha256": SHA256[::-1], "size": 6}}, False),
        ({"mtime": 1.0}, False),
        ({"size": None}, False),
    ],
)
def test_a_copy_is_the_same_by_the_digest_that_its_store_tells(
    tmp_path: Path, told: dict[str, Any], same: bool
) -> None:
    (tmp_path / "file").write_text("hello\n")
    assert is_same(tmp_path / "file", {"size": 6} | told) is same
