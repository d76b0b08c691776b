"""Plain columns for other tools: polars frames over a stored trace, the tidy routing view among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from polars.io.plugins import register_io_source

from tracer.files.forwards import StoredForwards
from tracer.files.parts import PartFile, kind_codes, numbers, open_part
from tracer.schema import STOP_REASONS, TABLES
from tracer.trace import Segment

POLARS_TYPES: dict[str, Any] = {
    "uint8": pl.UInt8,
    "uint16": pl.UInt16,
    "uint32": pl.UInt32,
    "int32": pl.Int32,
    "int64": pl.Int64,
    "float32": pl.Float32,
    "bool": pl.Boolean,
    "string": pl.String,
    "binary": pl.Binary,
}
INTERRUPTED = "interrupted"


def table_schema(table: str) -> pl.Schema:
    """polars schema of a table."""
    return pl.Schema({column.name: POLARS_TYPES[column.type] for column in TABLES[table]})


def part_frame(part: PartFile) -> pl.DataFrame:
    """A part as a frame in the format's own types, missing optional columns as nulls."""
    names = [column.name for column in TABLES[part.table]]
    stored = part.read([name for name in names if name in part.present])
    frame = pl.DataFrame(pl.from_arrow(stored))
    missing = [pl.lit(None).alias(name) for name in names if name not in frame.columns]
    return frame.with_columns(missing).select(
        pl.col(name).cast(dtype) for name, dtype in table_schema(part.table).items()
    )


def requests_frame(path: Path, forwards: StoredForwards) -> pl.DataFrame:
    """The ``requests`` table, sorted, with a row for every request that was interrupted.

    Raises
    ------
    TraceError
        When a request stands twice, a stop_reason is unknown or a value is null that must not be.
    """
    frames = [pl.DataFrame(schema=table_schema("requests"))]
    for number in range(forwards.num_parts):
        part = open_part(path, "requests", number)
        frames.append(part_frame(part))
        table = part.read(
            [name for name in ("request_id", "prompt_tokens", "generated_tokens", "first_block", "stop_reason")]
        )
        for name in ("request_id", "prompt_tokens", "generated_tokens", "first_block"):
            numbers(part, name, table)
        kind_codes(part, table.column("stop_reason"), "stop_reason", STOP_REASONS)
        ids = pl.concat(frames)["request_id"]
        if ids.is_duplicated().any():
            twice = ids.filter(ids.is_duplicated())[-1]
            raise part.fault(None, f"request {twice} stands twice in the table.")
    ended = pl.concat(frames)
    request, block = forwards.columns["request_id"], forwards.columns["block"].astype(np.int64)
    worked_on = (
        pl.DataFrame({"request_id": request, "block": block})
        .group_by("request_id")
        .agg(pl.col("block").filter(pl.col("block") >= 0).min().fill_null(-1).cast(pl.Int32).alias("first_block"))
        .filter(~pl.col("request_id").is_in(ended["request_id"].implode()))
        .with_columns(pl.lit(INTERRUPTED).alias("stop_reason"))
    )
    return pl.concat([ended, worked_on], how="diagonal").sort("request_id")


def scan_parts(parts: Callable[[], Iterable[PartFile]], table: str) -> pl.LazyFrame:
    """A table as stored, part by part, in the format's own types; ``parts()`` lists its parts."""

    def frames() -> Iterator[pl.DataFrame]:
        for part in parts():
            yield part_frame(part)

    return _scan(frames, table_schema(table))


def scan_routing(segments: Callable[[], Iterable[Segment]], num_experts: int) -> pl.LazyFrame:
    """The tidy view: one row per (forward_id, layer, row, slot). Rows that were not routed have none."""
    ids = pl.UInt8 if num_experts <= 256 else pl.UInt16
    schema = pl.Schema(
        {
            "forward_id": pl.UInt32,
            "layer": pl.UInt16,
            "row": pl.UInt32,
            "slot": pl.UInt8,
            "expert_id": ids,
            "gate_weight": pl.Float32,
        }
    )

    def frames() -> Iterator[pl.DataFrame]:
        for segment in segments():
            offsets = segment.forwards.row_offsets
            rows = np.diff(offsets)
            forward = np.repeat(segment.forwards.forward_id, rows)
            row = np.arange(offsets[-1]) - np.repeat(offsets[:-1], rows)
            for layer in segment.layers:
                found = segment.layer(layer)
                routed = found.count > 0
                top_k = found.expert_ids.shape[1]
                own = int(routed.sum())
                weights = found.gate_weights
                yield pl.DataFrame(
                    {
                        "forward_id": np.repeat(forward[routed], top_k),
                        "layer": np.full(own * top_k, layer, np.uint16),
                        "row": np.repeat(row[routed].astype(np.uint32), top_k),
                        "slot": np.tile(np.arange(top_k, dtype=np.uint8), own),
                        "expert_id": found.expert_ids[routed].reshape(-1),
                        "gate_weight": (
                            pl.repeat(None, own * top_k, dtype=pl.Float32, eager=True)
                            if weights is None
                            else weights[routed].reshape(-1).astype(np.float32)
                        ),
                    },
                    schema=schema,
                )

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
