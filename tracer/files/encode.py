"""A finished segment as Arrow tables. Values that the writer took on trust are checked here.

Shapes: L layers, F calls, T token rows of the segment, K experts a row, E experts of a layer; M rows that the slots remember.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from tracer.errors import UserError
from tracer.files.buffer import OpenSegment
from tracer.files.columns import arrow_schema, fixed_array
from tracer.files.row_kernels import first_invalid_row, half_scored_row, weight_fault
from tracer.files.slots import PartRows, SlotMemory
from tracer.files.tokens import repeated_positions, row_keys
from tracer.schema import PADDING, STATES, TABLES


def segment_tables(segment: OpenSegment, memory: SlotMemory) -> dict[str, Iterator[pa.Table]]:
    """Tables of a segment, each as the row groups to write; ``memory`` is brought up to date when ``routing`` is drawn.

    Raises
    ------
    UserError
        Here or while a table is drawn: naming call, layer and row whose values break the format.
    """
    return {name: groups(segment) for name, groups in GROUPS.items() if name in segment.meta.tables} | {
        "routing": _routing_groups(segment, memory)
    }


def _schema(segment: OpenSegment, table: str) -> pa.Schema:
    return arrow_schema(table, segment.meta.model.num_experts, segment.meta.model.top_k)


def _keys(segment: OpenSegment) -> tuple[np.ndarray, np.ndarray]:
    return row_keys(np.array(segment.forward_ids, np.uint32), segment.offsets)


def _fault(segment: OpenSegment, row: int, layer: int | None, message: str) -> UserError:
    """A fault of a token row of the segment."""
    call = int(np.searchsorted(segment.offsets, row, "right")) - 1
    where = "" if layer is None else f", layer {layer}"
    return UserError(f"call {segment.forward_ids[call]}{where}, row {row - segment.offsets[call]}: {message}.")


def _request_groups(segment: OpenSegment) -> Iterator[pa.Table]:
    yield pa.Table.from_pylist(segment.requests, schema=_schema(segment, "requests"))


def _forward_groups(segment: OpenSegment) -> Iterator[pa.Table]:
    schema = _schema(segment, "forwards")
    arrays = [pa.array([part[name] for part in segment.parts], schema.field(name).type) for name in schema.names]
    yield pa.Table.from_arrays(arrays, schema=schema)


def _token_groups(segment: OpenSegment) -> Iterator[pa.Table]:
    tokens: dict[str, Any] = segment.tokens()
    _check_tokens(segment, tokens["state"], tokens["position"])
    tokens["forward_id"], tokens["row"] = _keys(segment)
    same = tokens["argmax_id"] == tokens["predicted_id"]
    tokens["argmax_id"] = pa.array(tokens["argmax_id"], mask=same)
    same = (tokens["argmax_confidence"] == tokens["confidence"]) | np.isnan(tokens["argmax_confidence"])
    tokens["argmax_confidence"] = pa.array(tokens["argmax_confidence"], mask=same)
    arrays = [pa.array(tokens[column.name]) for column in TABLES["tokens"]]
    yield pa.Table.from_arrays(arrays, schema=_schema(segment, "tokens"))


def _check_tokens(segment: OpenSegment, state: np.ndarray, position: np.ndarray) -> None:
    lengths = [part["num_tokens"] // part["branches"] for part in segment.parts for _ in range(part["branches"])]
    twice = repeated_positions(position, np.cumsum([0, *lengths]))
    for wrong, words in (
        ((state >= len(STATES)) | (position < -1), "state {state} or position {position} is out of range"),
        ((position == -1) != (state == PADDING), "padding rows, and no others, must have position -1"),
        (twice, "position {position} stands twice in one request and branch"),
    ):
        if wrong.any():
            bad = int(np.argmax(wrong))
            raise _fault(segment, bad, None, words.format(state=state[bad], position=position[bad]))


def _score_groups(segment: OpenSegment) -> Iterator[pa.Table]:
    """Table ``scores`` of level "active", one row group a layer: the kept experts of each call and their scores."""
    schema = _schema(segment, "scores")
    for layer in segment.layers:
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
    if not segment.layers:
        yield schema.empty_table()


GROUPS = {"requests": _request_groups, "forwards": _forward_groups, "tokens": _token_groups, "scores": _score_groups}


def _part_rows(segment: OpenSegment) -> PartRows:
    names = ("request_id", "branches", "num_tokens", "kv_tokens")
    request, branches, tokens, cached = (np.array([part[n] or 0 for part in segment.parts], np.int64) for n in names)
    columns = segment.tokens()
    if columns:
        return PartRows(request, branches, tokens, columns["position"])
    # without positions, row j after the cached prefix stands for itself
    inside = np.arange(segment.num_rows) - np.repeat(np.cumsum(tokens) - tokens, tokens)
    return PartRows(
        request, branches, tokens, np.repeat(cached, tokens) + inside % np.repeat(tokens // branches, tokens)
    )


def _stacked(segment: OpenSegment, name: str, carried: int, missing: Any) -> np.ndarray:
    """A column of all calls by layer, [L, M + T, ...]: ``missing`` where a call has none, 0 where it has not the layer."""
    layers, model = segment.layers, segment.meta.model
    shape = (len(layers), carried + segment.num_rows, *(() if name == "count" else (model.top_k,)))
    stacked = np.zeros(shape, segment.types[name])
    for call, first, end in zip(segment.calls, segment.offsets[:-1], segment.offsets[1:], strict=True):
        values = getattr(call, name)
        own: Any = slice(None) if call.layers == layers else [layers.index(layer) for layer in call.layers]
        stacked[own, carried + first : carried + end] = missing if values is None else values
    return stacked


def _checked_layer(segment: OpenSegment, layer: int, ids: np.ndarray, weights: np.ndarray, count: np.ndarray) -> bool:
    """Hold ids and weights [T, K] of a layer to the format, 0 where they are not real; whether its weights are known."""
    model = segment.meta.model
    if not (count == model.top_k).all():
        beyond = np.arange(model.top_k) >= count[:, None]
        ids[beyond] = 0
        if len(weights):
            weights[beyond] = 0
    bad = first_invalid_row(ids, count, model.num_experts)
    if bad >= 0:
        real = ids[bad, : count[bad]].tolist()
        wrong = f"must lie in 0..{model.num_experts - 1}" if max(real) >= model.num_experts else "are not distinct"
        raise _fault(segment, bad, layer, f"expert ids {real} {wrong}")
    fault = weight_fault(weights, any(router.bias_in_weights for router in segment.meta.routers.values()))
    if fault and np.isnan(weights[np.arange(model.top_k) < count[:, None]]).all():
        weights[:] = 0
        return False
    if fault:
        raise _fault(segment, fault[0], layer, f"float16 {fault[1]}")
    return len(weights) > 0


def _routing_groups(segment: OpenSegment, memory: SlotMemory) -> Iterator[pa.Table]:
    """One table a layer, which becomes one row group: a layer is one contiguous read."""
    layers, carried = segment.layers, memory.size
    ids = _stacked(segment, "expert_ids", carried, 0)
    count = _stacked(segment, "count", carried, ids.shape[2])
    weights = np.empty((len(layers), 0, ids.shape[2]), np.float16)
    if any(call.gate_weights is not None for call in segment.calls):
        weights = _stacked(segment, "gate_weights", carried, np.nan)
    weighted = [
        _checked_layer(segment, layer, *(column[n, carried:] for column in (ids, weights, count)))
        for n, layer in enumerate(layers)
    ]
    ended = {request["request_id"] for request in segment.requests}
    memory.align(layers, ids, weights, count, _part_rows(segment), ended)
    forward, row = _keys(segment)
    lengths = np.diff(segment.offsets)
    full = bool((count[:, carried:] == ids.shape[2]).all())
    schema = _routing_schema(segment, weighted, full)
    for n, layer in enumerate(layers):
        # of the calls, those that have the layer
        present = np.array([layer in call.layers for call in segment.calls])
        own: Any = slice(None) if present.all() else np.flatnonzero(np.repeat(present, lengths))
        columns: dict[str, Any] = {
            "forward_id": forward[own],
            "layer": np.full(len(row[own]), layer, np.uint16),
            "row": row[own],
            "expert_ids": ids[n, carried:][own],
            "gate_weights": weights[n, carried:][own] if weighted[n] else None,
            "count": count[n, carried:][own],
        }
        if "router_scores" in schema.names:
            scores = columns["router_scores"] = _layer_scores(segment, layer)
            scores[columns["count"] == 0] = np.nan
            bad = half_scored_row(scores)
            if bad >= 0:
                raise _fault(segment, int(np.arange(len(row))[own][bad]), layer, "a router score is not finite")
        arrays = [_array(columns[field.name], field.type, len(row[own])) for field in schema]
        yield pa.Table.from_arrays(arrays, schema=schema)
    if not layers:
        yield schema.empty_table()


def _routing_schema(segment: OpenSegment, weighted: list[bool], full: bool) -> pa.Schema:
    """Columns of the segment's ``routing`` part; one without nulls is stored as required, which readers decode faster."""
    left_out = {
        "gate_weights": not any(weighted),
        "count": full,
        "router_scores": segment.meta.capture_level != "scores",
    }
    return pa.schema(
        field.with_nullable(field.name == "gate_weights" and not all(weighted))
        for field in _schema(segment, "routing")
        if not left_out.get(field.name)
    )


def _array(values: np.ndarray | None, kind: pa.DataType, rows: int) -> pa.Array:
    if values is None:
        return pa.nulls(rows, kind)
    return fixed_array(values, kind) if pa.types.is_fixed_size_binary(kind) else pa.array(values, kind)


def _layer_scores(segment: OpenSegment, layer: int) -> np.ndarray:
    """float32 [rows, E]: scores of a layer over the calls that have it."""
    pairs = [(call.router_scores, call.layers.index(layer)) for call in segment.calls if layer in call.layers]
    return np.concatenate([scores[n] for scores, n in pairs if scores is not None])
