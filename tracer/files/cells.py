"""Kernels over the binary cells of ``routing``: lay out, check, choose the columns of level "active".

A cell is one call's array for one layer (trace-format.md). Shapes: T = rows of a layer over a segment, K = experts a row,
E = experts of a layer, C = score columns of a cell. Offsets are int64 and count bytes unless said otherwise.
"""

from __future__ import annotations

import numpy as np

from tracer.jit import njit


@njit
def copy_cells(source, offsets, cells, starts, out):
    """Copy cells into their places.

    Parameters
    ----------
    source : uint8 [any]
        Bytes of all cells of a chunk.
    offsets : int64 [cells of the chunk + 1]
    cells : int64 [M]
        The cells to copy, indices into ``offsets``.
    starts : int64 [M]
        First byte of each in ``out``.
    out : uint8 [any]
    """
    for m in range(len(cells)):
        first = offsets[cells[m]]
        length = offsets[cells[m] + 1] - first
        # loops over slices from 0 on become vector code, indices with an offset do not
        cell, place = source[first : first + length], out[starts[m] : starts[m] + length]
        for i in range(length):
            place[i] = cell[i]


@njit
def join_planes(source, offsets, cells, starts, out, itemsize):
    """Like :func:`copy_cells` for cells that hold all first bytes of their numbers, then all second bytes, and so on.

    ``out`` is uint16 when ``itemsize`` is 2, else uint8; ``starts`` count bytes all the same.
    """
    for m in range(len(cells)):
        first = offsets[cells[m]]
        numbers = (offsets[cells[m] + 1] - first) // itemsize
        if out.itemsize == 2:
            low, high = source[first : first + numbers], source[first + numbers : first + 2 * numbers]
            place = out[starts[m] // 2 : starts[m] // 2 + numbers]
            for i in range(numbers):
                place[i] = np.uint16(low[i]) | (np.uint16(high[i]) << np.uint16(8))
        else:
            for b in range(itemsize):
                for i in range(numbers):
                    out[starts[m] + i * itemsize + b] = source[first + b * numbers + i]


@njit
def split_planes(source, offsets, out, itemsize):
    """Write cells as byte planes, the inverse of :func:`join_planes`; ``offsets`` bound them in bytes.

    ``source`` is uint16 when ``itemsize`` is 2, else uint8; ``out`` is uint8.
    """
    for c in range(len(offsets) - 1):
        first = offsets[c]
        numbers = (offsets[c + 1] - first) // itemsize
        if source.itemsize == 2:
            cell = source[first // 2 : first // 2 + numbers]
            low, high = out[first : first + numbers], out[first + numbers : first + 2 * numbers]
            for i in range(numbers):
                low[i] = np.uint8(cell[i] & np.uint16(255))
            for i in range(numbers):
                high[i] = np.uint8(cell[i] >> np.uint16(8))
        else:
            for b in range(itemsize):
                for i in range(numbers):
                    out[first + b * numbers + i] = source[first + i * itemsize + b]


@njit
def unpack_routed(source, offsets, cells, starts, rows, out):
    """Unpack bitmap cells (little bit order) of ``rows[m]`` bits into bool ``out`` from ``starts[m]`` on."""
    for m in range(len(cells)):
        first = offsets[cells[m]]
        for i in range(rows[m]):
            out[starts[m] + i] = (source[first + (i >> 3)] >> (i & 7)) & 1 == 1


@njit
def repeats_in_eights(rows):
    """Whether any row of eight uint8 ids, read as one uint64 [T], holds an id twice.

    Each rotation by 1 to 4 bytes lines up every pair of slots once; a zero byte in the exclusive or is a repeat.
    """
    ones = np.uint64(0x0101010101010101)
    high = np.uint64(0x8080808080808080)
    found = np.uint64(0)
    for t in range(len(rows)):
        ids = rows[t]
        for shift in (8, 16, 24, 32):
            other = ids ^ ((ids << np.uint64(shift)) | (ids >> np.uint64(64 - shift)))
            found |= (other - ones) & ~other & high
    return found != 0


@njit
def first_bad_row(expert_ids, count, num_experts):
    """First row whose ids are out of range or not distinct, -1 if none. ``expert_ids`` [T, K], ``count`` uint8 [T]."""
    seen = np.full(num_experts, -1, np.int64)
    for t in range(expert_ids.shape[0]):
        bad = False
        for k in range(count[t]):
            expert = expert_ids[t, k]
            if expert >= num_experts:
                return t
            bad |= seen[expert] == t
            seen[expert] = t
        if bad:
            return t
    return -1


@njit
def widest_bits(bits, magnitude):
    """Largest magnitude pattern and largest raw pattern of floats given as unsigned ``bits`` [any].

    A float is finite when its magnitude bits stay under the exponent mask, and negative when its raw bits exceed the
    sign bit; both follow from two maxima.
    """
    largest = bits[0] & magnitude
    raw = bits[0]
    for i in range(len(bits)):
        largest = max(largest, bits[i] & magnitude)
        raw = max(raw, bits[i])
    return largest, raw


@njit
def expand_columns(scores, experts, score_starts, expert_starts, first_row, rows, columns, routed, out):
    """Spread the score columns a cell holds over all E, for level "active"; first row with a number not finite, else -1.

    Parameters
    ----------
    scores : float32 [any]
        Numbers of all cells; cell m is [rows[m], columns[m]] from ``score_starts[m]`` on.
    experts : uint16 [any]
        Column ids of all cells; those of cell m stand from ``expert_starts[m]`` on, -1 there meaning all E in order.
    first_row : int64 [M]
        First row of cell m in ``out``.
    routed : bool [T]
        Rows that went through the router; the others stay as they are.
    out : float32 [T, E]
        Filled with NaN by the caller.
    """
    for m in range(len(rows)):
        for r in range(rows[m]):
            t = first_row[m] + r
            if routed[t]:
                at = score_starts[m] + r * columns[m]
                for c in range(columns[m]):
                    expert = c if expert_starts[m] < 0 else experts[expert_starts[m] + c]
                    if not np.isfinite(scores[at + c]):
                        return t
                    out[t, expert] = scores[at + c]
    return -1


@njit
def first_bad_columns(experts, starts, columns, num_experts):
    """First cell whose column ids are not ascending or out of range, -1 if none; bounds as in :func:`expand_columns`."""
    for m in range(len(starts)):
        if starts[m] < 0:
            continue
        last = np.int64(-1)
        for c in range(columns[m]):
            expert = np.int64(experts[starts[m] + c])
            if expert <= last or expert >= num_experts:
                return m
            last = expert
    return -1


@njit
def _mark_active(expert_ids, scores, bias, top_k, routed, active):
    num_experts = scores.shape[1]
    best = np.empty(top_k, np.float32)
    chosen = np.empty(top_k, np.int64)
    for t in range(len(scores)):
        if not routed[t]:
            continue
        for k in range(expert_ids.shape[1]):
            active[expert_ids[t, k]] = True
        size = 0
        for e in range(num_experts):
            value = scores[t, e] + bias[e]
            if size == top_k and value <= best[top_k - 1]:
                continue
            place = size if size < top_k else top_k - 1
            while place > 0 and best[place - 1] < value:
                best[place] = best[place - 1]
                chosen[place] = chosen[place - 1]
                place -= 1
            best[place] = value
            chosen[place] = e
            size = min(size + 1, top_k)
        for k in range(size):
            active[chosen[k]] = True


def active_columns(
    expert_ids: np.ndarray,
    router_scores: np.ndarray,
    expert_bias: np.ndarray | None = None,
    routed: np.ndarray | None = None,
) -> np.ndarray:
    """Score columns that capture level "active" keeps for one call and layer.

    The union over the routed rows of the recorded ids and of the plain top-K (no groups) by selection score, that is score
    plus bias; ties go to the lowest expert id (trace-format.md, level "active").

    Parameters
    ----------
    expert_ids : int [n, K]
    router_scores : float32 [n, E]
        After the score function, before the bias.
    expert_bias : float32 [E] or None
    routed : bool [n] or None
        None when every row was routed.

    Returns
    -------
    int64 [C]
        Ascending expert ids.

    Raises
    ------
    ValueError
        When shapes disagree or an id is out of range.
    """
    scores = np.ascontiguousarray(router_scores, np.float32)
    ids = np.ascontiguousarray(expert_ids, np.int64)
    rows, num_experts = scores.shape
    routed = np.ones(rows, np.bool_) if routed is None else np.ascontiguousarray(routed, np.bool_)
    bias = np.zeros(num_experts, np.float32) if expert_bias is None else np.ascontiguousarray(expert_bias, np.float32)
    if ids.ndim != 2 or len(ids) != rows or len(routed) != rows or len(bias) != num_experts:
        raise ValueError("expert_ids, router_scores, expert_bias and routed must agree on rows and experts.")
    kept = ids[routed]
    if kept.size and (kept.min() < 0 or kept.max() >= num_experts):
        raise ValueError(f"expert_ids must lie in 0..{num_experts - 1}.")
    active = np.zeros(num_experts, np.bool_)
    _mark_active(ids, scores, bias, min(ids.shape[1], num_experts), routed, active)
    return np.flatnonzero(active)
