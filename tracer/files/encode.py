"""A finished segment as Arrow tables. Values that the writer took on trust are checked here.

Shapes: L layers, F calls, T token rows of the segment, K experts a row, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from tracer.errors import UserError
from tracer.files.buffer import OpenSegment
from tracer.files.columns import arrow_schema
from tracer.files.row_kernels import half_scored_row
from tracer.files.slots import PartRows, SlotMemory
from tracer.files.stack import LayerStack, row_fault, stack_layers
from tracer.files.tokens import repeated_positions, row_keys
from tracer.schema import PADDING, STATES, TABLES


def segment_tables(segment: OpenSegment, memory: SlotMemory) -> dict[str, Iterator[pa.Table]]:
    """Tables of a segment, each as the row groups to write; ``memory`` is brought up to date when ``routing`` is drawn.

    Raises
    ------
    UserError
        Here or while a table is drawn: naming call, layer and row whose values break the format.
    """
    tokens = segment.tokens()
    tables = {
        "requests": iter([_rows_table(segment, "requests", segment.requests)]),
        "forwards": iter([_rows_table(segment, "forwards", segment.parts)]),
        "routing": _routing_groups(segment, memory, None if tokens is None else tokens["position"]),
    }
    if tokens is not None:
        tables["tokens"] = iter([_tokens_table(segment, tokens)])
    if segment.meta.capture_level == "active":
        tables["scores"] = _scores_groups(segment)
    return tables


def _schema(segment: OpenSegment, table: str) -> pa.Schema:
    return arrow_schema(table, segment.meta.model.num_experts, segment.meta.model.top_k)


def _offsets(segment: OpenSegment) -> np.ndarray:
    """int64 [F + 1]: the token rows of each call."""
    return np.array([0, *segment.row_ends], np.int64)


def _keys(segment: OpenSegment) -> tuple[np.ndarray, np.ndarray]:
    return row_keys(np.array(segment.forward_ids, np.uint32), _offsets(segment))


def _rows_table(segment: OpenSegment, table: str, rows: list[dict[str, Any]]) -> pa.Table:
    schema = _schema(segment, table)
    arrays = []
    for field in schema:
        name = field.name
        if pa.types.is_integer(field.type) and not field.nullable:
            values: Any = np.fromiter((row[name] for row in rows), field.type.to_pandas_dtype(), len(rows))
        else:
            values = [row.get(name) for row in rows]
        arrays.append(pa.array(values, field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _tokens_table(segment: OpenSegment, columns: Mapping[str, np.ndarray]) -> pa.Table:
    tokens: dict[str, Any] = dict(columns)
    _check_tokens(segment, tokens["state"], tokens["position"])
    tokens["forward_id"], tokens["row"] = _keys(segment)
    same = tokens["argmax_id"] == tokens["predicted_id"]
    tokens["argmax_id"] = pa.array(tokens["argmax_id"], mask=same)
    same = (tokens["argmax_confidence"] == tokens["confidence"]) | np.isnan(tokens["argmax_confidence"])
    tokens["argmax_confidence"] = pa.array(tokens["argmax_confidence"], mask=same)
    return pa.Table.from_arrays([pa.array(tokens[c.name]) for c in TABLES["tokens"]], schema=_schema(segment, "tokens"))


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
    if twice.any():
        bad = int(np.argmax(twice))
        raise row_fault(segment, bad, None, f"position {position[bad]} stands twice in one request and branch")


def _scores_groups(segment: OpenSegment) -> Iterator[pa.Table]:
    """Table ``scores`` of level "active", one row group a layer: the kept experts of each call and their scores."""
    schema = _schema(segment, "scores")
    layers = sorted(set().union(*(call.layers for call in segment.calls)))
    for layer in layers:
        cells = [
            (forward, *kept[call.layers.index(layer)])
            for forward, call, kept in zip(segment.forward_ids, segment.calls, segment.active, strict=True)
            if layer in call.layers
        ]
        for forward, _, scores in cells:
            bad = half_scored_row(scores)
            if bad >= 0:
                raise UserError(f"call {forward}, layer {layer}, row {bad}: a router score is not finite.")
        columns = [
            pa.array([forward for forward, *_ in cells], pa.uint32()),
            pa.array(np.full(len(cells), layer, np.uint16)),
            pa.array([experts.tobytes() for _, experts, _ in cells], pa.binary()),
            pa.array([scores.tobytes() for *_, scores in cells], pa.binary()),
        ]
        yield pa.Table.from_arrays(columns, schema=schema)
    if not layers:
        yield schema.empty_table()


def _part_rows(segment: OpenSegment, positions: np.ndarray | None) -> PartRows:
    names = ("request_id", "num_tokens", "kv_tokens", "branches")
    columns = {name: np.array([part[name] or 0 for part in segment.parts], np.int64) for name in names}
    starts = np.concatenate(([0], np.cumsum(columns["num_tokens"])))
    branches = columns["branches"]
    if positions is None:
        # without positions, row j after the cached prefix stands for itself
        inside = np.arange(starts[-1]) - np.repeat(starts[:-1], columns["num_tokens"])
        own = np.repeat(columns["num_tokens"] // branches, columns["num_tokens"])
        positions = np.repeat(columns["kv_tokens"], columns["num_tokens"]) + inside % own
    return PartRows(columns["request_id"], branches, starts, positions)


def _routing_groups(segment: OpenSegment, memory: SlotMemory, positions: np.ndarray | None) -> Iterator[pa.Table]:
    """One table a layer, which becomes one row group: a layer is one contiguous read."""
    rows, offsets, top_k = stack_layers(segment), _offsets(segment), segment.meta.model.top_k
    full = bool((rows.count == top_k).all())
    # rows of fewer than K experts keep their order, as the real ones must come first
    whole = np.empty(0, np.bool_) if full else (rows.count == top_k).reshape(-1)
    first = np.arange(len(rows.layers))[:, None] * segment.num_rows + offsets[:-1]
    memory.align(
        list(rows.layers),
        rows.ids.reshape(-1, top_k),
        rows.weights.view(np.uint16).reshape(-1, top_k),
        whole,
        np.where(rows.present, first, -1),
        offsets,
        memory.references(_part_rows(segment, positions)),
    )
    memory.carry(request["request_id"] for request in segment.requests)
    forward, row = _keys(segment)
    schema = _routing_schema(segment, rows, full)
    for n, layer in enumerate(rows.layers):
        everywhere = bool(rows.present[n].all())
        own: Any = slice(None) if everywhere else np.repeat(rows.present[n], np.diff(offsets))
        columns = {
            "forward_id": forward[own],
            "layer": np.full(len(forward[own]), layer, np.uint16),
            "row": row[own],
            "expert_ids": rows.ids[n][own],
            "count": rows.count[n][own],
        }
        if "gate_weights" in schema.names:
            columns["gate_weights"] = None if n in rows.unweighted else rows.weights[n][own]
        if "router_scores" in schema.names:
            columns["router_scores"] = _layer_scores(segment, layer, columns["count"])
        arrays = [_column(columns[field.name], field.type, len(columns["row"])) for field in schema]
        yield pa.Table.from_arrays(arrays, schema=schema)
    if not rows.layers:
        yield schema.empty_table()


def _routing_schema(segment: OpenSegment, rows: LayerStack, full: bool) -> pa.Schema:
    """Columns of the segment's ``routing`` part; one without nulls is stored as required, which readers decode faster."""
    fields = []
    for field in _schema(segment, "routing"):
        if field.name == "gate_weights":
            if len(rows.unweighted) == len(rows.layers):
                continue
            fields.append(field.with_nullable(bool(rows.unweighted)))
        elif field.name == "count":
            fields += [] if full else [field.with_nullable(False)]
        elif field.name == "router_scores":
            fields += [field.with_nullable(False)] if segment.meta.capture_level == "scores" else []
        else:
            fields.append(field)
    return pa.schema(fields)


