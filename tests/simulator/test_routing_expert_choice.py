"""Expert choice against lists."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.registry import load_policy
from simulator.routing.expert_choice import ExpertChoice
from simulator.streams.stream import build_stream
from tests.made_up.routers import router
from tests.made_up.strategies import cases, large_case, make_case
from tests.simulator.naive_rows import (
    at_level_active,
    id_sets,
    naive_chunks,
    naive_weights,
    recorded_rows,
    selected_rows,
)
from tracer.errors import UserError


def naive_capacity(case, chunk):
    """K * B / E rows an expert, rounded up."""
    spec = case.layer.router
    whole, rest = divmod(spec.top_k * len(chunk), spec.num_experts)
    return whole + (rest > 0)


def naive_expert_choice(case, policy):
    """Every expert takes its best rows; ties to the first row."""
    rows = recorded_rows(case)
    for chunk in naive_chunks(case, not policy.restrict_prefix):
        chosen_by = {t: set() for t in chunk}
        for e in range(case.layer.router.num_experts):
            best = sorted(chunk, key=lambda t, e=e: (-case.layer.router_scores[t, e], t))
            for t in best[: naive_capacity(case, chunk)]:
                chosen_by[t].add(e)
        for t in chunk:
            rows[t] = naive_weights(case, t, chosen_by[t])
    return rows


NAIVE = {"expert_choice": naive_expert_choice, "expert_choice:restrict_prefix=false": naive_expert_choice}


def select(case, restrict_prefix=True):
    return case.ask(ExpertChoice(restrict_prefix=restrict_prefix))


@given(case=cases(), restrict_prefix=st.booleans())
@settings(max_examples=100, deadline=None)
def test_expert_choice_equals_lists(case, restrict_prefix):
    found = select(case, restrict_prefix)
    assert selected_rows(found) == naive_expert_choice(case, ExpertChoice(restrict_prefix=restrict_prefix))
    assert found.expert_ids.shape[1] == max(case.layer.router.top_k, found.count.max())


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_expert_choice_equals_lists_at_real_sizes(score_function):
    case = large_case(12, score_function=score_function, ties=score_function == "softmax")
    found = select(case)
    assert selected_rows(found) == naive_expert_choice(case, ExpertChoice())
    assert len(np.unique(found.count)) > 2


@given(case=cases())
@settings(max_examples=40, deadline=None)
def test_every_expert_has_the_same_load_and_streams_take_rows_of_any_width(case):
    found = select(case)
    for chunk in naive_chunks(case):
        chosen = [e for t in chunk for e in id_sets(found)[t]]
        experts = case.layer.router.num_experts
        assert [chosen.count(e) for e in range(experts)] == [naive_capacity(case, chunk)] * experts
    stream = build_stream(found, case.trajectory.forwards.row_offsets, 0, case.geometry.num_experts)
    assert stream.tokens.sum() == found.count.sum()


def test_more_experts_than_a_count_can_hold_are_refused():
    rng = np.random.default_rng(13)
    case = make_case(13, router(rng, num_experts=256, top_k=2), block_length=1, prompt=1, blocks=1)
    with pytest.raises(UserError, match="expert_choice: 256 experts choose one row in layer 1, more than the 255"):
        select(case)


def test_what_cannot_be_done_is_refused():
    case = make_case(5, router(np.random.default_rng(5)))
    with pytest.raises(UserError, match="expert_choice: block_length must be 0"):
        load_policy("routing", "expert_choice:block_length=-1")
    with pytest.raises(UserError, match="expert_choice: the trace has no blocks"):
        ExpertChoice().select(case.layer, case.trajectory, replace(case.geometry, block_length=0))
    with pytest.raises(UserError, match=r"expert_choice needs the router scores of all experts, .* layer 1; capture"):
        ExpertChoice().select(replace(case.layer, router_scores=None), case.trajectory, case.geometry)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_level_active_is_not_enough(seed):
    case = make_case(seed, router(np.random.default_rng(seed), top_k=1))
    with pytest.raises(UserError, match=r"expert_choice needs router scores .* for forward \d+, layer 1; capture"):
        select(at_level_active(case))
