"""Numba kernels that count distinct experts of growing and of whole sets of rows.

P = parts (denoise forwards of a request), S = positions of a block, W = 64-bit words of an expert set, G = bootstrap units,
L = layers. Nothing here checks its input.
"""

from __future__ import annotations

import numpy as np

from tracer.bits import popcount
from tracer.jit import njit


@njit
def mix(word):
    """A well mixed 64-bit word. Source: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators (2014),
    SplitMix."""
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
