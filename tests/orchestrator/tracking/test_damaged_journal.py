"""A journal is read up to its first bad line, as a power cut leaves one, and continues from there."""

from pathlib import Path

import pytest

from orchestrator.tracking import TrackingOptions, tracked_run
from orchestrator.tracking.journal import Journal

GOOD = b'{"event": "metrics", "time": 1, "step": 0}\n'
LATER = b'{"event": "metrics", "time": 2, "step": 1}\n'
BAD = {
    "NULs": bytes(80) + b"\n",
    "NULs in a line": b'{"event": "met' + bytes(20) + b"\n",
    "torn": b'{"event": "met\n',
    "no text": b"\xff\xfe\n",
    "no event": b"[1]\n",
    "deep": b"[" * 100_000 + b"\n",
    "a long number": b'{"event": "a", "time": ' + b"1" * 5000 + b"}\n",
}


@pytest.mark.parametrize("bad", BAD.values(), ids=list(BAD))
@pytest.mark.parametrize("after", [b"", LATER])
def test_what_follows_a_bad_line_does_not_count(tmp_path: Path, bad: bytes, after: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD + bad + after)
    assert [event["step"] for event in Journal.read(path)] == [0]
    assert path.read_bytes() == GOOD + bad + after, "reading changes nothing"
    with tracked_run(TrackingOptions(tracking_uri="none"), path) as run:
        run.log_metrics({"a": 1}, step=7)
    assert [event.get("step") for event in Journal.read(path)] == [0, None, 7, None]


@pytest.mark.parametrize(
    "content", [bytes(80), bytes(80) + b"\n" + LATER, b'{"ev', b"", b'{"event"' + bytes(9) + b"\n"]
)
def test_a_journal_that_is_lost_whole_begins_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    with tracked_run(TrackingOptions(tracking_uri="none"), path):
        pass
    assert [event["event"] for event in Journal.read(path)] == ["start", "end"]
