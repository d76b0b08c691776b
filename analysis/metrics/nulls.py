"""What overlap would be without consistency: static hot lists, independent draws, other blocks.

M = sampled rows or forwards, L = layers, E = experts. Every null is measured on the samples of
:mod:`analysis.metrics.samples`: "hot" holds sampled rows or forwards against the layer's most popular experts;
"independent" pairs rows of different blocks or requests, drawn at random; "shuffle" pairs a position with the same
position of its request's previous block.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from analysis.metrics.bootstrap import divide, ordered_sum, with_total
from analysis.metrics.kernels import pair_sums, set_bits
from analysis.metrics.load_kernels import block_loads, load_pair_sums, load_ranks
from analysis.metrics.samples import ForwardSample, NeighbourBlocks, RowSample, Sample
from analysis.metrics.stream import Shape
from analysis.metrics.timeline import KNOWN, STILL_MASKED

CLASSES = ("masked", "mixed", "known", "all")
"""Pairs of rows a null is given for: both masked, one of each, both known, any."""

OVERLAPS = ("jaccard", "kept", "unchanged")

DRAWN = 64
"""Pairs of forwards made of independently drawn rows."""


def figures(sums: dict[str, np.ndarray], jaccard: np.ndarray) -> dict[str, np.ndarray]:
    """Overlaps [L + 1, classes] from sums [L, classes]; the last row is all layers together."""
    total = {name: with_total(array, 0) for name, array in sums.items()}
    return {
        "jaccard": divide(with_total(jaccard, 0), total["pairs"]),
        "kept": divide(total["kept"], total["before"]),
        "unchanged": divide(total["same"], total["pairs"]),
    }


def by_class(array: np.ndarray) -> np.ndarray:
    """Sums of the four kernel classes as those of :data:`CLASSES`: the two mixed ones together, then all of them."""
    masked, mixed, known = array[..., 0], array[..., 1] + array[..., 2], array[..., 3]
    return np.stack([masked, mixed, known, masked + mixed + known], axis=-1)


def hot_list(load: np.ndarray, size: int) -> np.ndarray:
    """Experts of largest load, ties to the lowest id, int64 [size]."""
    return np.argsort(-load, kind="stable")[:size]


def draw_pairs(
    sample: Sample, first: np.ndarray, second: np.ndarray, pairs: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Random pairs of members out of two lists, from different blocks or requests: two int64 arrays."""
    if not len(first) or not len(second):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    left, right = first[rng.integers(0, len(first), pairs)], second[rng.integers(0, len(second), pairs)]
    apart = sample.other_block(left, right)
    return left[apart], right[apart]


def row_nulls(
    sample: RowSample, load: np.ndarray, shape: Shape, pairs: int, seed: int
) -> dict[str, dict[str, np.ndarray]]:
    """Overlaps of sampled rows with the hot list and with rows of other blocks: {"hot" | "independent": {metric: [L +
    1, 4]}}.

    The hot list of a layer holds its K most used experts. ``load`` int64 [L, E] says which. Classes are
    :data:`CLASSES`.
    """
    rng = np.random.default_rng(seed)
    state = sample.columns["state"]
    everything = np.arange(len(sample))
    masked, known = np.flatnonzero(state == STILL_MASKED), np.flatnonzero(state == KNOWN)
    drawn = [
        draw_pairs(sample, a, b, pairs, rng)
        for a, b in ((masked, masked), (masked, known), (known, known), (everything, everything))
    ]
    listed = [(np.full(len(rows), len(sample)), rows) for rows in (masked, everything, known, everything)]
    out = {}
    for name, chosen in (("hot", listed), ("independent", drawn)):
        left = np.concatenate([a for a, _ in chosen])
        right = np.concatenate([b for _, b in chosen])
        cell = np.repeat(np.arange(4), [len(a) for a, _ in chosen])
        sums = {key: np.zeros((len(shape.layers), 4), np.int64) for key in ("pairs", "kept", "before", "same")}
        jaccard = np.zeros((len(shape.layers), 4))
        for layer, top_k in enumerate(shape.top_k):
            ids, count = sample.layer(layer)
            hot = hot_list(load[layer], top_k)
            ids = np.concatenate([ids, np.zeros((1, ids.shape[1]), ids.dtype)])
            ids[-1, : len(hot)] = hot
            size = np.append(count, len(hot)).astype(np.int64)
            bits = np.zeros((len(ids), shape.words), np.uint64)
            set_bits(bits, ids, size)
            numbers = (
                sums["pairs"][layer],
                jaccard[layer],
                sums["kept"][layer],
                sums["before"][layer],
                sums["same"][layer],
            )
            pair_sums(bits, size, left, right, cell, *numbers)
        out[name] = figures(sums, jaccard)
    return out


