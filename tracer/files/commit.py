"""Segments on disk: a background thread that encodes, compresses, syncs and renames."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tracer.errors import UserError
from tracer.files.buffer import OpenSegment
from tracer.files.encode import segment_tables
from tracer.files.parts import part_path
from tracer.files.slots import SlotMemory
from tracer.meta import sync_folder

# a segment exists when its forwards part does, so that part is renamed last
COMMIT_ORDER = ("requests", "tokens", "routing", "forwards")
PAGE_BYTES = 8 << 20
DELTA, PLAIN, RLE, SPLIT = "DELTA_BINARY_PACKED", "PLAIN", "RLE", "BYTE_STREAM_SPLIT"
# token ids repeat from call to call, which zstd finds in plain pages; strings go by dictionary, which is RLE and for states not
# smaller but slower than deltas
ENCODINGS = {
    "forward_id": DELTA,
    "row": DELTA,
    "position": DELTA,
    "state": DELTA,
    "layer": DELTA,
    "num_tokens": DELTA,
    "row_start": DELTA,
    "request_id": DELTA,
    "block": DELTA,
    "step": DELTA,
    "kv_tokens": DELTA,
    "duration_ns": DELTA,
    "accepted": RLE,
    "confidence": SPLIT,
}
DICTIONARY = ("kind", "stop_reason", "dataset")


def temporary_path(path: Path, table: str, number: int) -> Path:
    """Name a part has until it is complete and synced."""
    return path / table / f".part-{number:05d}.parquet.tmp"


def write_part(path: Path, table: str, number: int, groups: Iterator[pa.Table]) -> int:
    """Write one part to its temporary name and sync it; returns its bytes. ``groups`` holds one table a row group."""
    first = next(groups)
    schema = first.schema
    encodings = {f.name: ENCODINGS.get(f.name, PLAIN) for f in schema if f.name not in DICTIONARY}
    temporary = temporary_path(path, table, number)
    # Arrow writes to a file of its own without a copy and without the GIL; Python's handle is there to sync it.
    with open(temporary, "wb") as file:
        with (
            pa.OSFile(os.fspath(temporary), "wb") as sink,
            pq.ParquetWriter(
                sink,
                schema,
                compression="zstd",
                compression_level=1,
                use_dictionary=[name for name in schema.names if name in DICTIONARY],
                column_encoding=encodings,
                data_page_size=PAGE_BYTES,
                # minima of binary cells would copy whole cells into the footer
                write_statistics=[f.name for f in schema if not pa.types.is_binary(f.type)],
                write_page_checksum=True,
            ) as writer,
        ):
            writer.write_table(first, max(1, first.num_rows))
            for group in groups:
                writer.write_table(group, max(1, group.num_rows))
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def commit_segment(path: Path, number: int, segment: OpenSegment, memory: SlotMemory) -> int:
    """Write a segment's parts so that it is there whole or not at all; returns their bytes."""
    tables = segment_tables(segment, memory)
    order = [table for table in COMMIT_ORDER if table in tables]
    try:
        written = sum(write_part(path, table, number, tables[table]) for table in order)
        for table in order:
            os.replace(temporary_path(path, table, number), part_path(path, table, number))
            sync_folder(path / table)
    except BaseException:
        for table in order:
            temporary_path(path, table, number).unlink(missing_ok=True)
        raise
    return written


class Committer:
    """Commits segments in the background, in order, with a bound on the bytes that wait.

    Parameters
    ----------
    path : Path
    next_part : int
        Number of the first part to write.
    max_bytes : int
        Buffered bytes, those of the segment being filled included, above which :meth:`make_room` waits.
    """

    def __init__(self, path: Path, next_part: int, max_bytes: int) -> None:
        self.path = path
        self.bytes_written = 0
        self._next_part = next_part
        self._max_bytes = max_bytes
        self._waiting: deque[OpenSegment] = deque()
        self._waiting_bytes = 0
        self._finished = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="trace-writer", daemon=True)
        self._thread.start()

    def submit(self, segment: OpenSegment) -> None:
        """Hand a segment over; it must not be changed afterwards."""
        with self._changed:
            self._waiting.append(segment)
            self._waiting_bytes += segment.num_bytes
            self._changed.notify_all()

    def make_room(self, num_bytes: int) -> None:
        """Wait until ``num_bytes`` more fit beside what waits, or nothing waits; raises what went wrong in the thread."""
        # what waits can only become less meanwhile
        if self._error is None and self._waiting_bytes + num_bytes <= self._max_bytes:
            return
        with self._changed:
            self._changed.wait_for(
                lambda: self._error or not self._waiting_bytes or self._waiting_bytes + num_bytes <= self._max_bytes
            )
        self.raise_error()

    def finish(self) -> None:
        """Commit what waits and stop the thread; raises what went wrong in it."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()
        self._thread.join()
        self.raise_error()

    def raise_error(self) -> None:
        """Raise the thread's failure, if it failed, as a UserError."""
        if isinstance(self._error, UserError):
            raise UserError(f"{self.path}: recording stopped, {self._error}") from self._error
        if self._error is not None:
            reason = str(self._error).rstrip(".") or type(self._error).__name__
            raise UserError(f"{self.path} cannot be written any more: {reason}.") from self._error

    def _run(self) -> None:
        memory = SlotMemory()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._finished)
                if not self._waiting:
                    return
                segment = self._waiting[0]
            try:
                self.bytes_written += commit_segment(self.path, self._next_part, segment, memory)
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._waiting.clear()
                    self._changed.notify_all()
                return
            self._next_part += 1
            with self._changed:
                self._waiting.popleft()
                self._waiting_bytes -= segment.num_bytes
                self._changed.notify_all()
            del segment
