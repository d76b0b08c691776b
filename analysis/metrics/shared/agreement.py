"""How well two loads of the experts agree. N = loads, P = pairs of them, B = replicates, L = layers, E = experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.metrics.shared.frames import divide

MEASURES = ("cosine", "rank_correlation", "top_overlap")
PAIR = ("between", "first", "second")
DRAWS = 250
"""Replicates at most where each one ranks all loads again."""

WORDS = {
    "hot": "the popularity over other prompts",
    "independent": "another prompt",
    "shuffle": "shuffled expert labels",
}
"""The nulls in words."""


def doubled_ranks(load: np.ndarray) -> np.ndarray:
    """Twice the average rank of each entry along the last axis, float64, so that ties stay whole numbers."""
    ranks = np.empty(load.shape)
    for row, place in zip(load.reshape(-1, load.shape[-1]), ranks.reshape(-1, load.shape[-1]), strict=True):
        ordered = np.sort(row)
        place[:] = np.searchsorted(ordered, row, "left") + np.searchsorted(ordered, row, "right") + 1
    return ranks


def top_sets(load: np.ndarray, size: int) -> np.ndarray:
    """float64 [..., E]: 1 for the ``size`` experts of largest load, ties to the lowest id, none without load."""
    order = np.argsort(-load, axis=-1, kind="stable")[..., :size]
    top = np.zeros(load.shape)
    np.put_along_axis(top, order, 1.0, -1)
    return top * (load > 0)


def measures(load: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Agreement of every pair of loads [N, E] with each other, and what permuted expert labels would give: two [3, N,
    N].

    cosine of the loads; Spearman's rank correlation with average ranks; experts shared by the top-``size`` sets over
    ``size``. All sums are whole numbers below 2^53, so they are exact in any order. NaN where a load is empty (or
    even, for ranks).
    """
    numbers = load.astype(np.float64)
    experts = load.shape[-1]
    norm = np.sqrt((numbers * numbers).sum(axis=-1))
    total = numbers.sum(axis=-1)
    scale = norm[:, None] * norm[None, :]
    ranks = doubled_ranks(numbers) - (experts + 1)
    spread = np.sqrt((ranks * ranks).sum(axis=-1))
    top = top_sets(numbers, size)
    some = np.where((total[:, None] > 0) & (total[None, :] > 0), 1.0, np.nan)
    value = [
        divide(numbers @ numbers.T, scale),
        divide(ranks @ ranks.T, spread[:, None] * spread[None, :]) * some,
        top @ top.T / size * some,
    ]
    held = top.sum(axis=-1)
    null = [
        divide(total[:, None] * total[None, :] / experts, scale),
        np.zeros_like(some) * some,
        held[:, None] * held[None, :] / experts / size * some,
    ]
    return np.stack(value), np.stack(null)


def compared(loads: np.ndarray, pairs: Sequence[tuple[int, int]], size: int) -> tuple[np.ndarray, np.ndarray]:
    """:func:`measures` of chosen pairs of loads [N, L, E] by layer: two [3, P, L]."""
    first, second = np.array(pairs).T
    by_layer = [measures(loads[:, layer], size) for layer in range(loads.shape[1])]
    value, null = (np.stack([both[part][:, first, second] for both in by_layer], axis=-1) for part in (0, 1))
    return value, null


def resampled(
    sides: Sequence[tuple[np.ndarray, np.ndarray]], pairs: Sequence[tuple[int, int]], size: int
) -> np.ndarray:
    """Agreement of resampled loads, [B, 3, P, L]; each side is weights [B, G] and the loads [G, L, E] they draw from."""
    drawn = [np.tensordot(weights, load.astype(np.float64), 1) for weights, load in sides]
    return np.stack([compared(np.stack(loads), pairs, size)[0] for loads in zip(*drawn, strict=True)])
