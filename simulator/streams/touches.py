"""Numba primitives that walk the experts of rows in the order they are touched.

R rows, K slots a row. Imports numba and NumPy only. Nothing here checks its input: ids are below E and offsets ascend because
``stream.py`` made sure of it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from tracer.jit import njit

# Rows sorted side by side.
LANES = 32


@lru_cache(maxsize=64)
def sorting_network(width: int) -> np.ndarray:
    """Pairs of places to compare and exchange that sort ``width`` numbers, int64 [N, 2], the smaller place first.

    Source: K. E. Batcher, "Sorting networks and their applications", AFIPS SJCC 1968: odd-even merges, also of widths that are
    no power of two.
    """
    pairs = []
    half = 1
    while half < width:
        step = half
        while step:
            for low in range(step % half, width - step, 2 * step):
                for at in range(low, min(low + step, width - step)):
                    if at // (2 * half) == (at + step) // (2 * half):
                        pairs.append((at, at + step))
            step //= 2
        half *= 2
    return np.array(pairs, np.int64).reshape(-1, 2)


@njit
def touches_in_order(
    slots, count, network, full, keys, tile, row_offsets, num_experts, offsets, experts, tokens, last_touch
):
    """Fill the arrays of a stream; return -1, or the first row that lists an expert twice.

    ``slots`` are the ids [R * K], the bits of the gate weights [R * K] (empty: all tie), K, and the bits of a weight of -0.
    ``network`` sorts K numbers, ``full`` says that no row uses fewer; ``keys`` [slots of the longest forward] and ``tile``
    [K, LANES] are working memory.
    """
    width, eight = np.uint64(slots[2]), np.uint64(8)
    # The row that touched an expert last, and how many rows of the forward have.
    latest = np.full(num_experts, -1, np.int64)
    load = np.zeros(num_experts, np.uint32)
    place = np.zeros(num_experts, np.uint16)
    last = np.uint64(0)
    for f in range(len(row_offsets) - 1):
        start, first = last, row_offsets[f]
        rows = np.uint64(row_offsets[f + 1] - first)
        _fill_keys(slots, count, full, first, rows, keys)
        if width == eight:
            _sort_rows_of_eight(keys, rows)
        else:
            _sort_rows_in_lanes(network, width, rows, keys, tile)
        for t in range(rows):
            row = first + np.int64(t)
            used = np.uint64(count[row])
            # Eight is what most models use, and a number known beforehand makes the walks faster.
            if used == eight:
                last, twice = _touch(keys, t * width, eight, row, first, latest, load, experts, last)
            else:
                last, twice = _touch(keys, t * width, used, row, first, latest, load, experts, last)
            if twice:
                return row
        rank = np.uint64(0)
        for t in range(rows):
            row = first + np.int64(t)
            used = np.uint64(count[row])
            if used == eight:
                rank = _rank(keys, t * width, eight, row, latest, place, rank)
            else:
                rank = _rank(keys, t * width, used, row, latest, place, rank)
        for entry in range(start, last):
            e = np.uint64(experts[entry])
            tokens[entry] = load[e]
            last_touch[entry] = place[e]
            load[e] = 0
        offsets[f + 1] = last
    return -1


@njit
def touches_in_any_order(ids, count, width, row_offsets, num_experts, offsets, experts, tokens, last_touch):
    """As :func:`touches_in_order`, but rows go through their slots as they are, and last touches are taken for the first."""
    latest = np.full(num_experts, -1, np.int64)
    load = np.zeros(num_experts, np.uint32)
    last = np.uint64(0)
    for f in range(len(row_offsets) - 1):
        start, first = last, row_offsets[f]
        for row in range(first, row_offsets[f + 1]):
            slot, used = np.uint64(row) * width, np.uint64(count[row])
            last, twice = _touch(ids, slot, used, row, first, latest, load, experts, last)
            if twice:
                return row
        for entry in range(start, last):
            e = np.uint64(experts[entry])
            tokens[entry] = load[e]
            last_touch[entry] = entry - start
            load[e] = 0
        offsets[f + 1] = last
    return -1


@njit
def _touch(keys, slot, used, row, first, latest, load, experts, last):
    """Touch a row's experts; where the next new entry of the stream goes, and whether an expert came twice.

    Hits and misses are as good as random to a branch predictor, so there is no branch: every slot is written to where the next
    new entry goes, and stays there if it is one. Unsigned indices spare the test for negative ones.
    """
    twice = False
    for at in range(slot, slot + used):
        e = np.uint64(keys[at]) & np.uint64(0xFFFF)
        before = latest[e]
        latest[e] = row
        load[e] += np.uint32(1)
        twice |= before == row
        experts[last] = e
        last += np.uint64(before < first)
    return last, twice


@njit
def _rank(keys, slot, used, row, latest, place, rank):
    """Give the experts a row is the last to touch their ranks, from ``rank`` on."""
    for at in range(slot, slot + used):
        e = np.uint64(keys[at]) & np.uint64(0xFFFF)
        place[e] = rank
        rank += np.uint64(latest[e] == row)
    return rank


@njit
def _fill_keys(slots, count, full, first, rows, keys):
    """Keys of rows [rows * K] that sort by falling weight, then rising id, unused slots last; their low 16 bits are the id."""
    ids, bits, width, lowest = slots
    # Of the weights' own width, so that the compiler sees that 32 bits hold what is computed in 64.
    negative = np.uint64(lowest)
    own = ids[first * width : (first + np.int64(rows)) * width]
    if len(bits) == 0:
        for j in range(np.uint64(len(own))):
            keys[j] = own[j]
    else:
        weights = bits[first * width : (first + np.int64(rows)) * width]
        for j in range(np.uint64(len(own))):
            # Negative numbers are stored by magnitude; one less makes -0 tie with 0.
            high = np.uint64(weights[j])
            high = high - np.uint64(1) if high >= negative else (negative - np.uint64(1)) ^ high
            keys[j] = (high << np.uint64(16)) | np.uint64(own[j])
    if not full:
        for t in range(np.int64(rows)):
            for k in range(count[first + t], width):
                keys[t * width + k] = ~np.uint64(0)


@njit
def _sort_rows_in_lanes(network, width, rows, keys, tile):
    """Sort rows of keys; a row is a lane of the tile, so a step of the sorting network is a vector operation."""
    lanes = np.uint64(LANES)
    for start in range(np.uint64(0), rows, lanes):
        some = min(lanes, rows - start)
        own = keys[start * width : (start + some) * width]
        for k in range(width):
            lane = tile[k]
            for i in range(some):
                lane[i] = own[i * width + k]
        for n in range(len(network)):
            upper, lower = network[n, 0], network[n, 1]
            for i in range(lanes):
                x, y = tile[upper, i], tile[lower, i]
                tile[upper, i] = x if x < y else y
                tile[lower, i] = y if x < y else x
        for k in range(width):
            lane = tile[k]
            for i in range(some):
                own[i * width + k] = lane[i]


@njit
def _sort_rows_of_eight(keys, rows):
    """Sort rows of eight keys by the same network, written out, so that they stay in registers."""
    one, two, three, four = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4)
    five, six, seven, eight = np.uint64(5), np.uint64(6), np.uint64(7), np.uint64(8)
    for t in range(rows):
        at = t * eight
        a, b, c, d = keys[at], keys[at + one], keys[at + two], keys[at + three]
        e, f, g, h = keys[at + four], keys[at + five], keys[at + six], keys[at + seven]
        (a, b), (c, d), (e, f), (g, h) = _in_order(a, b), _in_order(c, d), _in_order(e, f), _in_order(g, h)
        (a, c), (b, d), (e, g), (f, h) = _in_order(a, c), _in_order(b, d), _in_order(e, g), _in_order(f, h)
        (b, c), (f, g) = _in_order(b, c), _in_order(f, g)
        (a, e), (b, f), (c, g), (d, h) = _in_order(a, e), _in_order(b, f), _in_order(c, g), _in_order(d, h)
        (c, e), (d, f) = _in_order(c, e), _in_order(d, f)
        (b, c), (d, e), (f, g) = _in_order(b, c), _in_order(d, e), _in_order(f, g)
        keys[at], keys[at + one], keys[at + two], keys[at + three] = a, b, c, d
        keys[at + four], keys[at + five], keys[at + six], keys[at + seven] = e, f, g, h


@njit
def _in_order(one, other):
    return (one if one < other else other), (other if one < other else one)
