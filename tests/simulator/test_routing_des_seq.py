"""DES-Seq against sets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.registry import load_policy
from simulator.routing.des_seq import DesSeq
from simulator.routing.dmoe import Dmoe
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


def naive_des_seq(case, policy):
    """arXiv 2602.00879, sequence form: the union of the rows' plain top-k', then the router's own top-K inside."""
    rows = recorded_rows(case)
    for chunk in naive_chunks(case, not policy.restrict_prefix, policy.block_length):
        coreset = set()
        for t in chunk:
            coreset |= set(naive_top(selection_scores(case, t), policy.k_prime))
        for t in chunk:
            rows[t] = naive_weights(case, t, naive_inside(case, t, coreset))
    return rows


NAIVE = {"des_seq:k_prime=1": naive_des_seq, "des_seq:k_prime=2,restrict_prefix=false,block_length=3": naive_des_seq}


@pytest.fixture
def small():
    return make_case(5, router(np.random.default_rng(5)))


@given(case=cases(), k_prime=st.integers(1, 3), restrict_prefix=st.booleans())
@settings(max_examples=100, deadline=None)
def test_des_seq_equals_sets(case, k_prime, restrict_prefix):
    k_prime = min(k_prime, case.layer.router.top_k)
    policy = DesSeq(k_prime, restrict_prefix=restrict_prefix)
    assert selected_rows(case.ask(policy)) == naive_des_seq(case, policy)


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
@pytest.mark.parametrize("k_prime", [2, 3])
def test_des_seq_equals_sets_at_real_sizes(score_function, k_prime):
    case = large_case(3, score_function=score_function, ties=k_prime == 3)
    found = case.ask(DesSeq(k_prime))
    assert selected_rows(found) == naive_des_seq(case, DesSeq(k_prime))


def test_a_block_length_of_its_own_cuts_the_rows_anew(small):
    found = DesSeq(1, block_length=3).select(small.layer, small.trajectory, small.geometry)
    assert selected_rows(found) == naive_des_seq(small, DesSeq(1, block_length=3))
    assert selected_rows(found) != naive_des_seq(small, DesSeq(1))


@given(case=cases(groups=False, mess=False))
@settings(max_examples=40, deadline=None)
def test_without_groups_all_k_experts_of_each_row_make_it_vanilla(case):
    found = case.ask(DesSeq(case.layer.router.top_k))
    assert id_sets(found) == [set(row) for row in recorded_rows(case)]


@given(seed=st.integers(0, 10**6), top_k=st.integers(1, 3), n_group=st.sampled_from([1, 4]))
@settings(max_examples=40, deadline=None)
def test_with_all_k_experts_it_is_dmoe_with_every_expert_that_has_votes(seed, top_k, n_group):
    # Without a bias every vote is positive, so dMoE's guard takes exactly the experts somebody voted for.
    spec = router(
        np.random.default_rng(seed), num_experts=8, top_k=top_k, n_group=n_group, topk_group=(n_group + 1) // 2
    )
    case = make_case(seed, spec)
    found = selected_rows(case.ask(DesSeq(top_k)))
    for chunk in naive_chunks(case):
        voted = {e for t in chunk for e in naive_top(selection_scores(case, t), top_k)}
        dmoe = Dmoe(top_p=0, min_experts=len(voted)).select(case.layer, case.trajectory, case.geometry)
        assert [found[t] for t in chunk] == [selected_rows(dmoe)[t] for t in chunk]


@given(case=cases(mess=False), k_prime=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_level_active_is_enough(case, k_prime):
    k_prime = min(k_prime, case.layer.router.top_k)
    active = at_level_active(case)
    found = DesSeq(k_prime).select(active.layer, case.trajectory, case.geometry)
    assert selected_rows(found) == naive_des_seq(case, DesSeq(k_prime))


def test_what_cannot_be_done_is_refused(small):
    with pytest.raises(UserError, match="des_seq: k_prime must be 1 or more, not 0"):
        load_policy("routing", "des_seq:k_prime=0")
    with pytest.raises(UserError, match=r"des_seq: block_length must be 0 .* not -1"):
        DesSeq(block_length=-1)
    with pytest.raises(UserError, match=r"des_seq: k_prime must be 1 to 2, .* not 3"):
        DesSeq(3).select(small.layer, small.trajectory, small.geometry)
    with pytest.raises(UserError, match="des_seq: the trace has no blocks"):
        DesSeq(1).select(small.layer, small.trajectory, replace(small.geometry, block_length=0))
    unscored = replace(small.layer, router_scores=None)
    with pytest.raises(UserError, match="des_seq chooses experts by router scores"):
        DesSeq(1).select(unscored, small.trajectory, small.geometry)


def test_a_missing_score_names_forward_and_layer(small):
    score = small.layer.router_scores.copy()
    wanted = naive_top(selection_scores(small, 0), 1)[0]
    score[1, wanted] = float("nan")
    layer = replace(small.layer, router_scores=score)
    with pytest.raises(UserError, match=r"des_seq needs router scores .* for forward 0, layer 1; capture"):
        DesSeq(1).select(layer, small.trajectory, small.geometry)
