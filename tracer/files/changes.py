"""Kernels of encoding "changes": cells as what differs from the linked rows (:mod:`tracer.files.links`).

Ids: column ``changed`` holds a bit for every slot, ``expert_ids`` the ids of the slots whose bit is set. Of a row without a
link all bits are set, or none when it is all 0, and its ids stand as differences, modulo their type, to the one before.
Weights: the difference d, modulo 2^16, of a float16's bits to those in the same slot of the linked row, 0 without one, as
2d or, where d counts as negative, -2d - 1; low bytes in ``gate_weights``, high bytes in ``gate_weights_high``.

Shapes: M = cells, F = calls, R = runs, K = experts a row, S = rows of all cells in stored order, T = rows of a segment.
"""

from __future__ import annotations

import numpy as np

from tracer.files.links import FIRST, LAST, LINK, LINK_CALL
from tracer.jit import njit

# what is wrong with a cell
BITS, TOO_FEW, TOO_MANY = 1, 2, 3
LOWEST_BIT = np.array([0] + [(n & -n).bit_length() - 1 for n in range(1, 256)], np.uint8)
# byte j is 1 where bit j is set
SPREAD = np.array([sum(((n >> j) & 1) << (8 * j) for j in range(8)) for n in range(256)], np.uint64)


@njit
def _link_base(runs, r, layer, starts, cell_of, row_offsets):
    """What to add to a row of run ``r`` to get the stored row it is linked with; so small for none that a sum is negative."""
    earlier = runs[r, LINK_CALL]
    if runs[r, LINK] < 0 or cell_of[layer, earlier] < 0:
        return -(1 << 62)
    return starts[cell_of[layer, earlier]] - row_offsets[earlier] + runs[r, LINK] - runs[r, FIRST]


@njit
def fill_unrouted(values, routed, starts, call, layer, cell_of, row_offsets, bounds, runs):
    """Make rows that were not routed repeat their linked row, or 0, so that nothing has to be stored of them.

    Parameters
    ----------
    values : any type [S, K]
    routed : bool [S]
    starts : int64 [M + 1]
        First row of each cell in ``values``.
    call, layer : int64 [M]
        Call of each cell and number of its layer, a row of ``cell_of``.
    cell_of : int64 [layers, F]
        Cell of a layer and call, -1 for none.
    row_offsets : int64 [F + 1]
        First token row of each call.
    bounds, runs : see Links
    """
    for m in range(len(call)):
        base = starts[m] - row_offsets[call[m]]
        for r in range(bounds[call[m]], bounds[call[m] + 1]):
            source = _link_base(runs, r, layer[m], starts, cell_of, row_offsets)
            for t in range(runs[r, FIRST], runs[r, LAST]):
                if not routed[base + t]:
                    for k in range(values.shape[1]):
                        values[base + t, k] = values[source + t, k] if source + t >= 0 else 0


@njit
def split_changes(
    rows, starts, call, layer, cell_of, row_offsets, bounds, runs, changed_starts, changed, ids, id_starts
):
    """Write the cells of ``rows`` [S, K] as bitmaps and the ids their set bits stand for.

    Parameters
    ----------
    starts, call, layer, cell_of, row_offsets, bounds, runs
        As in :func:`fill_unrouted`.
    changed_starts : int64 [M + 1]
        First byte of each cell in ``changed``.
    changed : uint8 [any]
        All 0.
    ids : like rows [S * K]
        Filled from its beginning.
    id_starts : int64 [M + 1]
        Filled with the first id of each cell.
    """
    top_k = rows.shape[1]
    place = 0
    for m in range(len(call)):
        base = starts[m] - row_offsets[call[m]]
        bit = 8 * changed_starts[m]
        for r in range(bounds[call[m]], bounds[call[m] + 1]):
            source = _link_base(runs, r, layer[m], starts, cell_of, row_offsets)
            for t in range(runs[r, FIRST], runs[r, LAST]):
                linked = source + t >= 0
                empty = not linked
                for k in range(top_k):
                    empty &= rows[base + t, k] == 0
                for k in range(top_k):
                    expert = rows[base + t, k]
                    if linked:
                        differs = expert != rows[source + t, k]
                    else:
                        differs = not empty
                        if k > 0:
                            expert -= rows[base + t, k - 1]
                    if differs:
                        changed[bit >> 3] |= np.uint8(1 << (bit & 7))
                        ids[place] = expert
                        place += 1
                    bit += 1
        id_starts[m + 1] = place


