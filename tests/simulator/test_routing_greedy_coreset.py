"""The greedy bound against sets, and against every smaller set."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.registry import load_policy
from simulator.routing.greedy_coreset import GreedyCoreset
from tests.made_up.routers import router
from tests.made_up.strategies import cases, large_case, make_case
from tests.simulator.naive_rows import id_sets, naive_chunks, naive_kept, recorded_rows, selected_rows
from tracer.errors import UserError


def naive_carried(rows, chunk):
    """Gate weight each expert carries over the rows of a chunk."""
    carried = {}
    for t in chunk:
        for e, w in rows[t].items():
            carried[e] = carried.get(e, 0.0) + abs(float(w))
    return carried


def naive_greedy_coreset(case, policy):
    """Heaviest experts first until the share is reached; all of them at share 1."""
    rows, share = recorded_rows(case), policy.share
    for chunk in naive_chunks(case, not policy.restrict_prefix):
        carried = naive_carried(rows, chunk)
        left, coreset = sorted(carried, key=lambda e: (-carried[e], e)), set()
        while left and (share == 1 or sum(carried[e] for e in coreset) < share * sum(carried.values())):
            coreset.add(left.pop(0))
        for t in chunk:
            rows[t] = naive_kept(case, rows[t], coreset & set(rows[t]))
    return rows


NAIVE = {
    "greedy_coreset:share=0.6": naive_greedy_coreset,
    "greedy_coreset:share=1,restrict_prefix=false": naive_greedy_coreset,
}


def select(case, share):
    return case.ask(GreedyCoreset(share))


@given(case=cases(), share=st.sampled_from([0.01, 0.3, 0.5, 0.75, 0.9, 0.99, 1]), restrict_prefix=st.booleans())
@settings(max_examples=100, deadline=None)
def test_greedy_coreset_equals_sets(case, share, restrict_prefix):
    policy = GreedyCoreset(share, restrict_prefix=restrict_prefix)
    assert selected_rows(case.ask(policy)) == naive_greedy_coreset(case, policy)


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_greedy_coreset_equals_sets_at_real_sizes(score_function):
    case = large_case(10, score_function=score_function, ties=True)
    assert selected_rows(select(case, 0.9)) == naive_greedy_coreset(case, GreedyCoreset(0.9))


@given(case=cases(), share=st.sampled_from([0.3, 0.6, 0.9]))
@settings(max_examples=40, deadline=None)
def test_no_smaller_set_keeps_the_share(case, share):
    rows, sets = recorded_rows(case), id_sets(select(case, share))
    for chunk in naive_chunks(case):
        carried = naive_carried(rows, chunk)
        coreset = set().union(*(sets[t] for t in chunk))
        goal = share * sum(carried.values())
        assert sum(carried[e] for e in coreset) >= goal
        assert all(sum(carried[e] for e in few) < goal for few in combinations(carried, len(coreset) - 1))


@given(case=cases())
@settings(max_examples=40, deadline=None)
def test_the_whole_share_is_vanilla(case):
    assert selected_rows(select(case, 1)) == recorded_rows(case)


def test_experts_without_weight_stay_at_share_one_and_go_below():
    case = make_case(5, router(np.random.default_rng(5)))
    weights = case.layer.gate_weights.copy()
    weights[:, 1] = 0
    weightless = replace(case, layer=replace(case.layer, gate_weights=weights))
    assert selected_rows(select(weightless, 1)) == recorded_rows(weightless)
    assert selected_rows(select(weightless, 0.999)) == naive_greedy_coreset(weightless, GreedyCoreset(0.999))


def test_what_cannot_be_done_is_refused():
    case = make_case(5, router(np.random.default_rng(5)))
    with pytest.raises(UserError, match=r"greedy_coreset: share must be above 0 and at most 1, not 0\.0"):
        load_policy("routing", "greedy_coreset:share=0")
    with pytest.raises(UserError, match="greedy_coreset: block_length must be 0"):
        GreedyCoreset(block_length=-2)
    with pytest.raises(UserError, match="greedy_coreset: the trace has no blocks"):
        GreedyCoreset().select(case.layer, case.trajectory, replace(case.geometry, block_length=0))
    with pytest.raises(UserError, match=r"greedy_coreset needs gate weights, .* layer 1; use"):
        GreedyCoreset().select(replace(case.layer, gate_weights=None), case.trajectory, case.geometry)
