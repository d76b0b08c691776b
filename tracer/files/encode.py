"""A finished segment as Arrow tables. Values that the writer took on trust are checked here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from tracer.errors import UserError
from tracer.files.buffer import LayerRows, OpenSegment
from tracer.files.cell_arrays import Layout, binary_column, cell_column, layout_of
from tracer.files.layers import first_invalid_row, id_type, weight_fault
from tracer.files.slots import PartRows, SlotMemory
from tracer.files.tokens import repeated_positions
from tracer.schema import PADDING, STATES, TABLES, arrow_schema

# raw bytes of cells in one row group; a reader that streams holds about one of them
ROW_GROUP_BYTES = 64 << 20


def segment_tables(segment: OpenSegment, memory: SlotMemory) -> dict[str, Iterator[pa.Table]]:
    """Tables of a segment, each as the row groups to write; ``memory`` is brought up to date when ``routing`` is drawn.

    Raises
    ------
    UserError
        Here or while ``routing`` is drawn: naming call, layer and row whose values break the format.
    """
    tables = {
        "requests": iter([_rows_table("requests", segment.requests)]),
        "forwards": iter([_rows_table("forwards", segment.parts)]),
        "routing": _routing_groups(segment, memory),
    }
    if segment.tokens is not None:
        tables["tokens"] = iter([_tokens_table(segment)])
    return tables


def row_fault(segment: OpenSegment, row: int, layer: int | None, message: str) -> UserError:
    """A fault of a token row of the segment."""
    call = int(np.searchsorted(segment.row_ends, row, "right"))
    where = "" if layer is None else f", layer {layer}"
    first = segment.row_ends[call - 1] if call else 0
    return UserError(f"call {segment.forward_ids[call]}{where}, row {row - first}: {message}.")


def _rows_table(table: str, rows: list[dict[str, Any]]) -> pa.Table:
    schema = arrow_schema(table)
    arrays = [pa.array([row.get(field.name) for row in rows], field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _call_rows(segment: OpenSegment) -> np.ndarray:
    """int64 [F]: token rows of each call."""
    return np.diff(np.array([0, *segment.row_ends], np.int64))


def _tokens_table(segment: OpenSegment) -> pa.Table:
    schema = arrow_schema("tokens")
    rows = _call_rows(segment)
    total = segment.num_rows
    tokens: dict[str, Any] = {name: column.first(total) for name, column in (segment.tokens or {}).items()}
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


def _part_rows(segment: OpenSegment) -> Iterator[PartRows]:
    end = 0
    for part in segment.parts:
        start, end = end, end + part["num_tokens"]
        if segment.tokens is None:
            # without positions, row j after the cached prefix stands for itself
            branches = part["branches"]
            positions = part["kv_tokens"] + np.tile(np.arange(part["num_tokens"] // branches), branches)
        else:
            positions = segment.tokens["position"].values[start:end]
        yield PartRows(part["request_id"], positions, part["branches"])


def _routing_groups(segment: OpenSegment, memory: SlotMemory) -> Iterator[pa.Table]:
    meta, layout = segment.meta, layout_of(segment)
    ids, weights = _aligned(segment, layout, memory)
    forward = np.array(segment.forward_ids, np.uint32)
    unweighted = layout.flags({layer: own.unweighted for layer, own in segment.layers.items()})
    routed = layout.objects({layer: own.routed for layer, own in segment.layers.items()})
    level = meta.capture_level
    nullable = {"gate_weights": bool(unweighted.any()), "routed": any(mask is None for mask in routed)}
    absent = {"ids": ("router_scores", "score_experts"), "active": (), "scores": ("score_experts",)}[level]
    # a column without nulls is stored as required: readers then know it without looking, and decode faster
    fields = [field.with_nullable(nullable.get(field.name, False)) for field in arrow_schema("routing")]
    schema = pa.schema([field for field in fields if field.name not in absent])
    scores = layout.listed({layer: own.scores for layer, own in segment.layers.items()})
    score_experts = layout.listed({layer: own.score_experts for layer, own in segment.layers.items()})
    for low, high in _group_bounds(layout, meta.model.top_k, scores):
        rows = slice(layout.starts[low], layout.starts[high])
        offsets = (layout.starts[low : high + 1] - layout.starts[low]) * meta.model.top_k
        left_out = unweighted[low:high]
        held, held_offsets = weights[rows], offsets
        if left_out.any():
            held = held[np.repeat(~left_out, layout.rows[low:high])]
            held_offsets = np.concatenate(([0], np.cumsum(np.where(left_out, 0, np.diff(offsets)))))
        bitmaps = [None if mask is None else np.packbits(mask, bitorder="little") for mask in routed[low:high]]
        columns = {
            "forward_id": pa.array(forward[layout.call[low:high]]),
            "layer": pa.array(layout.layer[low:high].astype(np.uint16)),
            "num_tokens": pa.array(layout.rows[low:high].astype(np.uint32)),
            "expert_ids": binary_column(ids[rows], offsets, None, meta.encodings.get("expert_ids")),
            "gate_weights": binary_column(held, held_offsets, left_out, meta.encodings.get("gate_weights")),
            "routed": cell_column(bitmaps, None),
        }
        if level != "ids":
            stored = [_stored_scores(segment, layout, c, scores[c], routed[c]) for c in range(low, high)]
            columns["router_scores"] = cell_column(stored, meta.encodings.get("router_scores"))
        if level == "active":
            narrow = [cell.astype(id_type(meta.model.num_experts)) for cell in score_experts[low:high]]
            columns["score_experts"] = cell_column(narrow, meta.encodings.get("score_experts"))
        yield pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def _group_bounds(layout: Layout, top_k: int, scores: list[Any]) -> Iterator[tuple[int, int]]:
    """Ranges of cells whose raw bytes stay under :data:`ROW_GROUP_BYTES`, one cell at least; one empty range if none."""
    sizes = layout.rows * top_k * 4
    if scores:
        sizes = sizes + np.array([cell.nbytes for cell in scores], np.int64)
    low, ends = 0, np.concatenate(([0], np.cumsum(sizes)))
    while True:
        high = int(np.searchsorted(ends, ends[low] + ROW_GROUP_BYTES, "right")) - 1
        high = min(max(high, low + 1), len(sizes))
        yield low, high
        if high >= len(sizes):
            return
        low = high


def _aligned(segment: OpenSegment, layout: Layout, memory: SlotMemory) -> tuple[np.ndarray, np.ndarray]:
    """Ids and float16 weights of all cells in stored order, [sum of rows, K], with stable slots; every row checked."""
    top_k, dtype = segment.meta.model.top_k, id_type(segment.meta.model.num_experts)
    reference = memory.references(_part_rows(segment))
    out_ids = np.empty((int(layout.starts[-1]), top_k), dtype)
    out_weights = np.zeros((int(layout.starts[-1]), top_k), np.float16)
    rows = _call_rows(segment)
    inside = np.arange(segment.num_rows) - np.repeat(np.cumsum(rows) - rows, rows)
    for layer, own in segment.layers.items():
        cells = layout.layer == layer
        first = np.full(segment.num_calls, -1, np.int64)
        first[layout.call[cells]] = layout.starts[:-1][cells]
        start = np.repeat(first, rows)
        ids, weights, routed = _layer_rows(segment, layer, own, rows)
        memory.align(
            layer,
            ids,
            weights.view(np.uint16),
            routed,
            reference,
            np.where(start >= 0, (start + inside) * top_k, -1),
            out_ids.reshape(-1),
            out_weights.reshape(-1).view(np.uint16),
        )
    memory.carry(request["request_id"] for request in segment.requests)
    return out_ids, out_weights


def _layer_rows(
    segment: OpenSegment, layer: int, own: LayerRows, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A layer's ids [T, K], float16 weights [T, K] (no rows where no call has them) and routed bool [T], checked."""
    experts, total = segment.meta.model.num_experts, segment.num_rows
    present = np.zeros(segment.num_calls, np.bool_)
    present[own.calls] = True
    routed = np.repeat(present, rows)
    for call, mask in own.routed.items():
        end = segment.row_ends[call]
        routed[end - len(mask) : end] = mask
    everywhere = bool(routed.all())
    wide = own.ids.first(total)
    if not everywhere:
        wide[~routed] = 0
    narrow = wide.dtype.type is np.uint8 and experts == 256
    if not narrow and wide.size and (wide.min() < 0 or wide.max() >= experts):
        bad = int(np.argmax(((wide < 0) | (wide >= experts)).any(axis=1)))
        raise row_fault(segment, bad, layer, f"expert ids {wide[bad].tolist()} must lie in 0..{experts - 1}")
    ids = wide.astype(id_type(experts), copy=False)
    bad = first_invalid_row(ids, routed, experts)
    if bad >= 0:
        raise row_fault(segment, bad, layer, f"expert ids {ids[bad].tolist()} are not distinct")
    if len(own.unweighted) == len(own.calls):
        return ids, np.empty((0, ids.shape[1]), np.float16), routed
    weights = own.weights.first(total)
    if not everywhere:
        weights[~routed] = 0
    fault = weight_fault(weights, segment.meta.routers[layer].bias_in_weights)
    if fault:
        raise row_fault(segment, fault[0], layer, f"float16 {fault[1]}")
    return ids, weights, routed


def _stored_scores(
    segment: OpenSegment, layout: Layout, cell: int, scores: np.ndarray, routed: np.ndarray | None
) -> np.ndarray:
    """Scores of a cell in the trace's score dtype; those of rows that were not routed become 0."""
    if routed is not None:
        scores = np.where(routed[:, None], scores, np.float32(0))
    stored = scores.astype(segment.meta.score_dtype, copy=False)
    if not np.isfinite(stored).all():
        bad = int(np.argmax(~np.isfinite(stored).all(axis=1)))
        call, layer = int(layout.call[cell]), int(layout.layer[cell])
        first = segment.row_ends[call] - len(stored)
        raise row_fault(segment, first + bad, layer, f"a {stored.dtype} router score is not finite")
    return stored