@njit
def split_changes_of_eight(
    rows, starts, call, layer, cell_of, row_offsets, bounds, runs, changed_starts, changed, ids, id_starts
):
    """:func:`split_changes` for rows of eight uint8 ids, each one uint64: ``rows`` uint64 [S]."""
    low, high = np.uint64(0x7F7F7F7F7F7F7F7F), np.uint64(0x8080808080808080)
    # times one flag a byte, the top byte holds one bit a byte
    gather, one, seven, top = np.uint64(0x0102040810204080), np.uint64(1), np.uint64(7), np.uint64(56)
    place = 0
    for m in range(len(call)):
        base = starts[m] - row_offsets[call[m]]
        bitmap = changed_starts[m] - row_offsets[call[m]]
        for r in range(bounds[call[m]], bounds[call[m] + 1]):
            source = _link_base(runs, r, layer[m], starts, cell_of, row_offsets)
            for t in range(runs[r, FIRST], runs[r, LAST]):
                row = rows[base + t]
                if source + t >= 0:
                    differs = row ^ rows[source + t]
                    flags = ((((differs & low) + low) | differs) & high) >> seven
                    mask = (flags * gather) >> top
                    changed[bitmap + t] = mask
                    while mask != 0:
                        shift = np.uint64(LOWEST_BIT[mask]) << np.uint64(3)
                        ids[place] = np.uint8((row >> shift) & np.uint64(255))
                        place += 1
                        mask &= mask - one
                elif row != 0:
                    changed[bitmap + t] = 255
                    before = np.uint64(0)
                    for k in range(8):
                        expert = (row >> np.uint64(8 * k)) & np.uint64(255)
                        ids[place + k] = np.uint8((expert - before) & np.uint64(255))
                        before = expert
                    place += 8
        id_starts[m + 1] = place


@njit
def split_weights(bits, starts, call, layer, cell_of, row_offsets, bounds, runs, low, high):
    """Write float16 ``bits`` uint16 [S * K] as coded differences: ``low`` and ``high`` uint8 [S * K], rows as they stand."""
    top_k = len(bits) // starts[len(call)]
    for m in range(len(call)):
        base = starts[m] - row_offsets[call[m]]
        for r in range(bounds[call[m]], bounds[call[m] + 1]):
            source = _link_base(runs, r, layer[m], starts, cell_of, row_offsets)
            first, last = runs[r, FIRST], runs[r, LAST]
            # loops over slices from 0 on become vector code, indices with an offset do not
            begin, end = (base + first) * top_k, (base + last) * top_k
            own, own_low, own_high = bits[begin:end], low[begin:end], high[begin:end]
            if source + first >= 0:
                earlier = bits[(source + first) * top_k : (source + last) * top_k]
                for i in range(len(own)):
                    step = np.uint16(own[i] - earlier[i])
                    coded = np.uint16(step << 1) ^ np.uint16(0 - (step >> 15))
                    own_low[i] = np.uint8(coded & 255)
                    own_high[i] = np.uint8(coded >> 8)
            else:
                for i in range(len(own)):
                    coded = np.uint16(own[i] << 1) ^ np.uint16(0 - (own[i] >> 15))
                    own_low[i] = np.uint8(coded & 255)
                    own_high[i] = np.uint8(coded >> 8)


@njit
def join_changes(changed, changed_starts, ids, id_starts, calls, row_offsets, bounds, runs, present, out):
    """Undo :func:`split_changes` for one layer.

    Parameters
    ----------
    changed : uint8 [any]
        Bitmaps of the cells; their lengths are checked by the caller.
    changed_starts : int64 [M + 1]
    ids : uint8 or uint16 [any]
    id_starts : int64 [M + 1]
    calls : int64 [M]
        Call of each cell, ascending.
    row_offsets : int64 [F + 1]
        First row of each call in ``out``.
    bounds, runs : see Links
    present : bool [F]
        Whether the layer ran in a call.
    out : like ids [T, K]

    Returns
    -------
    int
        -1, or 4 m + what is wrong with cell m: :data:`BITS`, :data:`TOO_FEW` or :data:`TOO_MANY`.
    """
    top_k = out.shape[1]
    for m in range(len(calls)):
        bit, place, end = 8 * changed_starts[m], id_starts[m], id_starts[m + 1]
        for r in range(bounds[calls[m]], bounds[calls[m] + 1]):
            link, first = runs[r, LINK], runs[r, FIRST]
            linked = link >= 0 and present[runs[r, LINK_CALL]]
            for t in range(first, runs[r, LAST]):
                count = 0
                for k in range(top_k):
                    differs = (changed[(bit + k) >> 3] >> ((bit + k) & 7)) & 1
                    count += differs
                    if linked:
                        out[t, k] = out[link + t - first, k]
                    else:
                        out[t, k] = 0
                    if differs:
                        if place == end:
                            return 4 * m + TOO_FEW
                        out[t, k] = ids[place]
                        if not linked and k > 0:
                            out[t, k] += out[t, k - 1]
                        place += 1
                bit += top_k
                if not linked and count != 0 and count != top_k:
                    return 4 * m + BITS
        if place != end:
            return 4 * m + TOO_MANY
    return -1


