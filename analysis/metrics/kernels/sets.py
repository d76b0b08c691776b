"""Numba kernels over K-sets, held as bits or as words: overlap of two sets, distinct experts of several.

P = parts (denoise forwards of a request), S = positions of a block, W = 64-bit words of an expert set, G = bootstrap
units, L = layers. Sums are added one row after the other in the order of the loops, so they are the same wherever they
run. Nothing here checks its input: ids are below E because the trace's reader made sure of it.
"""

from __future__ import annotations

import numpy as np

from tracer.bits import popcount
from tracer.jit import njit


@njit
def row_bits(ids, count, grid, words):
    """K-sets of the block rows as (bits uint64 [P, S, W], size int64 [P, S]); size 0 where there is no routed row."""
    parts, width = grid.shape
    bits = np.zeros((parts, width, words), np.uint64)
    size = np.zeros((parts, width), np.int64)
    for p in range(parts):
        for j in range(width):
            row = grid[p, j]
            if row >= 0:
                size[p, j] = count[row]
                for k in range(count[row]):
                    e = np.int64(ids[row, k])
                    bits[p, j, e >> 6] |= np.uint64(1) << np.uint64(e & 63)
    return bits, size


@njit
def _shared(left, right):
    """Experts two sets share."""
    total = np.int64(0)
    for w in range(len(left)):
        total += np.int64(popcount(left[w] & right[w]))
    return total


@njit
def pair_sums(bits, size, left, right, cell, pairs, jaccard, kept, before, same):
    """Overlap of sets ``left`` and ``right`` (rows of bits [N, W]), summed into each pair's ``cell``.

    ``pairs``, ``kept`` (experts shared), ``before`` (experts of left) and ``same`` (equal sets) int64, ``jaccard``
    float64 [cells].
    """
    for i in range(len(left)):
        a, b = left[i], right[i]
        if size[a] > 0 and size[b] > 0:
            c = cell[i]
            shared = _shared(bits[a], bits[b])
            pairs[c] += 1
            jaccard[c] += shared / (size[a] + size[b] - shared)
            kept[c] += shared
            before[c] += size[a]
            same[c] += shared == size[a] and shared == size[b]


@njit
def shared_words(left, right, shared):
    """Experts two full K-sets of eight one-byte ids share, uint8 [N]; each set is a word of ``left`` or ``right``
    uint64 [N].

    A byte of the exclusive or of two words is 0 where their slots hold the same id, so the eight rotations of one word
    meet every pair of slots. Adding 127 to a byte's low seven bits sets its top bit unless they are 0, and no sum
    carries into the next byte: the bytes whose top bit stays 0 in any rotation are those found (the exact form of the
    test in Warren, Hacker's Delight, 6-1).
    """
    low = np.uint64(0x7F7F7F7F7F7F7F7F)
    for i in range(len(left)):
        a, b = left[i], right[i]
        x = a ^ b
        unlike = ((x & low) + low) | x
        x = a ^ ((b << np.uint64(8)) | (b >> np.uint64(56)))
        unlike &= ((x & low) + low) | x
        x = a ^ ((b << np.uint64(16)) | (b >> np.uint64(48)))
        unlike &= ((x & low) + low) | x
        x = a ^ ((b << np.uint64(24)) | (b >> np.uint64(40)))
        unlike &= ((x & low) + low) | x
        x = a ^ ((b << np.uint64(32)) | (b >> np.uint64(32)))
        unlike &= ((x & low) + low) | x
        x = a ^ ((b << np.uint64(40)) | (b >> np.uint64(24)))
        unlike &= ((x & low) + low) | x
        x = a ^ ((b << np.uint64(48)) | (b >> np.uint64(16)))
        unlike &= ((x & low) + low) | x
        x = a ^ ((b << np.uint64(56)) | (b >> np.uint64(8)))
        unlike &= ((x & low) + low) | x
        shared[i] = popcount(~(unlike | low))


@njit
def shared_bits(left, right, shared):
    """Experts two sets share, uint8 [N], of bits [N, W]."""
    for i in range(len(left)):
        shared[i] = _shared(left[i], right[i])


@njit
def step_sums(shared, distance, size, state, run_offsets, run_unit, layer, pairs, jaccard, kept, before, same):
    """Overlap of the same position's sets ``distance`` steps apart, summed into [G, L, 4, D].

    ``shared`` uint8 [P - distance, S] compares part p + distance with part p. The third axis is 2 * (known before) +
    (known after): still masked, accepted between, masked again, known in both.
    """
    at = distance - 1
    for r in range(len(run_offsets) - 1):
        g = run_unit[r]
        for p in range(run_offsets[r] + distance, run_offsets[r + 1]):
            q = p - distance
            for j in range(state.shape[1]):
                if size[p, j] > 0 and size[q, j] > 0:
                    c = 2 * state[q, j] + state[p, j]
                    both = np.int64(shared[q, j])
                    pairs[g, layer, c, at] += 1
                    jaccard[g, layer, c, at] += both / (size[q, j] + size[p, j] - both)
                    kept[g, layer, c, at] += both
                    before[g, layer, c, at] += size[q, j]
                    same[g, layer, c, at] += both == size[q, j] and both == size[p, j]


