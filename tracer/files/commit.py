"""Segments on disk: a background thread that encodes, compresses, syncs and renames."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tracer.errors import UserError
from tracer.files.buffer import OpenSegment
from tracer.files.encode import segment_tables
from tracer.files.footer import FOOTER_KEY, UNSEALED, seal_footer
from tracer.files.slots import SlotMemory
from tracer.meta import sync_folder

# a segment exists when its forwards part does, so that part is renamed last
COMMIT_ORDER = ("requests", "tokens", "routing", "scores", "forwards")
# a page and what it unpacks to stay in the processor's second cache: read a third faster than pages of megabytes
PAGE_BYTES = 256 << 10
DELTA, PLAIN, RLE, SPLIT = "DELTA_BINARY_PACKED", "PLAIN", "RLE", "BYTE_STREAM_SPLIT"
# Encodings that pyarrow, polars and DuckDB all read. Token ids repeat from call to call, which zstd finds in plain pages;
# strings go by dictionary, and a layer, which is one number a row group.
ENCODINGS = {
    **dict.fromkeys(("forward_id", "row", "position", "state", "num_tokens", "row_start"), DELTA),
    **dict.fromkeys(("request_id", "block", "step", "kv_tokens", "duration_ns"), DELTA),
    **dict.fromkeys(("accepted", "edited"), RLE),
    "confidence": SPLIT,
}
# What a writer adds when told to be compact: 0.14 bytes less an id with its weight, read by pyarrow alone.
COMPACT = {"gate_weights": SPLIT, "router_scores": SPLIT}
DICTIONARY = ("kind", "stop_reason", "dataset", "layer")


def part_name(number: int) -> str:
    """Name of the part the writer writes as its ``number``-th."""
    return f"part-{number:05d}.parquet"


def temporary_path(path: Path, table: str, name: str) -> Path:
    """Name a part has until it is complete and synced."""
    return path / table / f".{name}.tmp"


def write_part(path: Path, table: str, name: str, groups: Iterator[pa.Table], compact: bool = False) -> int:
    """Write one part to its temporary name and sync it; returns its bytes. ``groups`` holds one table a row group."""
    first = next(groups)
    schema = first.schema
    chosen = ENCODINGS | (COMPACT if compact else {})
    encodings = {f.name: chosen.get(f.name, PLAIN) for f in schema if f.name not in DICTIONARY}
    # minima of binary values would copy them into the footer
    numbers = [f.name for f in schema if not pa.types.is_fixed_size_binary(f.type) and not pa.types.is_binary(f.type)]
    temporary = temporary_path(path, table, name)
    with pq.ParquetWriter(
        temporary,
        schema,
        compression="zstd",
        # level 3 makes ids 6% smaller and takes twice the time; weights and scores do not gain
        compression_level=1,
        use_dictionary=[name for name in schema.names if name in DICTIONARY],
        column_encoding=encodings,
        data_page_size=PAGE_BYTES,
        write_statistics=numbers,
        write_page_checksum=True,
    ) as writer:
        for group in itertools.chain([first], groups):
            writer.write_table(group, max(1, group.num_rows))
        writer.add_key_value_metadata({FOOTER_KEY: UNSEALED})
    seal_footer(temporary)
    return temporary.stat().st_size


def put_part(path: Path, table: str, name: str) -> None:
    """Give a part that was written its own name."""
    os.replace(temporary_path(path, table, name), path / table / name)
    sync_folder(path / table)


def commit_segment(path: Path, number: int, segment: OpenSegment, memory: SlotMemory, compact: bool) -> int:
    """Write a segment's parts so that it is there whole or not at all; returns their bytes."""
    tables, name = segment_tables(segment, memory), part_name(number)
    order = [table for table in COMMIT_ORDER if table in tables]
    try:
        written = sum(write_part(path, table, name, tables[table], compact) for table in order)
        for table in order:
            put_part(path, table, name)
    except BaseException:
        for table in order:
            temporary_path(path, table, name).unlink(missing_ok=True)
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
    compact : bool
        Write the encodings :data:`COMPACT`.
    """

    def __init__(self, path: Path, next_part: int, max_bytes: int, compact: bool) -> None:
        self.path, self.next_part, self.bytes_written = path, next_part, 0
        self._max_bytes, self._compact = max_bytes, compact
        self._memory = SlotMemory()
        self._error: BaseException | None = None
        self._thread = ThreadPoolExecutor(1, "trace-writer")
        # the segment on its way to the disk, and its bytes
        self._pending: tuple[Future[None], int] | None = None

    def submit(self, segment: OpenSegment) -> None:
        """Hand a segment over; it must not be changed afterwards."""
        self._pending = self._thread.submit(self._commit, segment), segment.num_bytes

    def _commit(self, segment: OpenSegment) -> None:
        # what comes after a failure would leave a gap
        if self._error is None:
            try:
                self.bytes_written += commit_segment(self.path, self.next_part, segment, self._memory, self._compact)
                self.next_part += 1
            except BaseException as error:
                self._error = error

    def make_room(self, num_bytes: int, for_segment: bool) -> None:
        """Wait until ``num_bytes`` more fit beside the segment on its way, or none is; raises what went wrong in the thread.

        ``for_segment``: a segment will be handed over, so that the one before has to be on disk: a kill loses no more.
        """
        if self._pending is not None:
            future, size = self._pending
            if for_segment or future.done() or num_bytes + size > self._max_bytes:
                future.result()
                self._pending = None
        self.raise_error()

    def finish(self) -> None:
        """Commit what waits and stop the thread; raises what went wrong in it."""
        self._thread.shutdown()
        self.raise_error()

    def raise_error(self) -> None:
        """Raise the thread's failure, if it failed, as a UserError."""
        if isinstance(self._error, UserError):
            raise UserError(f"{self.path}: recording stopped, {self._error}") from self._error
        if self._error is not None:
            why = str(self._error).rstrip(".") or type(self._error).__name__
            raise UserError(f"{self.path} cannot be written any more: {why}.") from self._error
