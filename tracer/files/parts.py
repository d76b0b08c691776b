"""Parquet parts of a trace: which exist, what their columns hold, values as NumPy arrays.

Every fault of a part is a TraceError that names table, part and, where there is one, the row. Page checksums are verified on
every read, and a column that is not as long as its row group is a fault before anything looks at it.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tracer.errors import TraceError
from tracer.files.columns import check_columns, numbers, reason
from tracer.files.footer import footer_is_sealed
from tracer.schema import widths
from tracer.trace import TraceMeta

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


@dataclass(slots=True)
class PartFile:
    """One part of a table; ``name`` is its file's. Safe to read from several threads.

    ``groups`` int64 [row groups + 1] bounds the rows of its row groups. ``sealed``: its footer is known to be what was written.
    """

    path: Path
    table: str
    name: str
    metadata: pq.FileMetaData
    schema: pa.Schema
    groups: np.ndarray
    widths: dict[str, int]
    sealed: bool
    _source: Any
    # Parquet readers must not be shared between threads; opening one takes 50 microseconds
    _idle: list[pq.ParquetFile] = field(default_factory=list)

    @property
    def file(self) -> Path:
        return self.path / self.table / self.name

    @property
    def num_rows(self) -> int:
        return int(self.groups[-1])

    @property
    def present(self) -> set[str]:
        """Names of the columns it holds."""
        return set(self.schema.names)

    def fault(self, row: int | None, message: str) -> TraceError:
        """A TraceError naming table, part and row."""
        where = "" if row is None else f" row {row}"
        return TraceError(f"{self.path}: {self.table} {self.name.removesuffix('.parquet')}{where}: {message}")

    def read(self, names: list[str], group: int | None = None) -> pa.Table:
        """Columns of the part, or of one row group; a TraceError when the bytes are damaged."""
        try:
            reader = self._idle.pop()
        except IndexError:
            reader = _reader(self._source, self.metadata)
        try:
            if group is None:
                found = reader.read(columns=names, use_threads=False)
            else:
                found = reader.read_row_group(group, columns=names, use_threads=False)
            # texts that are none make polars panic
            found.validate(full=True)
        except (pa.ArrowException, OSError, MemoryError) as error:
            message = f"column {', '.join(names)} cannot be read, the file is damaged ({reason(error)})."
            raise self.fault(None, message) from None
        self._idle.append(reader)
        expected = self.num_rows if group is None else int(self.groups[group + 1] - self.groups[group])
        for name in names:
            length = len(found.column(name)) if name in found.column_names else -1
            if length != expected:
                raise self.fault(None, f"column {name} has {length} of {expected} rows, the file is damaged.")
        return found

    def arrays(self, names: list[str], group: int | None = None) -> dict[str, np.ndarray]:
        """Number columns as NumPy arrays of the format's own types; see :func:`numbers` for nulls."""
        table = self.read([name for name in names if name in self.present], group)
        return {name: numbers(self, name, table, 0 if group is None else int(self.groups[group])) for name in names}

    def stored(self, name: str, group: int) -> tuple[Any, ...] | None:
        """Everything that decides what a column of a row group decodes to: equal ones hold equal values. None if unknown."""
        chunk = self._chunk(name, group)
        start, size = chunk.data_page_offset, chunk.total_compressed_size
        if chunk.dictionary_page_offset is not None or not 0 <= size <= MOST_COMPARED:
            return None
        try:
            content = self._source.read_at(size, start)
        except (pa.ArrowException, OSError, ValueError):
            return None
        return self.table, self.name, name, chunk.compression, chunk.num_values, chunk.total_uncompressed_size, content

    def constant(self, name: str, group: int) -> int | None:
        """The one value of a column in a row group, if its footer says that there is only one: a hint, not a proof."""
        try:
            statistics = self._chunk(name, group).statistics
            if statistics is None or not statistics.has_min_max or statistics.min != statistics.max:
                return None
            return int(statistics.min)
        except (pa.ArrowException, OSError, TypeError, ValueError):
            return None

    def compressed_bytes(self, name: str) -> int:
        """Compressed bytes of a column, 0 where it is missing."""
        if name not in self.present:
            return 0
        return sum(self._chunk(name, group).total_compressed_size for group in range(len(self.groups) - 1))

    def _chunk(self, name: str, group: int) -> Any:
        return self.metadata.row_group(group).column(self.schema.get_field_index(name))


def _reader(source: Any, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    return pq.ParquetFile(source, metadata=metadata, page_checksum_verification=True)


def open_part(path: Path, table: str, name: str, meta: TraceMeta) -> PartFile:
    """Open a part and check that it holds the format's columns, no others, and as many values as rows.

    Raises
    ------
    TraceError
        When the part is missing, is no Parquet file, is truncated, lacks a column, holds one of a foreign type or name, or
        its footer does not agree with itself.
    """
    file = path / table / name
    told = f"{path}: {table} {name.removesuffix('.parquet')}"
    try:
        source = pa.memory_map(str(file))
        sealed = footer_is_sealed(source)
        opened = _reader(source)
        metadata, schema = opened.metadata, opened.schema_arrow
        rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    except FileNotFoundError:
        raise TraceError(f"{told} is missing.") from None
    except (pa.ArrowException, OSError, MemoryError, ValueError) as error:
        raise TraceError(f"{told} is truncated or no Parquet file ({reason(error)}).") from None
    model = meta.model
    part = PartFile(
        path=path,
        table=table,
        name=name,
        metadata=metadata,
        schema=schema,
        groups=np.concatenate(([0], np.cumsum(np.array(rows, np.int64)))).astype(np.int64),
        widths=widths(model.num_experts, model.top_k),
        sealed=sealed,
        _source=source,
    )
    check_columns(part)
    if min(rows, default=0) < 0 or part.num_rows != metadata.num_rows:
        raise part.fault(None, f"its footer counts {metadata.num_rows} rows and its row groups {part.num_rows}.")
    if not part.sealed:
        for group, place in itertools.product(range(len(rows)), range(len(schema.names))):
            column = metadata.row_group(group).column(place)
            if column.num_values != rows[group]:
                message = f"column {column.path_in_schema} has {column.num_values} of {rows[group]} rows."
                raise part.fault(None, message)
    part._idle.append(opened)
    return part
