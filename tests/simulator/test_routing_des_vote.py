"""DES-Vote against sets."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.registry import load_policy
from simulator.routing.des_vote import DesVote
from tests.made_up.routers import router
from tests.made_up.strategies import cases, large_case, make_case
from tests.simulator.naive_rows import (
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


def naive_des_vote(case, policy):
    """arXiv 2602.00879, voting form: float32 column sums of each row's own top-K, the floor(beta * E) largest."""
    spec, rows = case.layer.router, recorded_rows(case)
    for chunk in naive_chunks(case, not policy.restrict_prefix):
        votes = [np.float32(0)] * spec.num_experts
        for t in chunk:
            r = selection_scores(case, t)
            for e in naive_top(r, spec.top_k):
                votes[e] = np.float32(votes[e] + r[e])
        coreset = naive_top(votes, max(1, math.floor(policy.beta * spec.num_experts)))
        for t in chunk:
            rows[t] = naive_weights(case, t, naive_inside(case, t, coreset))
    return rows


NAIVE = {"des_vote:beta=0.4": naive_des_vote, "des_vote:beta=0.6,restrict_prefix=false": naive_des_vote}


@given(case=cases(), beta=st.sampled_from([0, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1]), restrict_prefix=st.booleans())
@settings(max_examples=100, deadline=None)
def test_des_vote_equals_sets(case, beta, restrict_prefix):
    policy = DesVote(beta, restrict_prefix=restrict_prefix)
    assert selected_rows(case.ask(policy)) == naive_des_vote(case, policy)


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
@pytest.mark.parametrize("beta", [0.10, 0.15])
def test_des_vote_equals_sets_at_real_sizes(score_function, beta):
    case = large_case(4, score_function=score_function, ties=beta == 0.15)
    found = case.ask(DesVote(beta))
    assert selected_rows(found) == naive_des_vote(case, DesVote(beta))
    size = {0.10: {256: 25, 128: 12}, 0.15: {256: 38, 128: 19}}[beta][case.layer.router.num_experts]
    for chunk in naive_chunks(case):
        assert len(set().union(*(id_sets(found)[t] for t in chunk))) <= size


@given(case=cases(mess=False))
@settings(max_examples=30, deadline=None)
def test_all_experts_make_it_vanilla(case):
    found = case.ask(DesVote(1))
    assert id_sets(found) == [set(row) for row in recorded_rows(case)]


def test_what_cannot_be_done_is_refused():
    case = make_case(5, router(np.random.default_rng(5)))
    with pytest.raises(UserError, match=r"des_vote: beta must be between 0 and 1, not 1\.5"):
        load_policy("routing", "des_vote:beta=1.5")
    with pytest.raises(UserError, match="des_vote: beta must be between 0 and 1, not nan"):
        DesVote(float("nan"))
    with pytest.raises(UserError, match="des_vote: block_length must be 0"):
        DesVote(block_length=-2)
    with pytest.raises(UserError, match="des_vote: the trace has no blocks"):
        DesVote().select(case.layer, case.trajectory, replace(case.geometry, block_length=0))
    with pytest.raises(UserError, match=r"des_vote needs the router scores of all experts, .* layer 1; capture"):
        DesVote().select(replace(case.layer, router_scores=None), case.trajectory, case.geometry)
    score = case.layer.router_scores.copy()
    score[:, 0] = np.nan
    with pytest.raises(UserError, match=r"des_vote needs router scores .* for forward 0, layer 1"):
        DesVote(1).select(replace(case.layer, router_scores=score), case.trajectory, case.geometry)