@njit
def settling_sums(bits, size, state, run_offsets, run_unit, layer, pairs, jaccard):
    """Overlap of a position's set ``lag`` steps after its acceptance with four references, summed into [G, L, 4, lags
    + 1].

    Lag 0 is the accepting forward, the position's last as a mask; lag 1 its first as a real token. References: the
    step before, the set at lag 0, the set at lag 1, and the position's last forward of the block. A reference is never
    the set itself.
    """
    lags = pairs.shape[3] - 1
    for r in range(len(run_offsets) - 1):
        g, start, stop = run_unit[r], run_offsets[r], run_offsets[r + 1]
        for j in range(state.shape[1]):
            for a in range(start, stop - 1):
                if state[a, j] != 0 or state[a + 1, j] != 1:
                    continue
                final = a + 1
                while final + 1 < stop and state[final + 1, j] == 1:
                    final += 1
                for lag in range(min(lags, final - a) + 1):
                    p = a + lag
                    for reference in range(4):
                        q = -1
                        if reference == 0 and p > start and state[p - 1, j] >= 0:
                            q = p - 1
                        elif reference == 1 and lag > 0:
                            q = a
                        elif reference == 2 and lag > 1:
                            q = a + 1
                        elif reference == 3 and p < final:
                            q = final
                        if q >= 0 and size[p, j] > 0 and size[q, j] > 0:
                            shared = _shared(bits[q, j], bits[p, j])
                            pairs[g, layer, reference, lag] += 1
                            jaccard[g, layer, reference, lag] += shared / (size[q, j] + size[p, j] - shared)


@njit
def position_sums(bits, size, state, unit, layer, pairs, jaccard, kept, before):
    """Overlap of positions 1..D apart in one forward, summed into [G, L, 3, D].

    The third axis: both masked, one masked, both known.
    """
    width, distances = state.shape[1], pairs.shape[3]
    for p in range(len(state)):
        g = unit[p]
        for i in range(width):
            if size[p, i] == 0:
                continue
            for d in range(1, min(distances, width - 1 - i) + 1):
                j = i + d
                if size[p, j] == 0:
                    continue
                c = state[p, i] + state[p, j]
                shared = _shared(bits[p, i], bits[p, j])
                pairs[g, layer, c, d - 1] += 1
                jaccard[g, layer, c, d - 1] += shared / (size[p, i] + size[p, j] - shared)
                kept[g, layer, c, d - 1] += shared
                before[g, layer, c, d - 1] += size[p, i]


@njit
def mix(word):
    """A well mixed 64-bit word, or many. Source: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators
    (2014), SplitMix."""
    word = word + np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


@njit
def growth_sums(bits, size, unit, key, points, layer, forwards, unique):
    """Distinct experts against number of rows, summed into [G, L, 2, N]: rows by position, then in random order.

    ``points`` int64 [N], ascending; ``key`` uint64 [P] seeds each part's order, a Fisher-Yates shuffle, the same in
    every layer.
    """
    parts, width, words = bits.shape
    rows = np.empty(width, np.int64)
    seen = np.zeros(words, np.uint64)
    for p in range(parts):
        found = 0
        for j in range(width):
            if size[p, j] > 0:
                rows[found] = j
                found += 1
        g, word = unit[p], key[p]
        for order in range(2):
            # The first order is that of the rows as they stand.
            for n in range(order * (found - 1), 0, -1):
                word = mix(word)
                other = np.int64(word % np.uint64(n + 1))
                rows[n], rows[other] = rows[other], rows[n]
            seen[:] = 0
            total, at = np.int64(0), 0
            for n in range(found):
                for w in range(words):
                    fresh = bits[p, rows[n], w] & ~seen[w]
                    total += np.int64(popcount(fresh))
                    seen[w] |= fresh
                if at < len(points) and points[at] == n + 1:
                    forwards[g, layer, order, at] += 1
                    unique[g, layer, order, at] += total
                    at += 1


@njit
def unique_sums(bits, size, state, unit, layer, forwards, unique, squares, rows_seen):
    """Distinct experts of a forward's block rows, summed into [G, L, 3]: all rows, masked rows, known rows.

    ``squares`` sums their squares. ``rows_seen`` int64 [L, 3, S + 1] counts forwards by rows. Forwards without such
    rows are left out.
    """
    parts, width, words = bits.shape
    sets = np.zeros((3, words), np.uint64)
    rows = np.zeros(3, np.int64)
    for p in range(parts):
        sets[:] = 0
        rows[:] = 0
        for j in range(width):
            if size[p, j] > 0:
                c = 1 + state[p, j]
                rows[0] += 1
                rows[c] += 1
                for w in range(words):
                    sets[0, w] |= bits[p, j, w]
                    sets[c, w] |= bits[p, j, w]
        g = unit[p]
        for c in range(3):
            if rows[c] > 0:
                total = np.int64(0)
                for w in range(words):
                    total += np.int64(popcount(sets[c, w]))
                forwards[g, layer, c] += 1
                unique[g, layer, c] += total
                squares[g, layer, c] += total * total
                rows_seen[layer, c, rows[c]] += 1
