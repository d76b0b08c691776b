"""Plain columns for other tools: polars frames over a stored trace, the tidy routing view among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from polars.io.plugins import register_io_source

from tracer.files.columns import CHOICES, COLUMNS, arrow_schema, decode
from tracer.files.folder import request_parts
from tracer.files.forwards import StoredForwards
from tracer.files.parts import PartFile
from tracer.files.tokens import row_keys
from tracer.trace import Segment

INTERRUPTED = "interrupted"


def table_schema(table: str) -> pl.Schema:
    """polars schema of a table; its fixed-width columns are Binary."""
    return pl.DataFrame(pl.from_arrow(arrow_schema(table, 1, 1).empty_table())).schema


def part_frames(part: PartFile) -> Iterator[pl.DataFrame]:
    """A part as frames, one a row group, in the format's own types, missing optional columns as nulls.

    A TraceError when a value does not fit its type or is null where none may stand.
    """
    columns, schema = COLUMNS[part.table], table_schema(part.table)
    for first, table in part.tables(list(columns)):
        for name, column in columns.items():
            if column.type not in part.widths and (name in CHOICES or column.type not in ("string", "binary")):
                decode(part, name, table, first)
        # what a foreign footer says beside the columns may be no text, on which polars panics
        frame = pl.DataFrame(pl.from_arrow(table.replace_schema_metadata(None)))
        missing = [pl.lit(None).alias(name) for name in columns if name not in frame.columns]
        yield frame.with_columns(missing).select(pl.col(name).cast(dtype) for name, dtype in schema.items())


def requests_frame(forwards: StoredForwards) -> pl.DataFrame:
    """The ``requests`` table, sorted, with a row for every request that was interrupted.

    A TraceError when a request stands twice, a stop_reason is unknown or a value is null that must not be.
    """
    ended = pl.DataFrame(schema=table_schema("requests"))
    for name in request_parts(forwards):
        part = PartFile(forwards.path, "requests", name, forwards.meta)
        ended = pl.concat([ended, *part_frames(part)])
        twice = ended["request_id"].is_duplicated()
        if twice.any():
            raise part.fault(None, f"request {ended['request_id'].filter(twice)[-1]} stands twice in the table.")
    request, block = forwards.columns["request_id"], forwards.columns["block"].astype(np.int64)
    worked_on = (
        pl.DataFrame({"request_id": request, "block": block})
        .group_by("request_id")
        .agg(pl.col("block").filter(pl.col("block") >= 0).min().fill_null(-1).cast(pl.Int32).alias("first_block"))
        .filter(~pl.col("request_id").is_in(ended["request_id"].implode()))
        .with_columns(pl.lit(INTERRUPTED).alias("stop_reason"))
    )
    return pl.concat([ended, worked_on], how="diagonal").sort("request_id")


def not_finished(path: Path, requests: pl.DataFrame) -> str:
    """What is said of a trace that was not finished; ``requests`` as :func:`requests_frame` gives them."""
    ended = requests.filter(pl.col("stop_reason") != INTERRUPTED).height
    return f"{path}: this trace was not finished: {ended} requests of {requests.height} ended."


def scan_parts(parts: Callable[[], Iterable[PartFile]], table: str) -> pl.LazyFrame:
    """A table as stored, part by part, in the format's own types; ``parts()`` lists its parts."""

    def frames() -> Iterator[pl.DataFrame]:
        for part in parts():
            yield from part_frames(part)

    return _scan(frames, table_schema(table))


def scan_routing(segments: Callable[[], Iterable[Segment]], num_experts: int) -> pl.LazyFrame:
    """The tidy view: one row per (forward_id, layer, row, slot), padding too. Rows that were not routed have none."""
    schema = pl.Schema(
        {
            "forward_id": pl.UInt32,
            "layer": pl.UInt16,
            "row": pl.UInt32,
            "slot": pl.UInt8,
            "expert_id": pl.UInt8 if num_experts <= 256 else pl.UInt16,
            "gate_weight": pl.Float32,
        }
    )

    def frames() -> Iterator[pl.DataFrame]:
        for segment in segments():
            forward, row = row_keys(segment.forwards.forward_id, segment.forwards.row_offsets)
            for layer in segment.layers:
                routing = segment.layer(layer, with_padding=True)
                real = np.arange(routing.expert_ids.shape[1]) < routing.count[:, None]
                own, slot = np.nonzero(real)
                weights = np.full(real.shape, np.nan) if routing.gate_weights is None else routing.gate_weights
                columns = {
                    "forward_id": forward[own],
                    "layer": np.full(len(own), layer, np.uint16),
                    "row": row[own],
                    "slot": slot.astype(np.uint8),
                    "expert_id": routing.expert_ids[real],
                    "gate_weight": weights[real].astype(np.float32),
                }
                yield pl.DataFrame(columns, schema=schema, nan_to_null=True)

    return _scan(frames, schema)


def _scan(frames: Any, schema: pl.Schema) -> pl.LazyFrame:
    """A LazyFrame over a generator of frames that applies projection, filter and row limit to each."""

    def source(
        with_columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, batch_size: int | None
    ) -> Iterator[pl.DataFrame]:
        left = n_rows
        for frame in frames():
            if left is not None:
                frame = frame.head(left)
                left -= len(frame)
            if predicate is not None:
                frame = frame.filter(predicate)
            yield frame if with_columns is None else frame.select(with_columns)
            if left == 0:
                return

    return register_io_source(source, schema=schema)
