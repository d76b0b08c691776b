"""One layer's routing over a run of calls: rows gathered into arrays and checked on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tracer.errors import TraceError
from tracer.files.forwards import StoredForwards
from tracer.files.routing import LayerTable, Run
from tracer.files.row_kernels import first_invalid_row, half_scored_row, weight_fault
from tracer.schema import id_type
from tracer.trace import LayerTrace


class LayerRows:
    """Rows of one layer over calls ``first`` to ``last - 1``, as they are stored."""

    def __init__(self, stored: StoredForwards, table: LayerTable, layer: int, first: int, last: int) -> None:
        if layer not in table.offsets:
            known = ", ".join(map(str, stored.meta.model.moe_layers))
            raise TraceError(f"layer {layer} is not an MoE layer of the trace, which has {known}.")
        self.stored, self.table, self.layer, self.first, self.last = stored, table, layer, first, last
        offsets = table.offsets[layer]
        self.low, self.high = int(offsets[first]), int(offsets[last])
        self.runs = table.runs(layer, self.low, self.high)
        self.present = table.kinds[layer][stored.call_kinds[first:last]]
        for fault in table.key_faults(layer, self.runs, self.low):
            raise TraceError(fault)

    def fault(self, row: int, message: str) -> TraceError:
        """A fault of a row of those asked for."""
        offsets = self.table.offsets[self.layer]
        call = int(np.searchsorted(offsets, self.low + row, "right")) - 1
        run = next(run for run in reversed(self.runs) if run.first <= row)
        where = f"forward {self.stored.call_ids[call]}, layer {self.layer}, row {self.low + row - offsets[call]}"
        return run.part.fault(run.place(row), f"{where}: {message}.")

    def columns(self, names: list[str]) -> list[tuple[Run, dict[str, Any]]]:
        """Columns of every run, keys checked."""
        return [(run, self.table.columns(run, names, self.layer)) for run in self.runs]

    def spread(self, rows: np.ndarray, empty: Any) -> np.ndarray:
        """Rows of the layer as token rows of the calls, ``empty`` where a call has not the layer."""
        if self.present.all():
            return rows
        stored = self.stored
        own = np.repeat(self.present, np.diff(stored.row_offsets)[self.first : self.last])
        whole = np.full((len(own), *rows.shape[1:]), empty, rows.dtype)
        whole[own] = rows
        return whole


def read_layer(
    stored: StoredForwards,
    table: LayerTable,
    active: Callable[[], LayerTable] | None,
    layer: int,
    calls: tuple[int, int],
    with_weights: bool,
    with_scores: bool,
) -> LayerTrace:
    """Routing of one layer over calls ``calls[0]`` to ``calls[1] - 1``, every row checked.

    Raises
    ------
    TraceError
        Naming table, part and row of the first row that breaks the format; or when the trace has no such layer.
    """
    meta, model = stored.meta, stored.meta.model
    rows = LayerRows(stored, table, layer, *calls)
    scored = with_scores and meta.capture_level == "scores"
    names = ["expert_ids", "count", *(["gate_weights"] if with_weights else []), *(["router_scores"] if scored else [])]
    found = rows.columns(names)
    total = rows.high - rows.low
    count = _count(rows, found, total)
    full = bool((count == model.top_k).all())
    beyond = None if full else np.arange(model.top_k) >= count[:, None]
    every = np.ones(total, np.bool_)
    ids = _joined(rows, found, "expert_ids", np.dtype(id_type(model.num_experts)), model.top_k, every)
    assert ids is not None
    if beyond is not None:
        ids[beyond] = 0
    bad = first_invalid_row(ids, count, model.num_experts)
    if bad >= 0:
        own = ids[bad, : count[bad]].tolist()
        wrong = "are not distinct" if max(own) < model.num_experts else f"must be below {model.num_experts}"
        raise rows.fault(bad, f"expert_ids {own} {wrong}")
    weights = None
    if with_weights:
        weights = _joined(rows, found, "gate_weights", np.dtype(np.float16), model.top_k, count > 0)
    if weights is not None:
        if beyond is not None:
            weights[beyond] = 0
        fault = weight_fault(weights, meta.routers[layer].bias_in_weights)
        if fault:
            raise rows.fault(fault[0], f"gate_weights: {fault[1]}")
        weights = rows.spread(weights, 0)
    scores = None
    if scored:
        scores = _joined(rows, found, "router_scores", np.dtype(np.float32), model.num_experts, every)
        if scores is None:
            raise rows.fault(0, "router_scores is null although capture_level is scores")
        scores = rows.spread(_checked_scores(rows, scores, count), np.nan)
    elif with_scores and active is not None:
        scores = _active_scores(rows, active(), count)
    return LayerTrace(
        layer=layer,
        expert_ids=rows.spread(ids, 0),
        count=rows.spread(count, 0),
        gate_weights=weights,
        router_scores=scores,
        present=rows.present,
        router=meta.routers[layer],
    )


def _count(rows: LayerRows, found: list[tuple[Run, dict[str, Any]]], total: int) -> np.ndarray:
    """uint8 [rows]: how many of the K are real."""
    top_k = rows.stored.meta.model.top_k
    count = np.full(total, top_k, np.uint8)
    for run, columns in found:
        if "count" in columns:
            values = columns["count"]
            wrong = values > top_k
            if wrong.any():
                at = int(np.argmax(wrong))
                raise rows.fault(run.first + at, f"count is {values[at]} and must be at most {top_k}")
            count[run.first : run.first + run.count] = np.where(values < 0, top_k, values)
    return count


def _joined(
    rows: LayerRows,
    found: list[tuple[Run, dict[str, Any]]],
    name: str,
    dtype: np.dtype[Any],
    width: int,
    needed: np.ndarray,
) -> np.ndarray | None:
    """A fixed binary column [rows, width] of all runs, a copy; None where all of it that is ``needed`` is missing or null.

    Rows that are null and not needed, bool [rows], hold anything.
    """
    total = len(needed)
    joined = np.empty((total, width), dtype)
    lacking = []
    for run, columns in found:
        values, nulls = columns.get(name, (None, None))
        own = slice(run.first, run.first + run.count)
        if values is None:
            lacking.append(np.arange(run.first, run.first + run.count))
            continue
        joined[own] = np.ascontiguousarray(values).view(dtype)
        if nulls is not None and nulls.any():
            lacking.append(run.first + np.flatnonzero(nulls))
    if not lacking:
        return joined
    missing = np.concatenate(lacking)
    missing = missing[needed[missing]]
    if name != "expert_ids" and len(missing) == np.count_nonzero(needed):
        return None
    if not len(missing):
        return joined
    raise rows.fault(int(missing[0]), f"{name} is null where other rows have it")


def _checked_scores(rows: LayerRows, scores: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Scores [rows, E] finite or NaN throughout a row; those of rows that were not routed become NaN."""
    if not count.all():
        scores[count == 0] = np.nan
    bad = half_scored_row(scores)
    if bad >= 0:
        raise rows.fault(bad, "router_scores: a score is not finite")
    return scores


