"""One layer's routing over a run of calls: rows gathered into arrays and checked on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tracer.errors import TraceError
from tracer.files.row_kernels import first_invalid_row, half_scored_row, weight_fault
from tracer.files.rows import Rows, RowTable
from tracer.schema import id_type
from tracer.trace import LayerTrace


def read_layer(
    table: RowTable,
    active: Callable[[], RowTable],
    layer: int,
    calls: tuple[int, int],
    with_weights: bool,
    with_scores: bool,
) -> LayerTrace:
    """Routing of one layer over calls ``calls[0]`` to ``calls[1] - 1``, every row checked.

    ``active`` opens table ``scores``, which is asked for at capture level "active" alone.

    Raises
    ------
    TraceError
        Naming table, part and row of the first row that breaks the format; or when the trace has no such layer.
    """
    meta, model = table.stored.meta, table.stored.meta.model
    level = meta.capture_level if with_scores else "ids"
    wanted = {"gate_weights": with_weights, "router_scores": level == "scores"}
    rows = table.read(layer, *calls, ["expert_ids", "count", *(name for name, on in wanted.items() if on)])
    count = _count(rows, model.top_k)
    every = np.ones(rows.count, np.bool_)
    beyond = None if (count == model.top_k).all() else np.arange(model.top_k) >= count[:, None]
    ids, nulls = rows.fixed("expert_ids", id_type(model.num_experts), model.top_k)
    _refuse_nulls(rows, "expert_ids", nulls)
    if beyond is not None:
        ids[beyond] = 0
    bad = first_invalid_row(ids, count, model.num_experts)
    if bad >= 0:
        own = ids[bad, : count[bad]].tolist()
        wrong = "are not distinct" if max(own) < model.num_experts else f"must be below {model.num_experts}"
        raise rows.fault(bad, f"expert_ids {own} {wrong}")
    weights = _optional(rows, "gate_weights", np.float16, model.top_k, count > 0) if with_weights else None
    if weights is not None:
        if beyond is not None:
            weights[beyond] = 0
        fault = weight_fault(weights, meta.routers[layer].bias_in_weights)
        if fault:
            raise rows.fault(fault[0], f"gate_weights: {fault[1]}")
        weights = rows.spread(weights, 0)
    scores = None
    if level == "scores":
        scores = _optional(rows, "router_scores", np.float32, model.num_experts, every)
        if scores is None:
            raise rows.fault(0, "router_scores is null although capture_level is scores")
    elif level == "active":
        scores = _active_scores(rows, active(), count)
    if scores is not None:
        scores[count == 0] = np.nan
        bad = half_scored_row(scores) if level == "scores" else -1
        if bad >= 0:
            raise rows.fault(bad, "router_scores: a score is not finite")
        scores = rows.spread(scores, np.nan)
    return LayerTrace(
        layer=layer,
        expert_ids=rows.spread(ids, 0),
        count=rows.spread(count, 0),
        gate_weights=weights,
        router_scores=scores,
        present=rows.present,
        router=meta.routers[layer],
    )


def _count(rows: Rows, top_k: int) -> np.ndarray:
    """uint8 [rows]: how many of the K are real."""
    count = np.full(rows.count, top_k, np.uint8)
    for piece in rows.pieces:
        if "count" in piece.columns:
            values = piece.columns["count"][piece.index]
            count[piece.rows] = np.where(values < 0, top_k, values)
    if len(count) and count.max() > top_k:
        bad = int(np.argmax(count > top_k))
        raise rows.fault(bad, f"count is {count[bad]} and must be at most {top_k}")
    return count


def _refuse_nulls(rows: Rows, name: str, nulls: np.ndarray) -> None:
    if nulls.any():
        raise rows.fault(int(np.argmax(nulls)), f"{name} is null where other rows have it")


def _optional(rows: Rows, name: str, dtype: Any, width: int, needed: np.ndarray) -> np.ndarray | None:
    """A column [rows, width] that may be null in all rows that are ``needed``, bool [rows]: then there is None."""
    values, nulls = rows.fixed(name, dtype, width)
    if nulls.any() and (nulls | ~needed).all():
        return None
    _refuse_nulls(rows, name, nulls & needed)
    return values


def _active_scores(rows: Rows, table: RowTable, count: np.ndarray) -> np.ndarray:
    """float32 [rows, E] from table ``scores``; NaN where the trace holds no score."""
    stored, experts = table.stored, table.stored.meta.model.num_experts
    cells = table.read(rows.layer, rows.first, rows.last, ["experts", "values"])
    if not np.array_equal(cells.present, rows.present):
        call = stored.call_ids[rows.first + int(np.argmax(cells.present != rows.present))]
        raise TraceError(
            f"{stored.path}: scores: forward {call} has layer {rows.layer} in one of routing and scores alone."
        )
    dtype = np.dtype(id_type(experts))
    scores = np.full((rows.count, experts), np.nan, np.float32)
    bounds = rows.offsets[np.append(np.flatnonzero(rows.present), len(rows.present))]
    for n, (kept, values) in enumerate(zip(cells.binaries("experts"), cells.binaries("values"), strict=True)):
        length = int(bounds[n + 1] - bounds[n])
        if len(kept) % dtype.itemsize:
            raise cells.fault(n, f"experts has {len(kept)} bytes, no whole number of ids")
        own = kept.view(dtype).astype(np.int64)
        if len(own) and (own[-1] >= experts or (np.diff(own) <= 0).any()):
            raise cells.fault(n, f"experts must ascend and stay below {experts}")
        if len(values) != 4 * length * len(own):
            raise cells.fault(n, f"values has {len(values)} bytes and must have {4 * length * len(own)}")
        block = values.view(np.float32).reshape(length, len(own))
        if half_scored_row(block) >= 0:
            raise cells.fault(n, "values: a score is not finite")
        scores[bounds[n] : bounds[n + 1], own] = block
    return scores