def _column(values: np.ndarray | None, kind: pa.DataType, rows: int) -> pa.Array:
    if values is None:
        return pa.nulls(rows, kind)
    if pa.types.is_fixed_size_binary(kind):
        return pa.FixedSizeBinaryArray.from_buffers(kind, rows, [None, pa.py_buffer(np.ascontiguousarray(values))])
    return pa.array(values, kind)


def _layer_scores(segment: OpenSegment, layer: int, count: np.ndarray) -> np.ndarray:
    """float32 [rows, E]: scores of a layer over the calls that have it; those of rows that were not routed are NaN."""
    pieces = [
        call.router_scores[call.layers.index(layer)]
        for call in segment.calls
        if layer in call.layers and call.router_scores is not None
    ]
    scores = np.concatenate(pieces)
    scores[count == 0] = np.nan
    bad = half_scored_row(scores)
    if bad >= 0:
        calls = [n for n, call in enumerate(segment.calls) if layer in call.layers]
        lengths = np.cumsum(np.diff(_offsets(segment))[calls])
        call = int(np.searchsorted(lengths, bad, "right"))
        row = int(_offsets(segment)[calls[call]] + bad - (lengths[call - 1] if call else 0))
        raise row_fault(segment, row, layer, "a router score is not finite")
    return scores
