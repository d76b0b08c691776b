"""NAEE-style skipping against lists."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.registry import load_policy
from simulator.routing.skip import Skip
from tests.made_up.routers import router
from tests.made_up.strategies import cases, large_case, make_case
from tests.simulator.naive_rows import naive_kept, recorded_rows, selected_rows
from tracer.errors import UserError


def naive_skip(case, policy):
    """Keep a row's ranks before the first one from which on the rest holds less than beta of the row's weight."""
    kept = []
    for row in recorded_rows(case):
        ranked = sorted(row, key=lambda e: (-abs(row[e]), e))
        size = [abs(float(row[e])) for e in ranked]
        cut = next((i for i in range(1, len(ranked)) if sum(size[i:]) < policy.beta * sum(size)), len(ranked))
        kept.append(naive_kept(case, row, ranked[:cut]))
    return kept


NAIVE = {"skip:beta=0.3": naive_skip, "skip:beta=0.6": naive_skip}


def select(case, beta):
    return case.ask(Skip(beta))


@given(case=cases(), beta=st.sampled_from([0, 0.05, 0.2, 1 / 3, 0.5, 0.75, 1]))
@settings(max_examples=100, deadline=None)
def test_skip_equals_lists(case, beta):
    assert selected_rows(select(case, beta)) == naive_skip(case, Skip(beta))


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_skip_equals_lists_at_real_sizes(score_function):
    case = large_case(9, score_function=score_function, ties=True)
    found = select(case, 0.2)
    assert selected_rows(found) == naive_skip(case, Skip(0.2))
    assert found.count.min() > 0 and found.count.max() < 8


@given(case=cases())
@settings(max_examples=40, deadline=None)
def test_beta_zero_is_vanilla_and_beta_one_leaves_a_single_expert(case):
    assert selected_rows(select(case, 0)) == recorded_rows(case)
    assert all(len(row) == min(1, len(was)) for row, was in zip(selected_rows(select(case, 1)), recorded_rows(case)))


def test_for_two_experts_it_is_the_released_rule():
    # NAEE drops the second expert where its weight is below b times the first's: b = 1/3 is beta = 1/4.
    case = make_case(11, router(np.random.default_rng(11), top_k=2))
    weights = case.layer.gate_weights.astype(float)
    dropped = weights.min(axis=1) < weights.max(axis=1) / 3
    assert (select(case, 0.25).count == np.where(dropped, 1, 2)).all()
    assert 0 < dropped.sum() < len(dropped)


def test_scores_and_blocks_are_not_needed():
    case = make_case(5, router(np.random.default_rng(5)))
    found = Skip(0.3).select(
        replace(case.layer, router_scores=None),
        replace(case.trajectory, position=None),
        replace(case.geometry, block_length=0),
    )
    assert selected_rows(found) == naive_skip(case, Skip(0.3))


def test_what_cannot_be_done_is_refused():
    case = make_case(5, router(np.random.default_rng(5)))
    with pytest.raises(UserError, match=r"skip: beta must be between 0 and 1, not -0\.1"):
        load_policy("routing", "skip:beta=-0.1")
    with pytest.raises(UserError, match=r"skip needs gate weights, .* layer 1; use"):
        Skip().select(replace(case.layer, gate_weights=None), case.trajectory, case.geometry)
