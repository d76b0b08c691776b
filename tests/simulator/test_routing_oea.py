"""OEA against sets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.registry import load_policy
from simulator.routing.des_seq import DesSeq
from simulator.routing.oea import Oea
from tests.made_up.routers import router
from tests.made_up.strategies import cases, large_case, make_case
from tests.simulator.naive_rows import (
    at_level_active,
    id_sets,
    naive_chunks,
    naive_top,
    naive_weights,
    recorded_rows,
    selected_rows,
    selection_scores,
)
from tracer.errors import UserError


def naive_base(case, t, k0):
    """The k0 best of a row's recorded experts."""
    recorded = map(int, case.layer.expert_ids[t, : case.layer.count[t]])
    return naive_top(selection_scores(case, t), k0, recorded)


def naive_oea(case, policy):
    """arXiv 2511.02237, simplified form: bases, their union, then each row's next best inside until it has K."""
    rows = recorded_rows(case)
    for chunk in naive_chunks(case, not policy.restrict_prefix):
        union = {e for t in chunk for e in naive_base(case, t, policy.k0)}
        for t in chunk:
            base = naive_base(case, t, policy.k0)
            rest = naive_top(selection_scores(case, t), case.layer.router.top_k - len(base), union - set(base))
            rows[t] = naive_weights(case, t, set(base) | set(rest))
    return rows


NAIVE = {"oea:k0=1": naive_oea, "oea:k0=2,restrict_prefix=false": naive_oea}


@given(case=cases(), k0=st.integers(1, 3), restrict_prefix=st.booleans())
@settings(max_examples=100, deadline=None)
def test_oea_equals_sets(case, k0, restrict_prefix):
    k0 = min(k0, case.layer.router.top_k)
    policy = Oea(k0, restrict_prefix=restrict_prefix)
    assert selected_rows(case.ask(policy)) == naive_oea(case, policy)


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_oea_equals_sets_at_real_sizes(score_function):
    case = large_case(7, score_function=score_function, ties=score_function == "softmax")
    assert selected_rows(case.ask(Oea(3))) == naive_oea(case, Oea(3))


@given(case=cases(), k0=st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_a_block_uses_exactly_the_union_of_the_bases(case, k0):
    k0 = min(k0, case.layer.router.top_k)
    found = case.ask(Oea(k0))
    sets = id_sets(found)
    for chunk in naive_chunks(case):
        union = {e for t in chunk for e in naive_base(case, t, k0)}
        assert set().union(*(sets[t] for t in chunk)) == union
        assert {len(sets[t]) for t in chunk} == {min(case.layer.router.top_k, len(union))}


@given(case=cases(groups=False))
@settings(max_examples=40, deadline=None)
def test_a_base_of_k_is_vanilla(case):
    found = case.ask(Oea(case.layer.router.top_k))
    assert id_sets(found) == [set(row) for row in recorded_rows(case)]


def test_a_base_of_k_is_vanilla_for_group_limited_routers():
    case = large_case(8)
    found = case.ask(Oea(8))
    assert id_sets(found) == [set(row) for row in recorded_rows(case)]


@given(case=cases(groups=False), k0=st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_without_groups_it_is_des_seq(case, k0):
    k0 = min(k0, case.layer.router.top_k)
    found = case.ask(Oea(k0))
    other = case.ask(DesSeq(k0))
    assert selected_rows(found) == selected_rows(other)


@given(case=cases(mess=False), k0=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_level_active_is_enough(case, k0):
    k0 = min(k0, case.layer.router.top_k)
    found = Oea(k0).select(at_level_active(case).layer, case.trajectory, case.geometry)
    assert selected_rows(found) == naive_oea(case, Oea(k0))


def test_what_cannot_be_done_is_refused():
    case = make_case(5, router(np.random.default_rng(5)))
    with pytest.raises(UserError, match="oea: k0 must be 1 or more, not 0"):
        load_policy("routing", "oea:k0=0")
    with pytest.raises(UserError, match="oea: block_length must be 0"):
        Oea(block_length=-2)
    with pytest.raises(UserError, match=r"oea: k0 must be 1 to 2, .* not 3"):
        case.ask(Oea(3))
    with pytest.raises(UserError, match="oea: the trace has no blocks"):
        Oea(1).select(case.layer, case.trajectory, replace(case.geometry, block_length=0))
    with pytest.raises(UserError, match="oea chooses experts by router scores"):
        Oea(1).select(replace(case.layer, router_scores=None), case.trajectory, case.geometry)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_missing_score_names_forward_and_layer(recorded):
    # First that of an expert a row has, then that of one it could add.
    case = make_case(5, router(np.random.default_rng(5)))
    chunk = naive_chunks(case)[0]
    union = {e for t in chunk for e in naive_base(case, t, 1)}
    wanted = [(t, e) for t in chunk for e in union if (e in case.layer.expert_ids[t]) == recorded]
    score = case.layer.router_scores.copy()
    score[wanted[0]] = np.nan
    layer = replace(case.layer, router_scores=score)
    with pytest.raises(UserError, match=r"oea needs router scores .* for forward 0, layer 1; capture"):
        Oea(1).select(layer, case.trajectory, case.geometry)
