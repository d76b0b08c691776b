"""What the columns of a part must be, and their values as NumPy arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tracer.schema import KINDS, STOP_REASONS, TABLES, Column, widths

if TYPE_CHECKING:
    from tracer.files.parts import PartFile

COLUMNS = {table: {column.name: column for column in columns} for table, columns in TABLES.items()}
NUMBERS: dict[str, Any] = {
    "uint8": pa.uint8(),
    "uint16": pa.uint16(),
    "uint32": pa.uint32(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "bool": pa.bool_(),
}
CHOICES = {"kind": KINDS, "stop_reason": STOP_REASONS}
BINARIES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
# tests of the Arrow types that are read as a column's type; whole numbers may be of any width
READ_AS = {
    "binary": BINARIES,
    "string": (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
    "bool": (pa.types.is_boolean,),
    "float32": (pa.types.is_floating,),
}


def arrow_schema(table: str, num_experts: int, top_k: int) -> pa.Schema:
    """Arrow schema of a table of a model with E experts, K a row, as the writer writes it; what is required is not nullable."""
    types = NUMBERS | {"string": pa.string(), "binary": pa.binary()}
    types |= {name: pa.binary(width) for name, width in widths(num_experts, top_k).items()}
    return pa.schema([pa.field(c.name, types[c.type], nullable=c.optional) for c in TABLES[table]])


def check_columns(part: PartFile) -> None:
    """Raise a TraceError where a part lacks a column, or holds one of a foreign type or name."""
    names = part.schema.names
    for column in TABLES[part.table]:
        if column.name in names:
            kind, width = part.schema.field(column.name).type, part.widths.get(column.type)
            if not _type_fits(kind, column, width):
                wanted = column.type if width is None else f"binary of {width} bytes"
                raise part.fault(None, f"column {column.name} must be {wanted}, not {kind}.")
        elif not column.optional:
            raise part.fault(None, f"column {column.name} is missing.")
    for name in names:
        if name not in COLUMNS[part.table] or names.count(name) > 1:
            raise part.fault(
                None, f"column {name} is none of the format's: take it out, or put it into a file of its own."
            )


def _type_fits(kind: pa.DataType, column: Column, width: int | None) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_null(kind):
        return column.optional
    if width is not None:
        if pa.types.is_fixed_size_binary(kind):
            return kind.byte_width == width
        return any(test(kind) for test in BINARIES)
    return any(test(kind) for test in READ_AS.get(column.type, (pa.types.is_integer,)))


def reason(error: BaseException) -> str:
    """The first line of what a library says."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def number_type(column: Column) -> np.dtype[Any]:
    """dtype a number is read as: that of the format, and where null is read as -1 one that has room for it."""
    if not column.optional or column.type == "float32":
        return np.dtype(column.type)
    return np.dtype(np.int16 if column.type == "uint8" else np.int64)


def decode(part: PartFile, name: str, table: pa.Table, first: int) -> Any:
    """A column of ``table``, whose first row is row ``first`` of the part, whatever its Arrow type is.

    Returns
    -------
    array or pair
        Numbers as :func:`number_type` says, null being -1 (NaN for floats), so too where the column is missing; texts of few
        values as uint8 codes; fixed binaries as (uint8 [rows, width], which rows are null or None for none); other binaries as
        (their bytes uint8, int64 [rows + 1] bounds of the values in them).

    Raises
    ------
    TraceError
        Naming the row of a null where none may stand, a text that is unknown, a value that is too short or too long.
    """
    column = COLUMNS[part.table][name]
    if name not in table.column_names:
        kind = number_type(column)
        return np.full(table.num_rows, np.nan if kind.kind == "f" else -1, kind)
    values: Any = table.column(name)
    values = values.chunk(0) if values.num_chunks == 1 else pa.concat_arrays(values.chunks)
    if column.type in part.widths:
        return _fixed(part, name, values, first)
    if values.null_count and not column.optional:
        raise part.fault(first + int(np.argmax(values.is_null())), f"{name} is null.")
    if column.type == "binary":
        return _binaries(values)
    return _codes(part, name, values, first) if name in CHOICES else _numbers(part, column, values)


def _binaries(values: Any) -> tuple[np.ndarray, np.ndarray]:
    wide = pc.fill_null(values.cast(pa.large_binary()), b"")
    _, bounds, content = wide.buffers()
    offsets = np.frombuffer(bounds, np.int64, len(wide) + 1, 8 * wide.offset)
    return np.frombuffer(b"" if content is None or content.size == 0 else content, np.uint8), offsets


def _fixed(part: PartFile, name: str, values: Any, first: int) -> tuple[np.ndarray, np.ndarray | None]:
    width, rows = part.widths[COLUMNS[part.table][name].type], len(values)
    nulls = np.asarray(values.is_null()) if values.null_count else None
    if nulls is not None and nulls.all():
        return np.zeros((rows, width), np.uint8), nulls
    if pa.types.is_fixed_size_binary(values.type):
        buffer = values.buffers()[1]
        if buffer is None or len(buffer) < (values.offset + rows) * width:
            raise part.fault(None, f"column {name} is shorter than its rows, the file is damaged.")
        return np.frombuffer(buffer, np.uint8, rows * width, values.offset * width).reshape(-1, width), nulls
    content, offsets = _binaries(values)
    lengths = np.diff(offsets)
    wrong = np.flatnonzero((lengths != width) & (True if nulls is None else ~nulls))
    if len(wrong):
        at = int(wrong[0])
        raise part.fault(first + at, f"{name} has {lengths[at]} bytes and must have {width}.")
    spread = np.zeros((rows, width), np.uint8)
    spread[slice(None) if nulls is None else ~nulls] = content[offsets[0] : offsets[-1]].reshape(-1, width)
    return spread, nulls


def _numbers(part: PartFile, column: Column, values: Any) -> np.ndarray:
    stored, wanted = NUMBERS[column.type], number_type(column)
    try:
        # through the format's own type: a value that only fits the wider one is a fault
        values = values.cast(stored)
        if wanted != np.dtype(column.type):
            values = values.cast(pa.from_numpy_dtype(wanted))
    except pa.ArrowException as error:
        raise part.fault(None, f"{column.name} does not fit {stored} ({reason(error)}).") from None
    if values.null_count:
        values = pc.fill_null(values, float("nan") if wanted.kind == "f" else -1)
    return values.to_numpy(zero_copy_only=False)


def _codes(part: PartFile, name: str, values: Any, first: int) -> np.ndarray:
    codes = pc.index_in(values.cast(pa.string()), value_set=pa.array(CHOICES[name]))
    if codes.null_count:
        row = int(np.argmax(codes.is_null()))
        allowed = ", ".join(CHOICES[name])
        raise part.fault(first + row, f"{name} is {values[row].as_py()!r} and must be one of {allowed}.")
    return codes.to_numpy(zero_copy_only=False).astype(np.uint8)


def fixed_array(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Rows of any dtype as a fixed binary column."""
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])