def _active_scores(rows: LayerRows, table: LayerTable, count: np.ndarray) -> np.ndarray:
    """float32 [T, E] from table ``scores``; NaN where the trace holds no score."""
    stored, layer, experts = rows.stored, rows.layer, rows.stored.meta.model.num_experts
    cells = LayerRows(stored, table, layer, rows.first, rows.last)
    if not np.array_equal(cells.present, rows.present):
        call = stored.call_ids[rows.first + int(np.argmax(cells.present != rows.present))]
        raise TraceError(f"{stored.path}: scores: forward {call} has layer {layer} in one of routing and scores alone.")
    dtype = np.dtype(id_type(experts))
    scores = np.full((rows.high - rows.low, experts), np.nan, np.float32)
    lengths = np.diff(rows.table.offsets[layer][rows.first : rows.last + 1])
    lengths = lengths[rows.present]
    starts = np.concatenate(([0], np.cumsum(lengths)))
    for run, columns in cells.columns(["experts", "values"]):
        for n, (kept, values) in enumerate(zip(columns["experts"], columns["values"], strict=True), run.first):
            if len(kept) % dtype.itemsize:
                raise cells.fault(n, f"experts has {len(kept)} bytes, no whole number of ids")
            own = kept.view(dtype).astype(np.int64)
            if len(own) and (own[-1] >= experts or (np.diff(own) <= 0).any()):
                raise cells.fault(n, f"experts must ascend and stay below {experts}")
            if len(values) != 4 * lengths[n] * len(own):
                raise cells.fault(n, f"values has {len(values)} bytes and must have {4 * lengths[n] * len(own)}")
            block = values.view(np.float32).reshape(lengths[n], len(own))
            if half_scored_row(block) >= 0:
                raise cells.fault(n, "values: a score is not finite")
            scores[starts[n] : starts[n + 1], own] = block
    scores[count == 0] = np.nan
    return rows.spread(scores, np.nan)
