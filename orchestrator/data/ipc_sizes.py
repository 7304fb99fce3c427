"""Says how large the batches of an Arrow file are when they are decompressed, without decompressing them.

A batch's message begins with a flatbuffer that lists its buffers, and a compressed buffer begins with its own size
(https://arrow.apache.org/docs/format/Columnar.html). Arrow itself reads a batch whole, and offers no size before.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

MAGIC = b"ARROW1\0\0"
# The numbers of the fields in Arrow's tables.
HEADER = 2
BUFFERS, COMPRESSION = 2, 3
OF_DICTIONARY = 1
# The kinds of messages that have a body.
DICTIONARY, RECORDS = "dictionary", "record batch"


def size_of_batches(path: Path) -> Iterator[tuple[int, int]]:
    """Yield the size of each batch and dictionary in a file or stream, as stored and as read.

    Raises:
        pa.ArrowInvalid, struct.error: It is broken.
    """
    with pa.memory_map(str(path)) as file:
        if file.read(len(MAGIC)) != MAGIC:
            file.seek(0)
        while (message := _next_message(file)) is not None:
            if message.type in (DICTIONARY, RECORDS):
                yield message.body.size if message.body else 0, _size_read(message)


def _next_message(file: pa.NativeFile) -> pa.ipc.Message | None:
    # A stream may end without a mark of its end.
    try:
        return pa.ipc.read_message(file)
    except EOFError:
        return None


def _size_read(message: pa.ipc.Message) -> int:
    """Return how many bytes a batch's buffers take when they are decompressed."""
    table = _Table.root(message.metadata.to_pybytes()).table(HEADER)
    if message.type == DICTIONARY and table is not None:
        table = table.table(OF_DICTIONARY)
    if table is None or table.place(COMPRESSION) is None or message.body is None:
        return message.body.size if message.body else 0
    body, total = memoryview(message.body), 0
    for offset, length in table.pairs(BUFFERS):
        if length:
            (size,) = struct.unpack_from("<q", body, offset)
            # -1 stands for a buffer that was not worth compressing.
            total += length if size < 0 else size
    return total


class _Table:
    """A table of a flatbuffer, read by the numbers of its fields."""

    def __init__(self, data: bytes, start: int) -> None:
        self._data, self._start = data, start

    @classmethod
    def root(cls, data: bytes) -> "_Table":
        """Return the table that a flatbuffer begins with."""
        return cls(data, struct.unpack_from("<I", data)[0])

    def place(self, field: int) -> int | None:
        """Return where a field is stored; None if it is not."""
        entries = self._start - struct.unpack_from("<i", self._data, self._start)[0]
        (size,) = struct.unpack_from("<H", self._data, entries)
        entry = 4 + 2 * field
        offset = struct.unpack_from("<H", self._data, entries + entry)[0] if entry < size else 0
        return self._start + offset if offset else None

    def table(self, field: int) -> "_Table | None":
        """Return the table that a field leads to."""
        place = self.place(field)
        return None if place is None else _Table(self._data, place + struct.unpack_from("<I", self._data, place)[0])

    def pairs(self, field: int) -> Iterator[tuple[int, int]]:
        """Yield the pairs of numbers of 64 bits in a field's vector."""
        place = self.place(field)
        if place is not None:
            place += struct.unpack_from("<I", self._data, place)[0]
            (count,) = struct.unpack_from("<I", self._data, place)
            for number in range(count):
                yield struct.unpack_from("<qq", self._data, place + 4 + 16 * number)
