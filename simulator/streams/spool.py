"""Arrays of a whole run put aside in order: in memory while they are few, on disk beyond, so that memory stays bounded."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Hashable, Iterator
from threading import Lock

import numpy as np

from simulator.policy import ExpertStream

COLUMNS = ("cell_forward", "cell_layer", "offsets", "experts", "tokens", "last_touch")

# What a spool keeps in memory before it moves to a nameless temporary file.
IN_MEMORY = 1 << 25


class Spool:
    """Tables, each a dict of one-dimensional arrays, by key, in the order they were put."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115
        self._lock = Lock()
        self._end = 0
        self._found: dict[Hashable, list[dict[str, tuple[int, int, np.dtype]]]] = {}
        # The disk space goes with the spool, closed or not.
        weakref.finalize(self, self._file.close)

    def put(self, key: Hashable, table: dict[str, np.ndarray]) -> None:
        """Append a table; may be called from several threads, for one key from one at a time."""
        columns = {name: np.ascontiguousarray(column) for name, column in table.items()}
        with self._lock:
            places = {}
            for name, column in columns.items():
                places[name] = (self._end, len(column), column.dtype)
                self._file.seek(self._end)
                self._file.write(column.view(np.uint8).data)
                self._end += column.nbytes
        self._found.setdefault(key, []).append(places)

    def tables(self, key: Hashable) -> Iterator[dict[str, np.ndarray]]:
        """The tables of a key in order, read one at a time."""
        for places in self._found.get(key, []):
            columns = {}
            for name, (start, length, dtype) in places.items():
                # Filled in place: a read-only array would have every kernel compiled once more.
                columns[name] = np.empty(length, dtype)
                with self._lock:
                    self._file.seek(start)
                    self._file.readinto(columns[name].view(np.uint8).data)
            yield columns

    def close(self) -> None:
        """Give the space back."""
        self._file.close()


class StreamSpool(Spool):
    """Streams by key, for policies that look at all of them first."""

    def put_stream(self, key: Hashable, stream: ExpertStream) -> None:
        """Append a stream."""
        self.put(key, {name: getattr(stream, name) for name in COLUMNS})

    def streams(self, key: Hashable) -> Iterator[ExpertStream]:
        """The streams of a key in order, read one at a time."""
        for table in self.tables(key):
            yield ExpertStream(**table)
