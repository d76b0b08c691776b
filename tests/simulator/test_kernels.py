"""Choosing and counting experts against sets and loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.kernels import WIDTH, kth_largest, router_arrays, select_experts
from simulator.tallies.counting import expert_loads, union_sets, unique_experts
from tests.made_up.routers import naive_choose, route_row, router, scores
from tests.made_up.strategies import seeds, specs


def choose(score, sets, set_of_row, spec):
    """``select_experts`` over rows given by their set; returns ids, count, weights."""
    rows = np.argsort(set_of_row, kind="stable")
    rows = rows[set_of_row[rows] >= 0]
    row_offsets = np.searchsorted(set_of_row[rows], np.arange(len(sets) + 1))
    members = np.array([e for s in sets for e in sorted(s)], np.uint16)
    member_offsets = np.concatenate(([0], np.cumsum([len(s) for s in sets]))).astype(np.int64)
    ids = np.full((len(score), spec.top_k), 7 % spec.num_experts, np.uint8 if spec.num_experts <= 256 else np.uint16)
    count, weights = np.full(len(score), 1, np.uint8), np.full((len(score), spec.top_k), 0.5, np.float32)
    missing = select_experts(
        score, rows, row_offsets, members, member_offsets, router_arrays(spec), ids, count, weights
    )
    return missing, ids, count, weights


def assert_chosen(score, sets, set_of_row, spec):
    missing, ids, count, weights = choose(score, sets, set_of_row, spec)
    assert missing == -1
    for t, s in enumerate(set_of_row):
        if s < 0:
            assert (ids[t] == 7 % spec.num_experts).all() and count[t] == 1 and (weights[t] == 0.5).all()
            continue
        expected, expected_weights = naive_choose(score[t], sets[s], spec)
        assert ids[t, : count[t]].tolist() == expected
        assert weights[t, : count[t]].tolist() == expected_weights
        assert (ids[t, count[t] :] == 0).all() and (weights[t, count[t] :] == 0).all()


@settings(max_examples=120, deadline=None)
@given(specs(), seeds, st.booleans(), st.integers(1, 40), st.integers(1, 3))
def test_rows_choose_inside_their_set(spec, seed, ties, rows, num_sets):
    rng = np.random.default_rng(seed)
    score = scores(rng, rows, spec, ties)
    sets = [set(np.flatnonzero(rng.random(spec.num_experts) < rng.random()).tolist()) for _ in range(num_sets)]
    assert_chosen(score, sets, rng.integers(-1, num_sets, rows), spec)


@pytest.mark.parametrize(
    ("num_experts", "groups", "kept", "function"),
    [(256, 8, 4, "sigmoid"), (128, 1, 1, "softmax"), (512, 16, 3, "sigmoid")],
)
@pytest.mark.parametrize("ties", [False, True])
def test_rows_choose_inside_their_set_at_real_size(num_experts, groups, kept, function, ties):
    rng = np.random.default_rng(1)
    spec = router(rng, num_experts, 8, function, groups, kept, bias=function == "sigmoid", routed_scaling_factor=2.5)
    score = scores(rng, 3 * WIDTH + 5, spec, ties)
    sets = [
        set(rng.choice(num_experts, size, replace=False).tolist()) for size in (num_experts, num_experts // 5, 12, 5)
    ]
    assert_chosen(score, sets, rng.integers(-1, len(sets), len(score)), spec)


@settings(max_examples=60, deadline=None)
@given(specs(), seeds)
def test_all_experts_allowed_is_the_vanilla_router(spec, seed):
    rng = np.random.default_rng(seed)
    score = scores(rng, 5, spec)
    _, ids, count, _ = choose(score, [set(range(spec.num_experts))], np.zeros(5, np.int64), spec)
    for t in range(5):
        assert ids[t, : count[t]].tolist() == sorted(route_row(score[t], spec)[0])


def test_a_missing_score_stops_the_choice():
    rng = np.random.default_rng(2)
    spec = router(rng, 9, 2)
    score = scores(rng, 3, spec)
    score[1, 4] = np.nan
    assert choose(score, [{1, 4, 5}], np.zeros(3, np.int64), spec)[0] == 1
    assert choose(score, [{1, 5}], np.zeros(3, np.int64), spec)[0] == -1
    assert choose(score, [{1, 4, 5}], np.array([0, -1, 0]), spec)[0] == -1


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(0, 12), st.integers(1, WIDTH), st.integers(1, 9))
def test_kth_largest_of_columns(seed, size, width, k):
    values = np.round(np.random.default_rng(seed).standard_normal((12, WIDTH)) * 2).astype(np.float32)
    best, carry = np.empty((k, WIDTH), np.float32), np.empty(WIDTH, np.float32)
    kth_largest(values, size, width, k, best, carry)
    for i in range(width):
        ordered = sorted(values[:size, i].tolist(), reverse=True)
        assert best[k - 1, i] == (ordered[k - 1] if k <= size else -np.inf)


def naive_union(ids, count, start, stop, rows):
    return {int(e) for t in range(start, stop) if rows[t] for e in ids[t, : count[t]]}


@settings(max_examples=100, deadline=None)
@given(
    seeds,
    st.sampled_from([(9, 3), (256, 8), (255, 3), (128, 8), (300, 5), (1, 1)]),
    st.lists(st.integers(0, 40), min_size=0, max_size=6),
    st.booleans(),
    st.booleans(),
)
def test_counts_of_forwards(seed, geometry, lengths, full, some_rows):
    num_experts, top_k = geometry
    rng = np.random.default_rng(seed)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    total = int(offsets[-1])
    ids = np.zeros((total, top_k), np.uint8 if num_experts <= 256 else np.uint16)
    for t in range(total):
        ids[t] = rng.choice(num_experts, top_k, replace=False)
    count = np.full(total, top_k, np.uint8) if full else rng.integers(0, top_k + 1, total).astype(np.uint8)
    rows = rng.random(total) < 0.5 if some_rows else np.ones(total, bool)
    unique = unique_experts(ids, count, offsets, num_experts, rows if some_rows else None)
    loads = expert_loads(ids, count, offsets, num_experts)
    members, member_offsets = union_sets(ids, count, offsets, num_experts)
    for f in range(len(lengths)):
        start, stop = offsets[f], offsets[f + 1]
        assert unique[f] == len(naive_union(ids, count, start, stop, rows))
        union = naive_union(ids, count, start, stop, np.ones(total, bool))
        assert members[member_offsets[f] : member_offsets[f + 1]].tolist() == sorted(union)
        expected = [sum(int(e) in ids[t, : count[t]].tolist() for t in range(start, stop)) for e in range(num_experts)]
        assert loads[f].tolist() == expected
