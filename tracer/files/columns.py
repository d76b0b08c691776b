"""What the columns of a part must be, and their values as NumPy arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tracer.schema import TABLES, Column, widths

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


def arrow_schema(table: str, num_experts: int, top_k: int) -> pa.Schema:
    """Arrow schema of a table of a model with E experts, K a row, as the writer writes it; what is required is not nullable."""
    types = NUMBERS | {"string": pa.string(), "binary": pa.binary()}
    types |= {name: pa.binary(width) for name, width in widths(num_experts, top_k).items()}
    return pa.schema([pa.field(c.name, types[c.type], nullable=c.optional) for c in TABLES[table]])


def check_columns(part: PartFile) -> None:
    """Raise a TraceError where a part lacks a column, or holds one of a foreign type or name."""
    found = part.schema.names
    for column in TABLES[part.table]:
        if column.name not in found:
            if not column.optional:
                raise part.fault(None, f"column {column.name} is missing.")
            continue
        kind = part.schema.field(column.name).type
        width = part.widths.get(column.type)
        if not _type_fits(kind, column, width):
            wanted = column.type if width is None else f"binary of {width} bytes"
            raise part.fault(None, f"column {column.name} must be {wanted}, not {kind}.")
    for name in found:
        if name not in COLUMNS[part.table] or found.count(name) > 1:
            raise part.fault(
                None, f"column {name} is none of the format's: take it out, or put it into a file of its own."
            )


def _type_fits(found: pa.DataType, column: Column, width: int | None) -> bool:
    if pa.types.is_dictionary(found):
        found = found.value_type
    if pa.types.is_null(found):
        return column.optional
    if width is not None and pa.types.is_fixed_size_binary(found):
        return found.byte_width == width
    if column.type == "binary" or width is not None:
        return pa.types.is_binary(found) or pa.types.is_large_binary(found) or pa.types.is_binary_view(found)
    if column.type == "string":
        return pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_string_view(found)
    if column.type == "bool":
        return pa.types.is_boolean(found)
    if column.type == "float32":
        return pa.types.is_floating(found)
    return pa.types.is_integer(found)


def reason(error: BaseException) -> str:
    """The first line of what a library says."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def binaries(values: Any) -> tuple[np.ndarray, np.ndarray]:
    """A binary array's bytes uint8 and the bounds int64 [n + 1] of its values in them; a null has no bytes."""
    wide = pc.fill_null(values.cast(pa.large_binary()), b"")
    _, bounds, data = wide.buffers()
    offsets = np.frombuffer(bounds, np.int64, len(wide) + 1, 8 * wide.offset)
    return np.frombuffer(b"" if data is None or data.size == 0 else data, np.uint8), offsets


def fixed(part: PartFile, name: str, table: pa.Table, first: int) -> tuple[np.ndarray, np.ndarray | None]:
    """A fixed-width binary column: uint8 [rows, width], and which rows are null (None = none).

    ``first`` is the row of the part that the table begins with.
    """
    values: Any = table.column(name)
    values = values.chunk(0) if values.num_chunks == 1 else pa.concat_arrays(values.chunks)
    width = part.widths[COLUMNS[part.table][name].type]
    nulls = np.asarray(values.is_null()) if values.null_count else None
    if nulls is not None and nulls.all():
        return np.zeros((len(values), width), np.uint8), nulls
    if not pa.types.is_fixed_size_binary(values.type):
        data, offsets = binaries(values)
        lengths = np.diff(offsets)
        wrong = np.flatnonzero((lengths != width) & (True if nulls is None else ~nulls))
        if len(wrong):
            at = int(wrong[0])
            raise part.fault(first + at, f"{name} has {lengths[at]} bytes and must have {width}.")
        if nulls is None:
            return data[offsets[0] : offsets[-1]].reshape(-1, width), None
        spread = np.zeros((len(values), width), np.uint8)
        spread[~nulls] = data[offsets[0] : offsets[-1]].reshape(-1, width)
        return spread, nulls
    buffer = values.buffers()[1]
    if buffer is None or len(buffer) < (values.offset + len(values)) * width:
        raise part.fault(None, f"column {name} is shorter than its rows, the file is damaged.")
    return np.frombuffer(buffer, np.uint8, len(values) * width, values.offset * width).reshape(-1, width), nulls


def numbers(part: PartFile, name: str, table: pa.Table, first: int = 0) -> np.ndarray:
    """A number column as a NumPy array; nulls of optional columns become -1 (NaN for floats) in the widest type.

    Optional integers come as int64, everything else in the format's type. A null where none may stand, or a value outside the
    type, is a TraceError; ``first`` is the row of the part that the table begins with.
    """
    column = COLUMNS[part.table][name]
    stored = NUMBERS[column.type]
    wanted = pa.int64() if column.optional and pa.types.is_integer(stored) and column.type != "uint8" else stored
    if name not in table.column_names:
        return np.full(table.num_rows, np.nan if column.type == "float32" else -1, _signed(column, wanted))
    values: Any = table.column(name)
    if values.null_count and not column.optional:
        row = int(np.flatnonzero(values.is_null().to_numpy())[0])
        raise part.fault(first + row, f"{name} is null.")
    try:
        # through the format's own type: a value that only fits the wider one is a fault
        values = values.cast(stored).cast(wanted)
    except pa.ArrowException as error:
        raise part.fault(None, f"{name} does not fit {stored} ({reason(error)}).") from None
    if values.null_count:
        if column.type == "uint8":
            values = values.cast(pa.int16())
        values = pc.fill_null(values, float("nan") if column.type == "float32" else -1)
    if values.num_chunks == 1:
        return values.chunk(0).to_numpy(zero_copy_only=False)
    return values.to_numpy()


def _signed(column: Column, wanted: pa.DataType) -> Any:
    return np.int16 if column.type == "uint8" else wanted.to_pandas_dtype()


def kind_codes(part: PartFile, values: Any, name: str, allowed: tuple[str, ...]) -> np.ndarray:
    """Codes (uint8, index into ``allowed``) of a string column, whatever its string type or dictionary."""
    codes = pc.index_in(values.cast(pa.string()), value_set=pa.array(allowed))
    if codes.null_count:
        row = int(np.flatnonzero(codes.is_null().to_numpy())[0])
        raise part.fault(row, f"{name} is {values[row].as_py()!r} and must be one of {', '.join(allowed)}.")
    return codes.to_numpy().astype(np.uint8)
