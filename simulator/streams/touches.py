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
    slots, count, network, flat, tile, row_offsets, largest, num_experts, offsets, experts, tokens, last_touch
):
    """Fill the arrays of a stream; return -1, or the first row that lists an expert twice.

    ``slots``, ``network``, ``flat`` and ``tile`` are those of :func:`sort_rows`; ``largest`` is how many slots a forward has at
    most. Hits and misses are as good as random to a branch predictor, so the walks hold no branch: every slot is written to
    where the next new entry goes, and stays there if it is one.
    """
    last_row = np.full(num_experts, -1, np.int64)
    load = np.zeros(num_experts, np.uint32)
    place = np.zeros(num_experts, np.uint16)
    order = np.empty(largest + 1, np.uint16)
    # Unsigned indices spare the test for negative ones.
    last = np.uint64(0)
    for f in range(len(row_offsets) - 1):
        start, first = last, row_offsets[f]
        at = np.uint64(0)
        for tile_start in range(first, row_offsets[f + 1], LANES):
            rows = min(LANES, row_offsets[f + 1] - tile_start)
            sort_rows(slots, count, network, tile_start, rows, flat, tile)
            for i in range(np.uint64(rows)):
                t = tile_start + np.int64(i)
                twice = False
                for k in range(np.uint64(count[t])):
                    e = np.uint64(tile[k, i] & np.uint32(0xFFFF))
                    order[at] = e
                    before = last_row[e]
                    last_row[e] = t
                    load[e] += np.uint32(1)
                    twice |= before == t
                    experts[last] = e
                    last += np.uint64(before < first)
                    at += np.uint64(1)
                if twice:
                    return t
        at = np.uint64(0)
        rank = np.uint64(0)
        for row in range(first, row_offsets[f + 1]):
            for _ in range(np.uint64(count[row])):
                e = np.uint64(order[at])
                place[e] = rank
                rank += np.uint64(last_row[e] == row)
                at += np.uint64(1)
        for entry in range(start, last):
            e = np.uint64(experts[entry])
            tokens[entry] = load[e]
            last_touch[entry] = place[e]
            load[e] = 0
        offsets[f + 1] = last
    return -1


@njit
def sort_rows(slots, count, network, start, rows, flat, tile):
    """Order the slots of up to ``LANES`` rows by falling weight, then rising id, as keys in ``tile`` [K, LANES].

    The low 16 bits of a key are the id. A row is a lane, so a step of the sorting network (pairs of slots [N, 2]) is a vector
    operation. ``slots`` are the ids [R * K], the bits of the gate weights [R * K] (empty: all tie), K, and the bits of a weight
    of -0. ``flat`` [LANES * K] is working memory.
    """
    ids, bits, width, lowest = slots
    # Of the weights' own width, so that the compiler sees that 32 bits hold what is computed in 64.
    negative = np.uint64(lowest)
    least, most = width, 0
    for i in range(rows):
        least = min(least, int(count[start + i]))
        most = max(most, int(count[start + i]))
    own = ids[start * width : (start + rows) * width]
    if len(bits) == 0:
        for j in range(np.uint64(len(own))):
            flat[j] = own[j]
    else:
        weights = bits[start * width : (start + rows) * width]
        for j in range(np.uint64(len(own))):
            # Negative numbers are stored by magnitude; one less makes -0 tie with 0.
            high = np.uint64(weights[j])
            high = high - np.uint64(1) if high >= negative else (negative - np.uint64(1)) ^ high
            flat[j] = (high << np.uint64(16)) | np.uint64(own[j])
    for k in range(np.uint64(most)):
        lane = tile[k]
        for i in range(np.uint64(rows)):
            lane[i] = flat[i * np.uint64(width) + k]
    if least < most:
        for i in range(rows):
            for k in range(count[start + i], most):
                tile[k, i] = ~np.uint64(0)
    for n in range(len(network)):
        upper, lower = network[n, 0], network[n, 1]
        # Slots no row of these uses hold the largest key already.
        if lower >= most:
            continue
        for i in range(np.uint64(LANES)):
            x, y = tile[upper, i], tile[lower, i]
            tile[upper, i] = x if x < y else y
            tile[lower, i] = y if x < y else x


@njit
def touches_in_any_order(ids, count, width, row_offsets, num_experts, offsets, experts, tokens, last_touch):
    """As :func:`touches_in_order`, but rows go through their slots as they are, and last touches are taken for the first."""
    last_row = np.full(num_experts, -1, np.int64)
    load = np.zeros(num_experts, np.uint32)
    last = np.uint64(0)
    for f in range(len(row_offsets) - 1):
        start, first = last, row_offsets[f]
        for t in range(first, row_offsets[f + 1]):
            twice = False
            slot = np.uint64(t) * width
            for at in range(slot, slot + np.uint64(count[t])):
                e = np.uint64(ids[at])
                before = last_row[e]
                last_row[e] = t
                load[e] += np.uint32(1)
                twice |= before == t
                experts[last] = e
                last += np.uint64(before < first)
            if twice:
                return t
        for at in range(start, last):
            e = np.uint64(experts[at])
            tokens[at] = load[e]
            last_touch[at] = at - start
            load[e] = 0
        offsets[f + 1] = last
    return -1
