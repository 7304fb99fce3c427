"""What a watched process writes is read line by line, and no line is read without end."""

import subprocess
import sys

import pytest

from orchestrator.sources import watched_process


def lines_of(program: str) -> list[bytes]:
    with subprocess.Popen([sys.executable, "-S", "-c", program], stdout=subprocess.PIPE) as process:
        try:
            return list(watched_process._lines(process, 30))
        finally:
            process.kill()


def test_lines_are_whole_however_they_come() -> None:
    program = "import os, time\nfor piece in (b'a', b'b\\n\\nc', b'\\n' + b'd' * 200_000 + b'\\n'): os.write(1, piece)"
    assert lines_of(program) == [b"ab", b"", b"c", b"d" * 200_000]


def test_a_line_without_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_process, "MOST_BYTES", 1 << 20)
    with pytest.raises(watched_process.WatchedProcessError, match="it sent a row of more than 1,048,576 bytes"):
        lines_of("import os\nwhile True: os.write(1, b'a' * 60_000)")
