"""A finished segment as Arrow tables. Values that the writer took on trust are checked here."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from tracer.errors import UserError
from tracer.files.buffer import OpenSegment
from tracer.files.cell_arrays import Layout, cell_column, encoded_rows, layout_of
from tracer.files.layers import first_invalid_row, id_type, weight_fault
from tracer.files.links import LINKED, link_rows
from tracer.files.slots import PartRows, SlotMemory
from tracer.files.tokens import repeated_positions
from tracer.schema import PADDING, STATES, TABLES, arrow_schema

# raw bytes of cells in one row group, which holds whole calls all the same; a reader that streams holds about one of them
ROW_GROUP_BYTES = 64 << 20
# what offsets of Arrow's binary type count to
NARROW_BYTES = (1 << 31) - 1
SCORE_COLUMNS = {"ids": (), "active": ("router_scores", "score_experts"), "scores": ("router_scores",)}


def segment_tables(segment: OpenSegment, memory: SlotMemory) -> dict[str, Iterator[pa.Table]]:
    """Tables of a segment, each as the row groups to write; ``memory`` is brought up to date when ``routing`` is drawn.

    Raises
    ------
    UserError
        Here or while ``routing`` is drawn: naming call, layer and row whose values break the format.
    """
    tokens = segment.tokens()
    tables = {
        "requests": iter([_rows_table("requests", segment.requests)]),
        "forwards": iter([_rows_table("forwards", segment.parts)]),
        "routing": _routing_groups(segment, memory, None if tokens is None else tokens["position"]),
    }
    if tokens is not None:
        tables["tokens"] = iter([_tokens_table(segment, tokens)])
    return tables


def row_fault(segment: OpenSegment, row: int, layer: int | None, message: str) -> UserError:
    """A fault of a token row of the segment."""
    call = int(np.searchsorted(segment.row_ends, row, "right"))
    where = "" if layer is None else f", layer {layer}"
    first = segment.row_ends[call - 1] if call else 0
    return UserError(f"call {segment.forward_ids[call]}{where}, row {row - first}: {message}.")


def _rows_table(table: str, rows: list[dict[str, Any]]) -> pa.Table:
    schema = arrow_schema(table)
    columns = [(name, field.type) for name, field in zip(schema.names, schema, strict=True)]
    arrays = [pa.array([row.get(name) for row in rows], dtype) for name, dtype in columns]
    return pa.Table.from_arrays(arrays, schema=schema)


def _tokens_table(segment: OpenSegment, columns: Mapping[str, np.ndarray]) -> pa.Table:
    schema = arrow_schema("tokens")
    rows: np.ndarray = np.diff(np.array([0, *segment.row_ends], np.int64))
    total = segment.num_rows
    tokens: dict[str, Any] = dict(columns)
    _check_tokens(segment, tokens["state"], tokens["position"])
    tokens["forward_id"] = np.repeat(np.array(segment.forward_ids, np.uint32), rows)
    tokens["row"] = (np.arange(total) - np.repeat(np.cumsum(rows) - rows, rows)).astype(np.uint32)
    same = tokens["argmax_id"] == tokens["predicted_id"]
    tokens["argmax_id"] = pa.array(tokens["argmax_id"], mask=same)
    same = (tokens["argmax_confidence"] == tokens["confidence"]) | np.isnan(tokens["argmax_confidence"])
    tokens["argmax_confidence"] = pa.array(tokens["argmax_confidence"], mask=same)
    return pa.Table.from_arrays([pa.array(tokens[c.name]) for c in TABLES["tokens"]], schema=schema)


def _check_tokens(segment: OpenSegment, state: np.ndarray, position: np.ndarray) -> None:
    unknown = (state >= len(STATES)) | (position < -1)
    if unknown.any():
        bad = int(np.argmax(unknown))
        raise row_fault(segment, bad, None, f"state {state[bad]} or position {position[bad]} is out of range")
    stray = (position == -1) != (state == PADDING)
    if stray.any():
        message = "padding rows, and no others, must have position -1"
        raise row_fault(segment, int(np.argmax(stray)), None, message)
    lengths = [part["num_tokens"] // part["branches"] for part in segment.parts for _ in range(part["branches"])]
    twice = repeated_positions(position, np.concatenate(([0], np.cumsum(np.array(lengths, np.int64)))))
    if twice >= 0:
        raise row_fault(segment, twice, None, f"position {position[twice]} stands twice in one request and branch")


def _part_rows(columns: Mapping[str, np.ndarray], positions: np.ndarray | None) -> PartRows:
    starts = np.concatenate(([0], np.cumsum(columns["num_tokens"])))
    branches = columns["branches"]
    if positions is None:
        # without positions, row j after the cached prefix stands for itself
        inside = np.arange(starts[-1]) - np.repeat(starts[:-1], columns["num_tokens"])
        own = np.repeat(columns["num_tokens"] // branches, columns["num_tokens"])
        positions = np.repeat(columns["kv_tokens"], columns["num_tokens"]) + inside % own
    return PartRows(columns["request_id"], branches, starts, positions)


def _routing_groups(segment: OpenSegment, memory: SlotMemory, positions: np.ndarray | None) -> Iterator[pa.Table]:
    meta, layout = segment.meta, layout_of(segment)
    ids, weights, routed = _checked_rows(segment, layout)
    columns = {name: np.array([part[name] for part in segment.parts], np.int64) for name in LINKED}
    _align(layout, memory, memory.references(_part_rows(columns, positions)), ids, weights, routed)
    memory.carry(request["request_id"] for request in segment.requests)
    groups = _groups(layout, meta.model.top_k, segment.scores)
    rows = layout.row_offsets
    links = link_rows(
        columns,
        np.concatenate(([0], np.cumsum(np.array(segment.call_parts, np.int64)))),
        rows[:-1][np.repeat(groups[:-1], np.diff(groups))],
    )
    encoded = encoded_rows(ids, weights, routed, layout.flags(segment.unweighted), layout, links, meta.encodings)
    level = meta.capture_level
    nullable = {name for name, cells in encoded.items() if cells.missing is not None}
    if len(segment.routed) < segment.num_cells:
        nullable.add("routed")
    # a column without nulls is stored as required: readers then know it without looking, and decode faster
    fields = [field.with_nullable(field.name in nullable) for field in arrow_schema("routing")]
    stored = {"forward_id", "layer", "num_tokens", "routed", *encoded, *SCORE_COLUMNS[level]}
    wide = bool((np.diff(_call_bytes(layout, meta.model.top_k, segment.scores)[groups]) > NARROW_BYTES).any())
    if wide:
        fields = [f.with_type(pa.large_binary()) if pa.types.is_binary(f.type) else f for f in fields]
    schema = pa.schema([field for field in fields if field.name in stored])
    forward = np.array(segment.forward_ids, np.uint32)[layout.call]
    bounds = np.searchsorted(layout.call, groups)
    for low, high in itertools.pairwise(bounds.tolist()):
        group = {
            "forward_id": pa.array(forward[low:high]),
            "layer": pa.array(layout.layer[low:high].astype(np.uint16)),
            "num_tokens": pa.array(layout.rows[low:high].astype(np.uint32)),
            "routed": _bitmaps(segment, low, high, wide),
            **{name: cells.column(low, high, wide) for name, cells in encoded.items()},
        }
        if level != "ids":
            scores = [_stored_scores(segment, layout, c) for c in range(low, high)]
            group["router_scores"] = cell_column(scores, meta.encodings.get("router_scores"), wide)
        if level == "active":
            dtype = id_type(meta.model.num_experts)
            narrow = [np.asarray(cell).astype(dtype) for cell in segment.score_experts[low:high]]
            group["score_experts"] = cell_column(narrow, meta.encodings.get("score_experts"), wide)
        yield pa.Table.from_arrays([group[name] for name in schema.names], schema=schema)


def _call_bytes(layout: Layout, top_k: int, scores: list[np.ndarray]) -> np.ndarray:
    """int64 [F + 1]: raw bytes of the cells before each call."""
    sizes = layout.rows * top_k * 4
    if scores:
        sizes = sizes + np.array([cell.nbytes for cell in scores], np.int64)
    ends = np.concatenate(([0], np.cumsum(sizes)))
    return ends[np.searchsorted(layout.call, np.arange(len(layout.row_offsets)))]


def _groups(layout: Layout, top_k: int, scores: list[np.ndarray]) -> np.ndarray:
    """int64: the calls row groups begin with, and F; each group one call at least, else under :data:`ROW_GROUP_BYTES`."""
    ends = _call_bytes(layout, top_k, scores)
    calls = len(ends) - 1
    bounds = [0]
    while bounds[-1] < calls or len(bounds) < 2:
        low = bounds[-1]
        high = int(np.searchsorted(ends, ends[low] + ROW_GROUP_BYTES, "right")) - 1
        bounds.append(min(max(high, low + 1), calls))
    return np.array(bounds, np.int64)


def _bitmaps(segment: OpenSegment, low: int, high: int, wide: bool) -> pa.Array:
    """Column ``routed`` of the given cells."""
    if not segment.routed:
        return pa.nulls(high - low, pa.large_binary() if wide else pa.binary())
    masks = [segment.routed.get(cell) for cell in range(low, high)]
    packed = [None if mask is None else np.packbits(mask, bitorder="little") for mask in masks]
    return cell_column(packed, None, wide)


def _checked_rows(segment: OpenSegment, layout: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids [S, K], float16 weights [S, K] (no rows where no call has them), routed bool [S] (none where all are), checked.

    Ids and weights of rows that were not routed are 0.
    """
    meta = segment.meta
    experts, total = meta.model.num_experts, segment.num_cell_rows
    bare = len(segment.unweighted) == segment.num_cells
    wide, weights = segment.ids.room(0, total), segment.weights.room(0, 0 if bare else total)
    routed = np.empty(0, np.bool_)
    if segment.routed:
        routed = np.ones(total, np.bool_)
        for cell, mask in segment.routed.items():
            routed[layout.starts[cell] : layout.starts[cell + 1]] = mask
        wide[~routed] = 0
        if not bare:
            weights[~routed] = 0
    narrow = wide.dtype.type is np.uint8 and experts == 256
    if not narrow and wide.size and (wide.min() < 0 or wide.max() >= experts):
        bad = int(np.argmax(((wide < 0) | (wide >= experts)).any(axis=1)))
        raise _cell_fault(segment, layout, bad, f"expert ids {wide[bad].tolist()} must lie in 0..{experts - 1}")
    ids = wide.astype(id_type(experts), copy=False)
    bad = first_invalid_row(ids, routed if len(routed) else np.ones(total, np.bool_), experts)
    if bad >= 0:
        raise _cell_fault(segment, layout, bad, f"expert ids {ids[bad].tolist()} are not distinct")
    fault = weight_fault(weights, any(router.bias_in_weights for router in meta.routers.values()))
    if fault:
        raise _cell_fault(segment, layout, fault[0], f"float16 {fault[1]}")
    return ids, weights, routed


