"""Parquet parts of a trace: which exist, what their columns hold, their cells as NumPy arrays without copies.

Every fault of a part is a TraceError that names table, part and, where there is one, the row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tracer.errors import TraceError
from tracer.schema import COMPANIONS, TABLES, Column, arrow_schema

PART_NAME = re.compile(r"part-(\d{5,})\.parquet")
COLUMNS = {table: {column.name: column for column in columns} for table, columns in TABLES.items()}
TYPES = {table: {field.name: field.type for field in arrow_schema(table)} for table in TABLES}


def part_path(path: Path, table: str, number: int) -> Path:
    """File of part ``number`` of a table."""
    return path / table / f"part-{number:05d}.parquet"


def part_numbers(path: Path, table: str) -> list[int]:
    """Numbers of the parts a table's folder holds, ascending; anything else in the folder is ignored."""
    folder = path / table
    if not folder.is_dir():
        return []
    matches = (PART_NAME.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted(int(match.group(1)) for match in matches if match)


def committed_parts(path: Path) -> int:
    """How many segments a trace holds: the number of its ``forwards`` parts, which must be numbered without a gap."""
    numbers = part_numbers(path, "forwards")
    for expected, number in enumerate(numbers):
        if number != expected:
            raise TraceError(f"{path}: forwards part-{expected:05d} is missing although part-{number:05d} is there.")
    return len(numbers)


@dataclass(slots=True)
class PartFile:
    """One open part."""

    path: Path
    table: str
    number: int
    file: pq.ParquetFile

    @property
    def name(self) -> str:
        return f"{self.path}: {self.table} part-{self.number:05d}"

    @property
    def num_rows(self) -> int:
        return int(self.file.metadata.num_rows)

    @property
    def present(self) -> set[str]:
        """Names of the columns it holds."""
        return set(self.file.schema_arrow.names)

    def fault(self, row: int | None, message: str) -> TraceError:
        """A TraceError naming table, part and row."""
        where = "" if row is None else f" row {row}"
        return TraceError(f"{self.name}{where}: {message}")

    def read(self, names: list[str], row_group: int | None = None) -> pa.Table:
        """Columns of the part, or of one row group; a TraceError when the bytes are damaged."""
        try:
            if row_group is None:
                return self.file.read(columns=names, use_threads=False)
            return self.file.read_row_group(row_group, columns=names, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(names, error) from None

    def read_rows(self, names: list[str], low: int, high: int) -> tuple[pa.Table, int]:
        """Columns of the row groups that hold rows ``low`` to ``high - 1``, and the row they begin at."""
        groups = self.row_groups(low, high)
        if not groups:
            return self.file.schema_arrow.empty_table().select(names), low
        return pa.concat_tables([self.read(names, group) for group, _ in groups]), groups[0][1]

    def row_groups(self, low: int, high: int) -> list[tuple[int, int]]:
        """Row groups that hold rows ``low`` to ``high - 1``, each with its first row."""
        found, begin = [], 0
        for group in range(self.file.metadata.num_row_groups):
            end = begin + self.file.metadata.row_group(group).num_rows
            if begin < high and end > low:
                found.append((group, begin))
            begin = end
        return found

    def batches(self, name: str, rows: int, row_groups: list[int]) -> Iterator[pa.RecordBatch]:
        """One column of some row groups in batches of at most ``rows`` rows: no more than a batch is in memory."""
        try:
            yield from self.file.iter_batches(rows, row_groups=row_groups, columns=[name], use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable([name], error) from None

    def arrays(self, names: list[str]) -> dict[str, np.ndarray]:
        """Number columns as NumPy arrays of the format's own types; see :func:`numbers` for nulls."""
        table = self.read([name for name in names if name in self.present])
        return {name: numbers(self, name, table) for name in names}

    def cell_bytes(self, name: str) -> tuple[int, int]:
        """Compressed and uncompressed bytes of a column and the one its encoding adds, 0 where they are missing."""
        columns = self._column_chunks(name) + self._column_chunks(COMPANIONS.get(name, ""))
        return sum(c.total_compressed_size for c in columns), sum(c.total_uncompressed_size for c in columns)

    def null_count(self, name: str) -> int:
        """Nulls of a column: from the part's statistics where they say, else by reading it."""
        if name not in self.present:
            return self.num_rows
        if not self.file.schema_arrow.field(name).nullable:
            return 0
        found = [c.statistics.null_count if c.statistics else None for c in self._column_chunks(name)]
        known = [count for count in found if count is not None]
        return sum(known) if len(known) == len(found) else int(self.read([name]).column(0).null_count)

    def largest(self, name: str) -> int:
        """Largest value of an integer column, -1 where it is empty."""
        found = [c.statistics.max if c.statistics else None for c in self._column_chunks(name)]
        known = [int(value) for value in found if value is not None]
        if len(known) < len(found):
            known = [int(value) for value in [pc.max(self.read([name]).column(0)).as_py()] if value is not None]
        return max(known, default=-1)

    def _column_chunks(self, name: str) -> list[Any]:
        """Metadata of a column in every row group, none where it is missing."""
        metadata = self.file.metadata
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        columns = [group.column(position) for group in groups for position in range(group.num_columns)]
        return [column for column in columns if column.path_in_schema == name]

    def _unreadable(self, names: list[str], error: Exception) -> TraceError:
        reason = str(error).splitlines()[0].rstrip(".")
        return self.fault(None, f"column {', '.join(names)} cannot be read, the file is damaged ({reason}).")


def open_part(path: Path, table: str, number: int) -> PartFile:
    """Open a part and check that it holds the format's columns.

    Raises
    ------
    TraceError
        When the part is missing, is no Parquet file, is truncated, lacks a column or holds one of a foreign type.
    """
    file = part_path(path, table, number)
    name = f"{path}: {table} part-{number:05d}"
    try:
        opened = pq.ParquetFile(file, memory_map=True, page_checksum_verification=True)
        schema = opened.schema_arrow
    except FileNotFoundError:
        raise TraceError(f"{name} is missing although its segment's forwards part is there.") from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise TraceError(f"{name} is truncated or no Parquet file ({reason}).") from None
    for column in TABLES[table]:
        if column.name in schema.names:
            if not _type_fits(schema.field(column.name).type, column):
                found = schema.field(column.name).type
                raise TraceError(f"{name}: column {column.name} must be {column.type}, not {found}.")
        elif not column.optional:
            raise TraceError(f"{name}: column {column.name} is missing.")
    return PartFile(path, table, number, opened)


def _type_fits(found: pa.DataType, column: Column) -> bool:
    if pa.types.is_dictionary(found):
        found = found.value_type
    if pa.types.is_null(found):
        return column.nullable
    if column.type == "binary":
        return pa.types.is_binary(found) or pa.types.is_large_binary(found) or pa.types.is_binary_view(found)
    if column.type == "string":
        return pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_string_view(found)
    if column.type == "bool":
        return pa.types.is_boolean(found)
    if column.type == "float32":
        return pa.types.is_floating(found)
    return pa.types.is_integer(found)


def numbers(part: PartFile, name: str, table: pa.Table) -> np.ndarray:
    """A number column as a NumPy array; nulls of optional columns become -1 (NaN for floats) in the widest type.

    Nullable integers come as int64, everything else in the format's type. A null where none may stand, or a value outside
    the type, is a TraceError.
    """
    column = COLUMNS[part.table][name]
    wanted = TYPES[part.table][name]
    if column.nullable and pa.types.is_integer(wanted):
        wanted = pa.int64()
    if name not in table.column_names:
        return np.full(table.num_rows, np.nan if column.type == "float32" else -1, wanted.to_pandas_dtype())
    values: Any = table.column(name)
    if values.null_count and not column.nullable:
        row = int(np.flatnonzero(values.is_null().to_numpy())[0])
        raise part.fault(row, f"{name} is null.")
    try:
        values = values.cast(wanted)
    except pa.ArrowException as error:
        raise part.fault(None, f"{name} does not fit {wanted} ({str(error).splitlines()[0].rstrip('.')}).") from None
    if values.null_count:
        values = pc.fill_null(values, float("nan") if column.type == "float32" else -1)
    return values.to_numpy()


def kind_codes(part: PartFile, values: Any, name: str, allowed: tuple[str, ...]) -> np.ndarray:
    """Codes (uint8, index into ``allowed``) of a string column, whatever its string type or dictionary."""
    codes = pc.index_in(values.cast(pa.string()), value_set=pa.array(allowed))
    if codes.null_count:
        row = int(np.flatnonzero(codes.is_null().to_numpy())[0])
        raise part.fault(row, f"{name} is {values[row].as_py()!r} and must be one of {', '.join(allowed)}.")
    return codes.to_numpy().astype(np.uint8)


@dataclass(frozen=True, slots=True)
class CellChunk:
    """Consecutive cells of one binary column, in Arrow's own buffers.

    ``first`` is the row of the part the chunk begins with; ``offsets`` int64 [n + 1] bounds the cells in ``data`` uint8;
    ``valid`` bool [n], None = no null.
    """

    first: int
    offsets: np.ndarray
    data: np.ndarray
    valid: np.ndarray | None

    def __len__(self) -> int:
        return len(self.offsets) - 1


def cell_chunks(values: Any, first: int) -> list[CellChunk]:
    """Chunks of a binary column that begins at row ``first`` of its part. Nothing but the offsets is copied."""
    chunks = []
    for chunk in values.chunks if isinstance(values, pa.ChunkedArray) else [values]:
        if not (pa.types.is_binary(chunk.type) or pa.types.is_large_binary(chunk.type)):
            chunk = chunk.cast(pa.large_binary())
        size = len(chunk)
        if size == 0:
            continue
        valid = np.asarray(chunk.is_valid()) if chunk.null_count else None
        _, bounds, data = chunk.buffers()
        wide = pa.types.is_large_binary(chunk.type)
        offsets = np.frombuffer(bounds, np.int64 if wide else np.int32, size + 1, chunk.offset * (8 if wide else 4))
        empty = data is None or data.size == 0
        content = np.frombuffer(b"" if empty else data, np.uint8)
        chunks.append(CellChunk(first, offsets.astype(np.int64), content, valid))
        first += size
    return chunks
