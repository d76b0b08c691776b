"""Parquet parts of a trace: which exist, what their columns hold, values as NumPy arrays.

Every fault of a part is a TraceError that names table, part and, where there is one, the row. Page checksums are verified on
every read, and a column that is not as long as its row group is a fault before anything looks at it.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tracer.errors import TraceError
from tracer.files.columns import check_columns, decode, reason
from tracer.files.footer import footer_is_sealed
from tracer.schema import widths
from tracer.trace import TraceMeta

# decoded columns of row groups that are read piece by piece, kept for the pieces to come
CACHE_BYTES = 256 << 20
# a column chunk up to this size is compared with others as it is stored rather than decoded
MOST_COMPARED = 1 << 20


def part_names(path: Path, table: str) -> list[str]:
    """Files of a table in the order of names, numbers in names compared as numbers (part-2 before part-10).

    Every ``*.parquet`` file counts, but for hidden ones; anything else in the folder is ignored.
    """
    folder = path / table
    if not folder.is_dir():
        return []
    names = [entry.name for entry in folder.iterdir() if entry.suffix == ".parquet" and entry.name[0] not in "._"]
    return sorted(names, key=_natural)


def _natural(name: str) -> list[Any]:
    pieces = re.split(r"(\d+)", name)
    # The name itself last: names that differ by leading zeros alone have an order too.
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces] + [(-1, name)]


def check_part_count(path: Path, meta: TraceMeta) -> None:
    """Raise a TraceError where a finished trace has a table without parts, or of another number than its meta.json counts."""
    counts = {table: len(part_names(path, table)) for table in meta.tables if meta.complete}
    for table, parts in counts.items():
        if meta.segments not in (None, parts):
            raise TraceError(f"{path}: {table} has {parts} parts where meta.json counts {meta.segments} segments.")
    for table, parts in counts.items():
        if not parts and meta.segments != 0:
            raise TraceError(f"{path}: {table} has no parts.")


class PartFile:
    """One part of a table, opened and held to the format's columns; ``name`` is its file's. Safe to read from several threads.

    Attributes
    ----------
    groups : int64 [row groups + 1]
        Bounds of the rows of its row groups.
    sealed : bool
        Its footer is known to be what was written.

    Raises
    ------
    TraceError
        When the part is missing, is no Parquet file, is truncated, lacks a column, holds one of a foreign type or name, or
        its footer does not agree with itself.
    """

    def __init__(self, path: Path, table: str, name: str, meta: TraceMeta) -> None:
        self.path, self.table, self.name = path, table, name
        self.widths = widths(meta.model.num_experts, meta.model.top_k)
        said = f"{path}: {table} {name.removesuffix('.parquet')}"
        try:
            self._source = pa.memory_map(str(self.file))
            self.sealed = footer_is_sealed(self._source)
            # Parquet readers must not be shared between threads; opening one takes 50 microseconds
            self._idle = [pq.ParquetFile(self._source, page_checksum_verification=True)]
            self.metadata, self.schema = self._idle[0].metadata, self._idle[0].schema_arrow
            rows = [self.metadata.row_group(group).num_rows for group in range(self.metadata.num_row_groups)]
        except FileNotFoundError:
            raise TraceError(f"{said} is missing.") from None
        except (pa.ArrowException, OSError, MemoryError, ValueError) as error:
            raise TraceError(f"{said} is truncated or no Parquet file ({reason(error)}).") from None
        self.groups = np.concatenate(([0], np.cumsum(np.array(rows, np.int64))))
        check_columns(self)
        if min(rows, default=0) < 0 or self.num_rows != self.metadata.num_rows:
            raise self.fault(
                None, f"its footer counts {self.metadata.num_rows} rows and its row groups {self.num_rows}."
            )
        for group in () if self.sealed else range(self.num_groups):
            for name in self.schema.names:
                values = self.chunk(name, group).num_values
                if values != rows[group]:
                    raise self.fault(None, f"column {name} has {values} of {rows[group]} rows.")

    @property
    def file(self) -> Path:
        return self.path / self.table / self.name

    @property
    def num_rows(self) -> int:
        return int(self.groups[-1])

    @property
    def num_groups(self) -> int:
        return len(self.groups) - 1

    @property
    def present(self) -> set[str]:
        """Names of the columns it holds."""
        return set(self.schema.names)

    def fault(self, row: int | None, message: str) -> TraceError:
        """A TraceError naming table, part and row."""
        where = "" if row is None else f" row {row}"
        return TraceError(f"{self.path}: {self.table} {self.name.removesuffix('.parquet')}{where}: {message}")

    def read(self, names: list[str], group: int | None = None) -> pa.Table:
        """Columns of the part, those that it has, or of one row group; a TraceError when the bytes are damaged."""
        names = [name for name in names if name in self.present]
        try:
            reader = self._idle.pop()
        except IndexError:
            reader = pq.ParquetFile(self._source, metadata=self.metadata, page_checksum_verification=True)
        try:
            if group is None:
                table = reader.read(columns=names, use_threads=False)
            else:
                table = reader.read_row_group(group, columns=names, use_threads=False)
            # texts that are none make polars panic
            table.validate(full=True)
        except (pa.ArrowException, OSError, MemoryError) as error:
            message = f"column {', '.join(names)} cannot be read, the file is damaged ({reason(error)})."
            raise self.fault(None, message) from None
        self._idle.append(reader)
        expected = self.num_rows if group is None else int(np.diff(self.groups)[group])
        for name in names:
            length = len(table.column(name)) if name in table.column_names else -1
            if length != expected:
                raise self.fault(None, f"column {name} has {length} of {expected} rows, the file is damaged.")
        return table

    def tables(self, names: list[str]) -> Iterator[tuple[int, pa.Table]]:
        """Columns of the row groups one by one, each with the row of the part that it begins with."""
        for group in range(self.num_groups):
            yield int(self.groups[group]), self.read(names, group)

    def null_count(self, name: str) -> int:
        """Nulls of a column."""
        return sum(table.column(name).null_count for _, table in self.tables([name]))

    def arrays(self, names: list[str], group: int | None = None) -> dict[str, Any]:
        """Columns as NumPy arrays; see :func:`tracer.files.columns.decode`."""
        table, first = self.read(names, group), 0 if group is None else int(self.groups[group])
        return {name: decode(self, name, table, first) for name in names}

    def stored(self, name: str, group: int) -> tuple[Any, ...] | None:
        """Everything that decides what a column of a row group decodes to: equal ones hold equal values. None if unknown."""
        chunk = self.chunk(name, group)
        start, size = chunk.data_page_offset, chunk.total_compressed_size
        if chunk.dictionary_page_offset is not None or not 0 <= size <= MOST_COMPARED:
            return None
        try:
            content = self._source.read_at(size, start)
        except (pa.ArrowException, OSError, ValueError):
            return None
        return self.name, name, chunk.compression, chunk.num_values, chunk.total_uncompressed_size, content

    def constant(self, name: str, group: int) -> int | None:
        """The one value of a column in a row group, if its footer says that there is only one: a hint, not a proof."""
        try:
            statistics = self.chunk(name, group).statistics
            if statistics is None or not statistics.has_min_max or statistics.min != statistics.max:
                return None
            return int(statistics.min)
        except (pa.ArrowException, OSError, TypeError, ValueError):
            return None

    def compressed_bytes(self, name: str) -> int:
        """Compressed bytes of a column, 0 where it is missing."""
        if name not in self.present:
            return 0
        return sum(self.chunk(name, group).total_compressed_size for group in range(self.num_groups))

    def chunk(self, name: str, group: int) -> Any:
        """What the footer says of a column of a row group."""
        return self.metadata.row_group(group).column(self.schema.get_field_index(name))


class ColumnCache:
    """Decoded columns by key, the latest :data:`CACHE_BYTES` of them. Safe to use from several threads."""

    def __init__(self) -> None:
        self._columns: OrderedDict[tuple[Any, ...], dict[str, Any]] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def get(self, key: tuple[Any, ...], read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The columns of a key, read where it is not known."""
        with self._lock:
            columns = self._columns.pop(key, None)
            if columns is not None:
                # the latest is the last
                self._columns[key] = columns
                return columns
        columns = read()
        with self._lock:
            self._bytes += 0 if key in self._columns else _size(columns)
            self._columns[key] = columns
            while self._bytes > CACHE_BYTES and len(self._columns) > 1:
                self._bytes -= _size(self._columns.popitem(last=False)[1])
        return columns


def _size(columns: dict[str, Any]) -> int:
    pieces = [piece for column in columns.values() for piece in (column if isinstance(column, tuple) else (column,))]
    return sum(piece.nbytes for piece in pieces if piece is not None)