@njit
def join_changes_of_eight(changed, changed_starts, ids, id_starts, calls, row_offsets, bounds, runs, present, out):
    """:func:`join_changes` for rows of eight uint8 ids, each one uint64: ``out`` uint64 [T].

    ``ids`` must have room for eight more than the cells hold.
    """
    one, byte, top, ones = np.uint64(1), np.uint64(255), np.uint64(56), np.uint64(0x0101010101010101)
    for m in range(len(calls)):
        # unsigned, and slices from 0 on: an index that may be negative takes a comparison more
        place, end = np.uint64(id_starts[m]), np.uint64(id_starts[m + 1])
        bitmap = changed_starts[m] - row_offsets[calls[m]]
        for r in range(bounds[calls[m]], bounds[calls[m] + 1]):
            link, first, last = runs[r, LINK], runs[r, FIRST], runs[r, LAST]
            masks, rows = changed[bitmap + first : bitmap + last], out[first:last]
            if link >= 0 and present[runs[r, LINK_CALL]]:
                earlier = out[link : link + last - first]
                for i in range(len(rows)):
                    flags = SPREAD[masks[i]]
                    # times 1 << 8j, an id moves into slot j; few rows have more than two new ids, so two go without a branch
                    rest = flags & (flags - one)
                    row = earlier[i] & ~(flags * byte)
                    row |= np.uint64(ids[place]) * (flags & (~flags + one))
                    row |= np.uint64(ids[place + one]) * (rest & (~rest + one))
                    rest &= rest - one
                    later = place + one + one
                    while rest != 0:
                        row |= np.uint64(ids[later]) * (rest & (~rest + one))
                        rest &= rest - one
                        later += one
                    # the flags' sum
                    place += (flags * ones) >> top
                    if place > end:
                        return 4 * m + TOO_FEW
                    rows[i] = row
                continue
            for i in range(len(rows)):
                row = np.uint64(0)
                if masks[i] == 255:
                    if place + np.uint64(8) > end:
                        return 4 * m + TOO_FEW
                    expert = np.uint64(0)
                    for k in range(8):
                        expert = (expert + np.uint64(ids[place])) & byte
                        row |= expert << np.uint64(8 * k)
                        place += one
                elif masks[i] != 0:
                    return 4 * m + BITS
                rows[i] = row
        if place != end:
            return 4 * m + TOO_MANY
    return -1


@njit
def join_weights(low, high, starts, calls, row_offsets, bounds, runs, present, top_k, out):
    """Undo :func:`split_weights` for one layer into ``out`` uint16 [T * K]; ``starts`` [M + 1] counts numbers of ``low``."""
    for m in range(len(calls)):
        cell = starts[m] - row_offsets[calls[m]] * top_k
        for r in range(bounds[calls[m]], bounds[calls[m] + 1]):
            link, first, last = runs[r, LINK], runs[r, FIRST], runs[r, LAST]
            begin, end = first * top_k, last * top_k
            own, own_low, own_high = out[begin:end], low[cell + begin : cell + end], high[cell + begin : cell + end]
            if link >= 0 and present[runs[r, LINK_CALL]]:
                earlier = out[link * top_k : link * top_k + end - begin]
                for i in range(len(own)):
                    coded = np.uint16(own_low[i]) | np.uint16(np.uint16(own_high[i]) << 8)
                    own[i] = np.uint16(earlier[i] + (np.uint16(coded >> 1) ^ np.uint16(0 - (coded & 1))))
            else:
                for i in range(len(own)):
                    coded = np.uint16(own_low[i]) | np.uint16(np.uint16(own_high[i]) << 8)
                    own[i] = np.uint16(coded >> 1) ^ np.uint16(0 - (coded & 1))
