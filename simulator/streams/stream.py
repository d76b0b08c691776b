"""From a selection to the ordered stream of distinct experts of each (forward, layer), in one pass over its slots.

Source: the lookup order of BigMoeOnEdge's replay (github Helldez/BigMoeOnEdge): one lookup per distinct expert of a batch, rows
in order, and a duplicate only promotes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simulator.policy import ExpertStream, Selection
from simulator.streams.touches import LANES, sorting_network, touches_in_any_order, touches_in_order
from tracer.errors import UserError
from tracer.jit import njit


@njit
def _block_unique(ids, count, in_block, part_start, part_stop, part_offsets, num_experts, per_cell, per_part):
    """Distinct experts over the rows of the current block, of each call and of each (call, request) part."""
    in_cell = np.full(num_experts, -1, np.int64)
    in_part = np.full(num_experts, -1, np.int64)
    for f in range(len(part_offsets) - 1):
        of_cell = 0
        for n in range(part_offsets[f], part_offsets[f + 1]):
            of_part = 0
            for t in range(part_start[n], part_stop[n]):
                if not in_block[t]:
                    continue
                for k in range(count[t]):
                    e = ids[t, k]
                    of_part += in_part[e] != n
                    in_part[e] = n
                    of_cell += in_cell[e] != f
                    in_cell[e] = f
            per_part[n] = of_part
        per_cell[f] = of_cell


def _slots(selection: Selection) -> tuple[np.ndarray, np.ndarray, int, np.generic]:
    ids, weights = np.ascontiguousarray(selection.expert_ids).reshape(-1), selection.gate_weights
    if weights is None:
        return ids, np.zeros(0, np.uint16), selection.expert_ids.shape[1], np.uint16(1 << 15)
    bits = np.uint16 if weights.dtype == np.float16 else np.uint32
    kept = np.ascontiguousarray(weights, np.float16 if bits is np.uint16 else np.float32)
    return ids, kept.reshape(-1).view(bits), selection.expert_ids.shape[1], bits(1 << 8 * kept.itemsize - 1)


def check_selection(selection: Selection, rows: int, num_experts: int, policy: str) -> None:
    """Refuse a selection that kernels could not index with.

    Raises
    ------
    UserError
        The arrays have other shapes than [rows, K] and [rows], a row counts more than K experts, or an id is >= E.
    """
    ids, count = selection.expert_ids, selection.count
    if ids.ndim != 2 or len(ids) != rows or count.shape != (rows,):
        raise UserError(
            f"The routing policy {policy} answered {ids.shape} experts for {rows} rows; return one row each."
        )
    if ids.dtype not in (np.uint8, np.uint16) or count.dtype != np.uint8:
        raise UserError(f"The routing policy {policy} must return ids as uint8 or uint16 and counts as uint8.")
    if selection.gate_weights is not None and selection.gate_weights.shape != ids.shape:
        raise UserError(f"The routing policy {policy} must return as many gate weights as experts, {ids.shape}.")
    if rows and (int(count.max()) > ids.shape[1] or (ids.size and int(ids.max()) >= num_experts)):
        raise UserError(
            f"The routing policy {policy} answered an expert of {num_experts} or more, or more than {ids.shape[1]} a row; "
            "its ids must be below the layer's number of experts."
        )


def build_stream(
    selection: Selection,
    row_offsets: np.ndarray,
    layer: int,
    num_experts: int,
    present: np.ndarray | None = None,
    policy: str = "in use",
    ordered: bool = True,
) -> ExpertStream:
    """The stream of one layer: per forward its distinct experts in order of first touch, with their token counts.

    Rows ascending, within a row by descending gate weight, ties to the lowest id (all tie without weights).

    Parameters
    ----------
    selection : Selection
        Experts of the rows, ids [R, K].
    row_offsets : np.ndarray
        int64 [F + 1], rows of each forward.
    layer : int
        Index of the layer in ``Geometry.layers``.
    num_experts : int
        E.
    present : np.ndarray, optional
        bool [F], whether the layer ran in the forward; the others have no cell. By default it ran in all.
    policy : str
        Name of the routing policy, for the error.
    ordered : bool
        Whether entries come in the order described; without, in any, and ``last_touch`` says nothing. For residency policies
        with ``ordered = False``, whose answers do not depend on it.

    Raises
    ------
    UserError
        The selection has the wrong shape, an id out of range, or an expert twice in a row.
    """
    check_selection(selection, int(row_offsets[-1]), num_experts, policy)
    forwards = len(row_offsets) - 1
    width = selection.expert_ids.shape[1]
    full = bool(selection.count.min(initial=width) == width)
    if full:
        slot_offsets = row_offsets * width
    else:
        slot_offsets = np.concatenate(([0], np.cumsum(selection.count, dtype=np.int64)))[row_offsets]
    room = int(np.minimum(np.diff(slot_offsets), num_experts).sum()) + 1
    offsets = np.zeros(forwards + 1, np.int64)
    experts = np.empty(room, np.uint16)
    tokens = np.empty(room, np.uint32)
    last_touch = np.empty(room, np.uint16)
    slots = _slots(selection)
    filled = (offsets, experts, tokens, last_touch)
    if ordered:
        # Room for a key: the bits of a weight over those of an id.
        key = np.uint32 if slots[1].dtype == np.uint16 else np.uint64
        keys = np.empty(int(np.diff(row_offsets).max(initial=0)) * width, key)
        tile, network = np.empty((width, LANES), key), sorting_network(width)
        twice = touches_in_order(slots, selection.count, network, full, keys, tile, row_offsets, num_experts, *filled)
    else:
        twice = touches_in_any_order(slots[0], selection.count, np.uint64(width), row_offsets, num_experts, *filled)
    if twice >= 0:
        raise UserError(
            f"The routing policy {policy} lists an expert twice in row {twice}; a row's experts are distinct."
        )
    total = int(offsets[-1])
    cells = np.arange(forwards) if present is None else np.flatnonzero(present)
    return ExpertStream(
        cell_forward=cells,
        cell_layer=np.full(len(cells), layer, np.int32),
        # Forwards without a cell have no rows that use experts, so the next cell's entries follow directly.
        offsets=np.append(offsets[:-1][cells], total),
        experts=experts[:total],
        tokens=tokens[:total],
        last_touch=last_touch[:total],
    )


def block_unique(
    selection: Selection,
    in_block: np.ndarray,
    parts: tuple[np.ndarray, np.ndarray],
    part_offsets: np.ndarray,
    num_experts: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Distinct experts over the rows of the current block: int64 [F] of each call, int64 [N] of each request in it.

    Parameters
    ----------
    selection : Selection
        Checked by :func:`build_stream` before.
    in_block : np.ndarray
        bool [R].
    parts : tuple
        First row and row after the last of each part, int64 [N] each.
    part_offsets : np.ndarray
        int64 [F + 1], parts of each call.
    num_experts : int
        E.
    """
    per_cell = np.zeros(len(part_offsets) - 1, np.int64)
    per_part = np.zeros(len(parts[0]), np.int64)
    ids = np.ascontiguousarray(selection.expert_ids)
    _block_unique(ids, selection.count, in_block, parts[0], parts[1], part_offsets, num_experts, per_cell, per_part)
    return per_cell, per_part


