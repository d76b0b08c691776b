"""The kernels that learn what a layer's experts say of the next one's, and guess with it."""

from __future__ import annotations

import numpy as np

from tracer.jit import njit


@njit
def pairing_sums(before_ids, before_count, after_ids, after_count, grid, fold, together, used):
    """Experts two layers use for the same row: ``together`` int64 [2, E, E] counts (before, after), ``used`` [2, E]
    before.

    ``fold`` int64 [P] says which half of the requests a part belongs to.
    """
    for p in range(grid.shape[0]):
        f = fold[p]
        for j in range(grid.shape[1]):
            row = grid[p, j]
            if row >= 0 and after_count[row] > 0:
                for a in range(before_count[row]):
                    e = before_ids[row, a]
                    used[f, e] += 1
                    for b in range(after_count[row]):
                        together[f, e, after_ids[row, b]] += 1


@njit
def _guess(ids, count, together, used, score):
    """Score of every expert of the next layer: sum over the row's experts of count(e, e') / count(e)."""
    score[:] = 0
    for k in range(count):
        e = ids[k]
        if used[e] > 0:
            for after in range(len(score)):
                score[after] += together[e, after] / np.float64(used[e])


@njit
def _hits(score, ids, count):
    """How many of a row's experts are among the ``count`` of largest score, ties to the lowest id."""
    found = 0
    for k in range(count):
        e = ids[k]
        better = 0
        for other in range(len(score)):
            better += score[other] > score[e] or (score[other] == score[e] and other < e)
        found += better < count
    return found


@njit
def predict_hits(ids, count, next_ids, next_count, fold, partner, together, used, popularity):
    """Experts of the next layer guessed right, int64 [4, M], for each sampled row.

    Guesses: from the row's own experts ``ids`` [M, K], each row's ascending; from those of row ``partner[m]``; the
    most popular of ``popularity`` [2, E]; the partner's own next experts. ``fold`` int64 [M] says which half's counts
    ``together`` [2, E, E] to guess with.
    """
    found = np.zeros((4, len(ids)), np.int64)
    experts = together.shape[1]
    score = np.zeros(experts, np.float64)
    for m in range(len(ids)):
        f, stranger, wanted = fold[m], partner[m], np.int64(next_count[m])
        _guess(ids[m], count[m], together[f], used[f], score)
        found[0, m] = _hits(score, next_ids[m], wanted)
        _guess(ids[stranger], count[stranger], together[f], used[f], score)
        found[1, m] = _hits(score, next_ids[m], wanted)
        for e in range(experts):
            score[e] = popularity[f, e]
        found[2, m] = _hits(score, next_ids[m], wanted)
        for a in range(wanted):
            for b in range(next_count[stranger]):
                found[3, m] += next_ids[m, a] == next_ids[stranger, b]
    return found
