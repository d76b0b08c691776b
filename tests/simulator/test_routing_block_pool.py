"""LLaDA2.2's block pool against sets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.registry import load_policy
from simulator.routing.block_pool import BlockPool
from tests.made_up.routers import router
from tests.made_up.strategies import cases, large_case, make_case
from tests.simulator.naive_rows import (
    at_level_active,
    id_sets,
    naive_chunks,
    naive_inside,
    naive_top,
    naive_weights,
    recorded_rows,
    selected_rows,
    selection_scores,
)
from tracer.errors import UserError


def naive_block_pool(case, policy):
    """The best experts by the largest selection score any row gives them, then the router's own top-K inside."""
    rows = recorded_rows(case)
    for chunk in naive_chunks(case, not policy.restrict_prefix):
        scores = [selection_scores(case, t).tolist() for t in chunk]
        pool = [max(score[e] for score in scores) for e in range(case.layer.router.num_experts)]
        coreset = naive_top(pool, policy.coreset_size)
        for t in chunk:
            rows[t] = naive_weights(case, t, naive_inside(case, t, coreset))
    return rows


NAIVE = {
    "block_pool:coreset_size=4": naive_block_pool,
    "block_pool:coreset_size=5,restrict_prefix=false": naive_block_pool,
}


@given(case=cases(), coreset_size=st.integers(1, 12), restrict_prefix=st.booleans())
@settings(max_examples=100, deadline=None)
def test_block_pool_equals_sets(case, coreset_size, restrict_prefix):
    policy = BlockPool(coreset_size, restrict_prefix=restrict_prefix)
    assert selected_rows(case.ask(policy)) == naive_block_pool(case, policy)


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_block_pool_equals_sets_at_real_sizes(score_function):
    case = large_case(6, score_function=score_function, ties=score_function == "softmax")
    assert BlockPool().coreset_size == 48
    assert selected_rows(case.ask(BlockPool())) == naive_block_pool(case, BlockPool())


@given(case=cases(mess=False))
@settings(max_examples=30, deadline=None)
def test_a_pool_of_all_experts_is_vanilla(case):
    found = case.ask(BlockPool(case.layer.router.num_experts))
    assert id_sets(found) == [set(row) for row in recorded_rows(case)]


def test_what_cannot_be_done_is_refused():
    case = make_case(5, router(np.random.default_rng(5)))
    with pytest.raises(UserError, match="block_pool: coreset_size must be 1 or more, not 0"):
        load_policy("routing", "block_pool:coreset_size=0")
    with pytest.raises(UserError, match="block_pool: block_length must be 0"):
        BlockPool(block_length=-2)
    with pytest.raises(UserError, match="block_pool: the trace has no blocks"):
        BlockPool().select(case.layer, case.trajectory, replace(case.geometry, block_length=0))
    with pytest.raises(UserError, match=r"block_pool needs the router scores of all experts, .* layer 1; capture"):
        BlockPool().select(replace(case.layer, router_scores=None), case.trajectory, case.geometry)


def test_level_active_is_not_enough():
    case = make_case(5, router(np.random.default_rng(5), top_k=1))
    with pytest.raises(UserError, match=r"block_pool needs router scores .* for forward \d+, layer 1; capture"):
        BlockPool(3).select(at_level_active(case).layer, case.trajectory, case.geometry)