def merge_streams(streams: Sequence[ExpertStream]) -> ExpertStream:
    """All layers' streams of a segment as one: forwards outermost, layers ascending.

    Parameters
    ----------
    streams : sequence of ExpertStream
        One a layer, layers ascending.
    """
    forward = np.concatenate([s.cell_forward for s in streams])
    sizes = np.concatenate([np.diff(s.offsets) for s in streams])
    # Stable, so layers keep their order.
    order = np.argsort(forward, kind="stable")
    offsets = np.concatenate(([0], np.cumsum(sizes[order])))
    start = np.empty(len(order), np.int64)
    start[order] = offsets[:-1]
    experts = np.empty(offsets[-1], np.uint16)
    tokens = np.empty(offsets[-1], np.uint32)
    last_touch = np.empty(offsets[-1], np.uint16)
    cell = 0
    for s in streams:
        of_layer = start[cell : cell + len(s.cell_forward)]
        _copy_cells(s.offsets, s.experts, s.tokens, s.last_touch, of_layer, experts, tokens, last_touch)
        cell += len(of_layer)
    return ExpertStream(
        cell_forward=forward[order],
        cell_layer=np.concatenate([s.cell_layer for s in streams])[order],
        offsets=offsets,
        experts=experts,
        tokens=tokens,
        last_touch=last_touch,
    )


@njit
def _copy_cells(offsets, experts, tokens, last_touch, start, to_experts, to_tokens, to_last_touch):
    """Copy each cell's entries to where they start."""
    for c in range(len(start)):
        first, to = np.uint64(offsets[c]), np.uint64(start[c])
        entries = range(np.uint64(offsets[c + 1] - offsets[c]))
        # An array a loop, and unsigned indices, make vector operations of them.
        for i in entries:
            to_experts[to + i] = experts[first + i]
        for i in entries:
            to_tokens[to + i] = tokens[first + i]
        for i in entries:
            to_last_touch[to + i] = last_touch[first + i]