def neighbour_nulls(blocks: NeighbourBlocks) -> dict[str, np.ndarray]:
    """Overlaps with the same position of the previous block, {metric: [L + 1, 4]}."""
    return figures({name: by_class(array) for name, array in blocks.sums.items()}, by_class(blocks.jaccard))


def forward_nulls(
    sample: ForwardSample,
    rows: RowSample | None,
    drawn_rows: int,
    load: np.ndarray,
    shape: Shape,
    budgets: np.ndarray,
    pairs: int,
    seed: int,
) -> dict[str, dict[str, np.ndarray]]:
    """Cosine [L + 1], drift and missed [L + 1, budgets] of forwards that have nothing to do with each other, by null.

    hot: sampled forwards after the layer's total load. shuffle: pairs of sampled forwards of different blocks or
    requests. independent: pairs of made up forwards, each of ``drawn_rows`` rows drawn from ``rows``; left out where
    that is None.
    """
    rng = np.random.default_rng(seed)
    members = np.arange(len(sample))
    left, right = draw_pairs(sample, members, members, pairs, rng)
    made = rng.integers(0, len(rows), (2 * DRAWN, drawn_rows)) if rows is not None and len(rows) else None
    names = ("hot", "shuffle", "independent")
    earlier = [np.full(len(members), len(members)), left, np.arange(0 if made is None else DRAWN) + len(members) + 1]
    later = [members, right, earlier[2] + DRAWN]
    cell = np.repeat(np.arange(3), [len(part) for part in earlier])
    layers = len(shape.layers)
    counted, cosine = np.zeros((layers, 3), np.int64), np.zeros((layers, 3))
    drift, missed = np.zeros((layers, 3, len(budgets))), np.zeros((layers, 3, len(budgets)))
    for layer in range(layers):
        loads = [sample.payload["loads"][:, layer].astype(np.int64), load[layer][None].astype(np.int64)]
        if rows is not None and made is not None:
            loads.append(block_loads(*rows.layer(layer), made, shape.experts))
        stacked = np.concatenate(loads)
        places = (np.concatenate(earlier), np.concatenate(later), cell, budgets)
        load_pair_sums(
            stacked, load_ranks(stacked), *places, counted[layer], cosine[layer], drift[layer], missed[layer]
        )
    total = with_total(counted, 0)
    out = {}
    for place, name in enumerate(names):
        if name == "independent" and made is None:
            continue
        out[name] = {
            "cosine": divide(with_total(cosine, 0), total)[:, place],
            "drift": divide(with_total(drift, 0), total[..., None])[:, place],
            "missed": divide(with_total(missed, 0), total[..., None])[:, place],
        }
    return out


def popular_unique(load: np.ndarray, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Distinct experts of n independent rows with the layer's popularity, sum over e of 1 - (1 - p_e)^n, float64 [L,
    N].

    ``load`` int64 [L, E]; ``rows`` int64 [L], the rows behind it, so p_e = load / rows; ``counts`` [N], the n.
    """
    share = np.nan_to_num(divide(load, rows[:, None]))
    found = np.zeros((len(load), len(counts)))
    for place, n in enumerate(counts):
        found[:, place] = ordered_sum(1 - (1 - share) ** n, 1)
    return found


def uniform_unique(experts: int, top_k: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Distinct experts of n independent rows without popularity, E (1 - (1 - K / E)^n), float64 [L, N]; ``top_k``
    [L]."""
    return experts * (1 - (1 - top_k[:, None] / experts) ** counts[None, :])


def all_drawn(marked: np.ndarray, steps: np.ndarray, longest: int) -> Iterator[np.ndarray]:
    """Chances that 1, 2, .. ``longest`` of ``steps``, taken at random without return, all lie among the ``marked`` ones.

    0 where there are fewer steps. This is what putting the forwards of a request in random order makes of an expert
    that ``marked`` of them use.
    """
    chance = np.ones(np.broadcast_shapes(marked.shape, steps.shape))
    for taken in range(longest):
        # Once more are taken than are marked a factor is 0, so those after it need not be right.
        chance = chance * (np.maximum(marked - taken, 0) / np.maximum(steps - taken, 1))
        yield chance
