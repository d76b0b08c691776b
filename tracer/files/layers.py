"""One layer's routing over a segment: cells gathered into arrays and checked on the way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tracer.errors import TraceError
from tracer.files.cells import (
    expand_columns,
    first_bad_columns,
    first_bad_row,
    repeats_in_eights,
    unpack_routed,
    widest_bits,
)
from tracer.files.changes import BITS, TOO_FEW, join_changes, join_changes_of_eight, join_weights
from tracer.files.columns import CellColumn
from tracer.files.links import Links
from tracer.trace import LayerTrace, TraceMeta

HALF_MAGNITUDE, HALF_EXPONENT, HALF_SIGN = np.uint16(0x7FFF), 0x7C00, 0x8000
SINGLE_MAGNITUDE, SINGLE_EXPONENT = np.uint32(0x7FFFFFFF), 0x7F800000


def id_type(num_experts: int) -> type[np.unsignedinteger]:
    """dtype of stored expert ids: uint8 up to 256 experts, else uint16."""
    return np.uint8 if num_experts <= 256 else np.uint16


@dataclass(frozen=True, slots=True)
class SegmentCells:
    """Cells of a segment with M routing rows, F calls and T token rows.

    ``call`` int64 [M] counts calls of the segment, ``layer`` int64 [M]; ``row_offsets`` int64 [F + 1]; ``forward_id`` [F].
    The first ``lead`` calls do not belong to it: the others' cells go on from theirs. ``links`` is None where no cells do.
    """

    call: np.ndarray
    layer: np.ndarray
    row_offsets: np.ndarray
    forward_id: np.ndarray
    columns: dict[str, CellColumn]
    meta: TraceMeta
    lead: int = 0
    links: Links | None = None

    def of(self, layer: int) -> np.ndarray:
        """int64: the cells of a layer, ascending."""
        return np.flatnonzero(self.layer == layer)


@dataclass(frozen=True, slots=True)
class _LayerCells:
    layer: int
    cells: np.ndarray  # int64 [M'], this layer's cells
    first_row: np.ndarray  # int64 [M'], their first row in the segment
    rows: np.ndarray  # int64 [M']
    segment: SegmentCells

    def fault(self, column: str, row: int, message: str) -> TraceError:
        """A fault at a token row of the segment."""
        own = int(np.searchsorted(self.first_row, row, "right")) - 1
        forward = self.segment.forward_id[self.segment.call[self.cells[own]]]
        where = f"{column} of forward {forward}, token row {row - self.first_row[own]}"
        return self.segment.columns[column].cell_fault(int(self.cells[own]), f"{where}: {message}.")


def read_layer(segment: SegmentCells, layer: int, with_weights: bool, with_scores: bool) -> LayerTrace:
    """Routing of one layer, every cell checked.

    Raises
    ------
    TraceError
        Naming table, part and row of the first cell that breaks the format; or when the trace has no such layer.
    """
    if layer not in segment.meta.routers:
        known = ", ".join(map(str, segment.meta.model.moe_layers))
        raise TraceError(f"layer {layer} is not an MoE layer of the trace, which has {known}.")
    cells = segment.of(layer)
    calls = segment.call[cells]
    own = _LayerCells(layer, cells, segment.row_offsets[calls], np.diff(segment.row_offsets)[calls], segment)
    present = np.zeros(len(segment.forward_id), bool)
    present[calls] = True
    if with_weights and segment.columns["expert_ids"].busy:
        # Rather than wait for the thread that reads them.
        segment.columns["gate_weights"].read_ahead()
    routed = _read_routed(own)
    ids = _read_ids(own, routed, present)
    weights = _read_weights(own, routed, present) if with_weights else None
    scores = _read_scores(own, routed) if with_scores and segment.meta.capture_level != "ids" else None
    lead = int(segment.row_offsets[segment.lead])
    return LayerTrace(
        layer=layer,
        expert_ids=ids[lead:],
        count=routed[lead:].view(np.uint8) * np.uint8(segment.meta.model.top_k),
        gate_weights=None if weights is None else weights[lead:],
        router_scores=None if scores is None else scores[lead:],
        present=present[segment.lead :],
        router=segment.meta.routers[layer],
    )


def _read_routed(own: _LayerCells) -> np.ndarray:
    """bool [T]: rows that went through the router in this layer."""
    total = int(own.segment.row_offsets[-1])
    whole = int(own.rows.sum()) == total
    routed = np.ones(total, bool) if whole else np.zeros(total, bool)
    column = own.segment.columns["routed"]
    if not whole:
        for first, rows in zip(own.first_row, own.rows, strict=True):
            routed[first : first + rows] = True
    lengths = column.lengths(own.cells)
    given = np.flatnonzero(lengths >= 0)
    if len(given):
        sizes = (own.rows[given] + 7) // 8
        starts = np.concatenate(([0], np.cumsum(sizes)))
        bitmap = np.empty(int(starts[-1]), np.uint8)
        column.gather(own.cells[given], starts[:-1], sizes, bitmap)
        unpack_routed(bitmap, starts, np.arange(len(given)), own.first_row[given], own.rows[given], routed)
    return routed


def _gather_rows(own: _LayerCells, name: str, out: np.ndarray) -> None:
    """Gather cells of [rows, width] numbers into ``out`` [T, width]."""
    size = out.shape[1] * out.itemsize
    own.segment.columns[name].gather(own.cells, own.first_row * size, own.rows * size, out)


def _join_ids(own: _LayerCells, present: np.ndarray, links: Links, ids: np.ndarray) -> None:
    """Fill ``ids`` [T, K] from cells of encoding "changes"."""
    columns, top_k = own.segment.columns, ids.shape[1]
    sizes = (own.rows * top_k + 7) // 8
    changed_starts = np.concatenate(([0], np.cumsum(sizes)))
    changed = np.empty(int(changed_starts[-1]), np.uint8)
    columns["changed"].gather(own.cells, changed_starts[:-1], sizes, changed)
    # a null cell, and half an id, come out as lengths the cell does not have
    sizes = np.maximum(columns["expert_ids"].lengths(own.cells), 0) // ids.itemsize
    starts = np.concatenate(([0], np.cumsum(sizes)))
    # the kernel for eights looks at ids before it knows that they are its cell's
    kept = np.zeros(int(starts[-1]) + 8, ids.dtype)
    columns["expert_ids"].gather(own.cells, starts[:-1] * ids.itemsize, sizes * ids.itemsize, kept)
    calls = own.segment.call[own.cells]
    offsets, bounds, runs = own.segment.row_offsets, links.bounds, links.runs
    cells = changed, changed_starts, kept, starts, calls, offsets, bounds, runs, present
    if top_k == 8 and ids.dtype == np.uint8:
        fault = join_changes_of_eight(*cells, ids.reshape(-1).view(np.uint64))
    else:
        fault = join_changes(*cells, ids)
    if fault >= 0:
        cell, what = divmod(int(fault), 4)
        forward = own.segment.forward_id[calls[cell]]
        if what == BITS:
            message = f"changed of forward {forward} has some bits, but not all, of a row that is linked with none."
            raise columns["changed"].cell_fault(int(own.cells[cell]), message)
        message = (
            f"expert_ids of forward {forward} has {'fewer' if what == TOO_FEW else 'more'} ids than changed has bits."
        )
        raise columns["expert_ids"].cell_fault(int(own.cells[cell]), message)


def _read_ids(own: _LayerCells, routed: np.ndarray, present: np.ndarray) -> np.ndarray:
    model, links = own.segment.meta.model, own.segment.links
    shape = (len(routed), model.top_k)
    ids = (np.empty if present.all() else np.zeros)(shape, id_type(model.num_experts))
    if links is not None and own.segment.meta.encodings.get("expert_ids") == "changes":
        _join_ids(own, present, links, ids)
    else:
        _gather_rows(own, "expert_ids", ids)
    if not routed.all():
        ids[~routed] = 0
    bad = first_invalid_row(ids, routed, model.num_experts)
    if bad >= 0:
        wrong = "are not distinct" if int(ids[bad].max()) < model.num_experts else f"must be below {model.num_experts}"
        raise own.fault("expert_ids", bad, f"ids {ids[bad].tolist()} {wrong}")
    return ids


def first_invalid_row(expert_ids: np.ndarray, routed: np.ndarray, num_experts: int) -> int:
    """First routed row whose ids are not distinct or not below ``num_experts``, -1 if none. uint8 or uint16 [T, K]."""
    top_k = expert_ids.shape[1]
    if top_k == 8 and expert_ids.dtype == np.uint8 and expert_ids.size and routed.all():
        in_range = num_experts == 256 or int(expert_ids.max()) < num_experts
        if in_range and not repeats_in_eights(expert_ids.reshape(-1).view(np.uint64)):
            return -1
    return int(first_bad_row(expert_ids, routed.view(np.uint8) * np.uint8(top_k), num_experts))


def weight_fault(gate_weights: np.ndarray, signed: bool) -> tuple[int, str] | None:
    """First row of float16 [T, K] weights that are not finite, or negative unless ``signed``, and what is wrong with it."""
    if gate_weights.size == 0:
        return None
    largest, raw = widest_bits(gate_weights.reshape(-1).view(np.uint16), HALF_MAGNITUDE)
    if largest >= HALF_EXPONENT:
        bad = int(np.argmax(~np.isfinite(gate_weights).all(axis=1)))
        return bad, f"weights {gate_weights[bad].tolist()} are not finite"
    if raw > HALF_SIGN and not signed:
        bad = int(np.argmax((gate_weights < 0).any(axis=1)))
        return bad, f"weights {gate_weights[bad].tolist()} must not be negative"
    return None


def _join_weights(own: _LayerCells, present: np.ndarray, links: Links, weights: np.ndarray) -> None:
    """Fill ``weights`` [T, K] from cells of encoding "changes"."""
    top_k = weights.shape[1]
    starts = np.concatenate(([0], np.cumsum(own.rows * top_k)))
    low, high = np.empty(int(starts[-1]), np.uint8), np.empty(int(starts[-1]), np.uint8)
    for name, planes in (("gate_weights", low), ("gate_weights_high", high)):
        own.segment.columns[name].gather(own.cells, starts[:-1], own.rows * top_k, planes)
    calls, bits = own.segment.call[own.cells], weights.reshape(-1).view(np.uint16)
    join_weights(low, high, starts, calls, own.segment.row_offsets, links.bounds, links.runs, present, top_k, bits)


def _read_weights(own: _LayerCells, routed: np.ndarray, present: np.ndarray) -> np.ndarray | None:
    column, links = own.segment.columns["gate_weights"], own.segment.links
    lengths = column.lengths(own.cells)
    if len(lengths) and (lengths < 0).all():
        return None
    shape = (len(routed), own.segment.meta.model.top_k)
    weights = (np.empty if present.all() else np.zeros)(shape, np.float16)
    if links is not None and own.segment.meta.encodings.get("gate_weights") == "changes":
        _join_weights(own, present, links, weights)
    else:
        _gather_rows(own, "gate_weights", weights)
    if not routed.all():
        weights[~routed] = 0
    fault = weight_fault(weights, own.segment.meta.routers[own.layer].bias_in_weights)
    if fault:
        raise own.fault("gate_weights", *fault)
    return weights


def _read_scores(own: _LayerCells, routed: np.ndarray) -> np.ndarray:
    """float32 [T, E]; NaN where the trace holds no score."""
    meta, columns = own.segment.meta, own.segment.columns
    num_experts, ids = meta.model.num_experts, id_type(meta.model.num_experts)
    stored = np.dtype(meta.score_dtype)
    subset = columns["score_experts"].lengths(own.cells)
    chosen = np.flatnonzero(subset >= 0)
    width = np.where(subset >= 0, subset // np.dtype(ids).itemsize, num_experts)
    sizes = own.rows * width * stored.itemsize
    starts = np.concatenate(([0], np.cumsum(sizes)))
    flat = np.empty(int(starts[-1]) // stored.itemsize, stored)
    columns["router_scores"].gather(own.cells, starts[:-1], sizes, flat)
    flat = flat.astype(np.float32, copy=False)
    if len(chosen) == 0 and flat.size == len(routed) * num_experts:
        scores = flat.reshape(len(routed), num_experts)
        return _checked_scores(own, scores, routed)
    experts = np.empty(int(width[chosen].sum()), ids)
    expert_starts = np.full(len(own.cells), -1, np.int64)
    expert_starts[chosen] = np.cumsum(width[chosen]) - width[chosen]
    lengths = width[chosen] * experts.itemsize
    columns["score_experts"].gather(own.cells[chosen], expert_starts[chosen] * experts.itemsize, lengths, experts)
    experts = experts.astype(np.uint16, copy=False)
    bad = first_bad_columns(experts, expert_starts, width, num_experts)
    if bad >= 0:
        raise own.fault("score_experts", int(own.first_row[bad]), f"ids must ascend and stay below {num_experts}")
    scores = np.full((len(routed), num_experts), np.nan, np.float32)
    element_starts = starts[:-1] // stored.itemsize
    bad = expand_columns(flat, experts, element_starts, expert_starts, own.first_row, own.rows, width, routed, scores)
    if bad >= 0:
        raise own.fault("router_scores", bad, "a score is not finite")
    return scores


def _checked_scores(own: _LayerCells, scores: np.ndarray, routed: np.ndarray) -> np.ndarray:
    """Hold complete scores [T, E] to be finite; rows that were not routed become NaN."""
    everywhere = bool(routed.all())
    if not everywhere:
        scores[~routed] = 0
    if scores.size:
        largest, _ = widest_bits(scores.reshape(-1).view(np.uint32), SINGLE_MAGNITUDE)
        if largest >= SINGLE_EXPONENT:
            bad = int(np.argmax(~np.isfinite(scores).all(axis=1)))
            raise own.fault("router_scores", bad, "a score is not finite")
    if not everywhere:
        scores[~routed] = np.nan
    return scores
