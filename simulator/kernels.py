"""Numba primitives shared by policies that choose experts anew: group-limited top-K inside a set, and its weights.

Ties, everywhere: the lowest expert id, the lowest group id. A row's experts come in ascending id, and its weights are summed in
that order. T rows, K experts a row, E experts, G groups, S expert sets. Rows that share a set are worked on side by side, up to
``WIDTH`` of them, one vector lane each: the loops over rows are the innermost ones and hold no branch. Imports numba and NumPy
only. Nothing here checks its input: ids are below E and offsets ascend because the trace's reader made sure of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tracer.jit import njit

if TYPE_CHECKING:
    from tracer.trace import RouterSpec

WIDTH = 32


class RouterArrays(NamedTuple):
    """A RouterSpec as kernels take it, every option spelled out."""

    bias: np.ndarray  # float32 [E], zeros without one
    scale: np.ndarray  # float32 [E], ones without one
    group: np.ndarray  # int64 [E], the expert's group
    top_k: int
    n_group: int  # 1 where no group is left out
    topk_group: int
    group_max: bool  # group score: the largest, not the sum of the two largest
    normalise: bool
    biased_weights: bool
    scaling: np.float32


def router_arrays(spec: RouterSpec) -> RouterArrays:
    """Plain arrays of a RouterSpec."""
    experts = spec.num_experts
    n_group = spec.n_group if spec.topk_group < spec.n_group else 1
    return RouterArrays(
        bias=np.zeros(experts, np.float32) if spec.expert_bias is None else np.asarray(spec.expert_bias, np.float32),
        scale=np.ones(experts, np.float32) if spec.expert_scale is None else np.asarray(spec.expert_scale, np.float32),
        group=np.arange(experts, dtype=np.int64) // (experts // n_group),
        top_k=spec.top_k,
        n_group=n_group,
        topk_group=spec.topk_group,
        group_max=spec.group_score == "max",
        normalise=bool(spec.norm_topk_prob),
        biased_weights=bool(spec.bias_in_weights),
        scaling=np.float32(spec.routed_scaling_factor),
    )


@njit
def kth_largest(values, size, width, k, best, carry):
    """The k-th largest of each of ``width`` columns of ``values[:size]``, in ``best[k - 1]``; minus infinity if fewer.

    Every value sinks through the k best so far; NaN stays outside. ``best`` float32 [>= k, W] and ``carry`` float32 [W] are
    working memory.
    """
    for j in range(k):
        for i in range(width):
            best[j, i] = -np.inf
    for m in range(size):
        for i in range(width):
            carry[i] = values[m, i]
        for j in range(k):
            for i in range(width):
                x = carry[i]
                b = best[j, i]
                best[j, i] = x if x > b else b
                carry[i] = b if x > b else x


@njit
def tile_scratch(router):
    """Working memory of :func:`select_tile`: values [E, W], best [K, W], groups [3 G, W], lanes [2, W], picked [E]."""
    experts = len(router.bias)
    return (
        np.empty((experts, WIDTH), np.float32),
        np.empty((router.top_k, WIDTH), np.float32),
        np.empty((3 * router.n_group, WIDTH), np.float32),
        np.empty((2, WIDTH), np.float32),
        np.empty(experts, np.int64),
    )


@njit
def _drop_groups(values, members, width, router, groups):
    """Set members of all but the ``topk_group`` best groups to minus infinity.

    A group with fewer members than its score needs has minus infinity, and such groups tie to the lowest.
    """
    n_group = router.n_group
    groups[: 2 * n_group] = -np.inf
    for m in range(len(members)):
        v = values[m]
        first = groups[router.group[members[m]]]
        second = groups[n_group + router.group[members[m]]]
        for i in range(width):
            below = first[i] if v[i] > first[i] else v[i]
            first[i] = v[i] if v[i] > first[i] else first[i]
            second[i] = below if below > second[i] else second[i]
    if not router.group_max:
        for g in range(n_group):
            first, second = groups[g], groups[n_group + g]
            for i in range(width):
                first[i] = first[i] + second[i]
    for g in range(n_group):
        own = groups[g]
        rank = groups[2 * n_group + g]
        rank[:] = 0
        for h in range(n_group):
            other = groups[h]
            if h < g:
                for i in range(width):
                    rank[i] += np.float32(1) if other[i] >= own[i] else np.float32(0)
            elif h > g:
                for i in range(width):
                    rank[i] += np.float32(1) if other[i] > own[i] else np.float32(0)
    limit = np.float32(router.topk_group)
    for m in range(len(members)):
        v = values[m]
        rank = groups[2 * n_group + router.group[members[m]]]
        for i in range(width):
            v[i] = v[i] if rank[i] < limit else np.float32(-np.inf)


@njit
def _weigh_tile(scores, rows, router, lanes, raw, ids, count, weights):
    """Weights of the chosen experts of ``rows``, float32. ``raw`` [K, W] is working memory."""
    total = lanes[0]
    total[:] = 0
    width = len(rows)
    for i in range(width):
        t = rows[i]
        for k in range(router.top_k):
            w = np.float32(0)
            if k < count[t]:
                e = ids[t, k]
                w = scores[t, e] + router.bias[e] if router.biased_weights else scores[t, e]
            raw[k, i] = w
    if router.normalise:
        for k in range(router.top_k):
            for i in range(width):
                total[i] += raw[k, i]
        for i in range(width):
            total[i] += np.float32(1e-20)
        for k in range(router.top_k):
            for i in range(width):
                raw[k, i] /= total[i]
    for i in range(width):
        t = rows[i]
        for k in range(router.top_k):
            weights[t, k] = raw[k, i] * router.scaling * router.scale[ids[t, k]]


@njit
def select_tile(scores, rows, members, router, scratch, ids, count, weights):
    """Group-limited top-K of up to ``WIDTH`` rows inside one allowed set; plain top-K where the router has no groups.

    Parameters
    ----------
    scores : float32 [T, E]
        Before bias.
    rows : int64 [<= WIDTH]
    members : int64 [M]
        Allowed experts, ascending.
    router : RouterArrays
    scratch : tuple
        From :func:`tile_scratch`.
    ids, count, weights : uint8 | uint16 [T, >= K], uint8 [T], float32 [T, >= K]
        The rows' experts, ``min(K, reachable)`` of them, ascending; slots from there on become 0.

    Returns
    -------
    int
        -1, or the first row that needs a score the trace does not hold.
    """
    values, best, groups, lanes, picked = scratch
    size, width, top_k = len(members), len(rows), router.top_k
    for i in range(width):
        row = scores[rows[i]]
        missing = False
        for m in range(size):
            e = members[m]
            v = row[e] + router.bias[e]
            missing = missing or np.isnan(v)
            values[m, i] = v
        if missing:
            return rows[i]
    if router.n_group > 1:
        _drop_groups(values, members, width, router, groups)
    kth_largest(values, size, width, top_k, best, lanes[0])
    for i in range(width):
        t = rows[i]
        bound = max(best[top_k - 1, i], np.float32(-3.4028235e38))
        found = np.uint64(0)
        for m in range(size):
            picked[found] = m
            found += np.uint64(values[m, i] >= bound)
        chosen = 0
        # Values that tie at the bound enter by lowest id until the row has K.
        ties = np.int64(found) - top_k
        if ties > 0:
            at_bound = 0
            for j in range(found):
                at_bound += int(values[picked[j], i] == bound)
            ties = at_bound - ties
        else:
            ties = top_k
        for j in range(found):
            if values[picked[j], i] == bound:
                ties -= 1
                if ties < 0:
                    continue
            ids[t, chosen] = members[picked[j]]
            chosen += 1
        count[t] = chosen
        ids[t, chosen:] = 0
        weights[t, top_k:] = 0
    _weigh_tile(scores, rows, router, lanes, best, ids, count, weights)
    return -1


@njit
def select_experts(scores, rows, row_offsets, members, member_offsets, router, ids, count, weights):
    """Let rows choose anew inside given sets, by the router's own rule.

    Parameters
    ----------
    scores : float32 [T, E]
        Before bias.
    rows : int64 [N]
        The rows of set 0, those of set 1, ...; all others stay as they are.
    row_offsets : int64 [S + 1]
    members : int64 [M]
        Experts of all sets, ascending inside a set.
    member_offsets : int64 [S + 1]
    router : RouterArrays
    ids, count, weights : uint8 | uint16 [T, K], uint8 [T], float32 [T, K]
        Changed in place.

    Returns
    -------
    int
        -1, or a row that needs a score the trace does not hold.
    """
    scratch = tile_scratch(router)
    for s in range(len(row_offsets) - 1):
        inside = members[member_offsets[s] : member_offsets[s + 1]]
        for start in range(row_offsets[s], row_offsets[s + 1], WIDTH):
            tile = rows[start : min(start + WIDTH, row_offsets[s + 1])]
            missing = select_tile(scores, tile, inside, router, scratch, ids, count, weights)
            if missing >= 0:
                return missing
    return -1