def _cell_fault(segment: OpenSegment, layout: Layout, stored: int, message: str) -> UserError:
    """A fault of a row of the cells."""
    cell = int(np.searchsorted(layout.starts, stored, "right")) - 1
    row = int(layout.row_offsets[layout.call[cell]] + stored - layout.starts[cell])
    return row_fault(segment, row, int(layout.layer[cell]), message)


def _align(
    layout: Layout,
    memory: SlotMemory,
    reference: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray,
    routed: np.ndarray,
) -> None:
    """Give the rows of all cells stable slots, in place."""
    first = np.where(layout.cell_of >= 0, layout.starts[layout.cell_of], -1)
    memory.align(layout.layers.tolist(), ids, weights.view(np.uint16), routed, first, layout.row_offsets, reference)


def _stored_scores(segment: OpenSegment, layout: Layout, cell: int) -> np.ndarray:
    """Scores of a cell in the trace's score dtype; those of rows that were not routed become 0."""
    scores, routed = segment.scores[cell], segment.routed.get(cell)
    if routed is not None:
        scores = np.where(routed[:, None], scores, np.float32(0))
    stored = scores.astype(segment.meta.score_dtype, copy=False)
    if not np.isfinite(stored).all():
        bad = int(np.argmax(~np.isfinite(stored).all(axis=1)))
        raise _cell_fault(
            segment, layout, int(layout.starts[cell]) + bad, f"a {stored.dtype} router score is not finite"
        )
    return stored
