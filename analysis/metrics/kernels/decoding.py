"""Numba kernels over block positions and steps: acceptance order, final tokens, confidence.

P = parts, S = positions of a block, R = runs, G = bootstrap units. States: -1 absent, 0 masked, 1 known.
"""

from __future__ import annotations

import math

import numpy as np

from tracer.jit import njit


@njit
def final_tokens(state, accepted, predicted, token, run_offsets):
    """When each position of each run was accepted for good, and as what: int64 [R, S] twice, -1 where it was not.

    ``when`` counts parts from the run's first. The last forward that marks the position accepted decides; without one
    (speculation), the last that saw it masked before one that saw it known, and the token is the known one.
    """
    runs = len(run_offsets) - 1
    when = np.full((runs, state.shape[1]), -1, np.int64)
    final = np.full((runs, state.shape[1]), -1, np.int64)
    for r in range(runs):
        start, stop = run_offsets[r], run_offsets[r + 1]
        for j in range(state.shape[1]):
            marked = -1
            for p in range(start, stop):
                if state[p, j] != 0:
                    continue
                if accepted[p, j]:
                    marked = p
                    when[r, j], final[r, j] = p - start, predicted[p, j]
                elif p + 1 < stop and state[p + 1, j] == 1 and marked < 0:
                    when[r, j], final[r, j] = p - start, token[p + 1, j]
    return when, final


@njit
def order_sums(state, when, run_offsets, run_unit, ranked, correlation, taken, leftmost, expected):
    """Order of acceptance, summed into [G].

    ``correlation`` adds each block's Spearman correlation of position against step, average ranks, over ``ranked``
    blocks (blocks whose accepted tokens are fewer than two or all of one step have none). Of ``taken`` accepted
    tokens, ``leftmost`` stood among the step's leftmost masked positions, as many as it accepts; ``expected`` of them
    would in random order.
    """
    width = state.shape[1]
    steps = np.zeros(width, np.int64)
    for r in range(len(run_offsets) - 1):
        g, start, stop = run_unit[r], run_offsets[r], run_offsets[r + 1]
        found = 0
        for j in range(width):
            if when[r, j] >= 0:
                steps[found] = when[r, j]
                found += 1
        # Twice the ranks less their mean, so that averages over ties stay whole numbers.
        product, square, other = 0, 0, 0
        for i in range(found):
            below, equal = 0, 0
            for n in range(found):
                below += steps[n] < steps[i]
                equal += steps[n] == steps[i]
            x = 2 * (i + 1) - (found + 1)
            y = 2 * below + equal + 1 - (found + 1)
            product += x * y
            square += x * x
            other += y * y
        if square > 0 and other > 0:
            ranked[g] += 1
            correlation[g] += product / math.sqrt(np.float64(square) * np.float64(other))
        for p in range(start, stop):
            masked, chosen = 0, 0
            for j in range(width):
                masked += state[p, j] == 0
                chosen += when[r, j] == p - start
            left, place = 0, 0
            for j in range(width):
                if state[p, j] == 0:
                    left += place < chosen and when[r, j] == p - start
                    place += 1
            if chosen > 0:
                taken[g] += chosen
                leftmost[g] += left
                expected[g] += chosen * chosen / masked


@njit
def confidence_sums(
    state, predicted, confidence, when, final, run_offsets, run_unit, guesses, changed, sure, binned, right, summed
):
    """Masked rows with a prediction and a confidence, up to their final acceptance.

    By steps before it, [G, lags + 1]: rows, those whose prediction is not the final token, their confidence. By
    confidence, [G, 2, bins]: rows, those whose prediction is final, their confidence; second axis: all rows, rows
    accepted later only.
    """
    lags, bins = guesses.shape[1], binned.shape[2]
    for r in range(len(run_offsets) - 1):
        g, start = run_unit[r], run_offsets[r]
        for p in range(start, run_offsets[r + 1]):
            for j in range(state.shape[1]):
                lag = when[r, j] - (p - start)
                sureness = confidence[p, j]
                if state[p, j] != 0 or lag < 0 or final[r, j] < 0 or predicted[p, j] < 0 or not sureness >= 0:
                    continue
                other = predicted[p, j] != final[r, j]
                if lag < lags:
                    guesses[g, lag] += 1
                    changed[g, lag] += other
                    sure[g, lag] += sureness
                b = min(np.int64(min(sureness, 1.0) * bins), bins - 1)
                for rows in range(1 + (lag > 0)):
                    binned[g, rows, b] += 1
                    right[g, rows, b] += not other
                    summed[g, rows, b] += sureness
