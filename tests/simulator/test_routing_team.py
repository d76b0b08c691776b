"""TEAM's limited activation against sets and loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.acceptance.team import TeamAcceptance
from simulator.policy import ACTIVE, CONFIDENCE, SCORES, TOKENS
from simulator.registry import load_policy
from simulator.replaying import replay
from simulator.routing.team import Team
from simulator.routing.vanilla import Vanilla
from simulator.streams.gather import gather_layer
from simulator.tallies.counting import unique_experts
from tests.made_up.changes import active_only, unrouted, with_layers
from tests.made_up.routers import naive_choose, router
from tests.made_up.runs import block_run
from tests.made_up.strategies import recorded, runs, seeds, specs
from tests.made_up.tables import MemoryTrace, geometry_of, meta_of
from tests.simulator.naive_rows import rows_of
from tracer.errors import UserError
from tracer.schema import DENOISE


def naive_team(layer, offsets, reused, cold, reselect):
    """Per row ids and weights; None where a score is missing. ``layer`` holds the trajectory's rows."""
    rows = []
    for t in range(len(layer.count)):
        count = 0 if reused[t] else layer.count[t]
        rows.append((layer.expert_ids[t, :count].tolist(), layer.gate_weights[t, :count].tolist()))
    for f in range(len(offsets) - 1):
        computed = [t for t in range(offsets[f], offsets[f + 1]) if rows[t][0]]
        if not any(cold[t] for t in computed):
            continue
        inside = {e for t in computed if not cold[t] for e in rows[t][0]}
        for t in computed:
            if not reselect:
                kept = [(e, w) for e, w in zip(*rows[t], strict=True) if e in inside]
                rows[t] = ([e for e, _ in kept], [w for _, w in kept])
            elif cold[t] or layer.router.topk_group < layer.router.n_group:
                if np.isnan(layer.router_scores[t, sorted(inside)]).any():
                    return None
                rows[t] = naive_choose(layer.router_scores[t], inside, layer.router)
    return rows


def of_case(case, policy):
    """The definition as the rule asks for it (tests/simulator/definitions.py)."""
    offsets, states = case.trajectory.forwards.row_offsets, (case.trajectory.reused, case.trajectory.cold)
    rows = naive_team(case.layer, offsets, *states, policy.reselect)
    return [dict(zip(ids, map(np.float32, weights))) for ids, weights in rows]


NAIVE = {"team": of_case}


def naive_unique(layer, chosen, trajectory):
    """Of every forward (lower bound, figure, upper bound) of its unique experts; ``chosen`` as :func:`naive_team` has it.

    The lower one is what branch 0 uses, cold rows left out; the upper what all computed rows were recorded with.
    """
    offsets, found = trajectory.forwards.row_offsets, []
    for f in range(len(offsets) - 1):
        lower, figure, upper = set(), set(), set()
        for t in range(offsets[f], offsets[f + 1]):
            figure |= set(chosen[t][0])
            if trajectory.reused is None or not trajectory.reused[t]:
                upper |= set(layer.expert_ids[t, : layer.count[t]].tolist())
            if trajectory.branch[t] == 0 and not (trajectory.cold is not None and trajectory.cold[t]):
                lower |= set(chosen[t][0])
        found.append((len(lower), len(figure), len(upper)))
    return found


def check(policy, segment, where, trajectory):
    offsets = trajectory.forwards.row_offsets
    none = np.zeros(len(trajectory.position), bool)
    reused = none if trajectory.reused is None else trajectory.reused
    cold = none if trajectory.cold is None else trajectory.cold
    for layer in segment.layers:
        found = gather_layer(segment.layer(layer, True), segment.forwards, trajectory)
        expected = naive_team(found, offsets, reused, cold, policy.reselect)
        if expected is None:
            with pytest.raises(UserError, match=f"does not hold for .*forward .*, layer {layer}"):
                policy.select(found, trajectory, where)
        else:
            assert rows_of(policy.select(found, trajectory, where)) == expected


switches = {"reuse": st.booleans(), "limit": st.booleans(), "hot_probability": st.floats(0.3, 1)}


@settings(max_examples=100, deadline=None)
@given(
    runs(),
    st.builds(Team, speculate=st.booleans(), hot_distance=st.integers(1, 2), **switches),
    seeds,
    st.booleans(),
)
def test_cold_rows_choose_among_what_the_others_use(run, policy, seed, active):
    segment, where = run
    segment = with_layers(segment, unrouted(np.random.default_rng(seed)))
    if active:
        segment = active_only(segment)
    check(policy, segment, where, policy.acceptance().unroll(segment, where))


@settings(max_examples=100, deadline=None)
@given(st.data(), st.builds(Team, hot_distance=st.integers(1, 2), **switches), seeds)
def test_bounds_of_unique_experts_enclose_them_in_every_forward(data, policy, seed):
    spec = data.draw(specs())
    segment, where = data.draw(runs(spec=spec))
    segment = with_layers(segment, unrouted(np.random.default_rng(seed)))
    trajectory = policy.acceptance().unroll(segment, where)
    none = np.zeros(len(trajectory.position), bool)
    reused, cold = (none if rows is None else rows for rows in (trajectory.reused, trajectory.cold))
    denoise, counted = trajectory.forwards.kind == DENOISE, []
    for number in segment.layers:
        layer = gather_layer(segment.layer(number, True), segment.forwards, trajectory)
        chosen = naive_team(layer, trajectory.forwards.row_offsets, reused, cold, True)
        found = naive_unique(layer, chosen, trajectory)
        assert all(lower <= figure <= upper for lower, figure, upper in found)
        if spec.topk_group >= spec.n_group:
            # Without groups rows that are not cold keep their experts, so branch 0's recorded ones are the bound.
            recorded_ids = [layer.expert_ids[t, : layer.count[t]].tolist() for t in range(len(none))]
            kept = [([], []) if reused[t] or cold[t] else (ids, ids) for t, ids in enumerate(recorded_ids)]
            assert [row[0] for row in naive_unique(layer, kept, trajectory)] == [row[0] for row in found]
        counted += [row for row, yes in zip(found, denoise, strict=True) if yes]
    meta = meta_of(dict.fromkeys(segment.layers, spec), block_length=where.block_length)
    (run,) = replay(MemoryTrace(meta, {}, [segment]), [policy]).runs
    lower, figure, upper = (sum(column) / len(counted) for column in zip(*counted, strict=True))
    assert run.bounds["unique_experts"] == [lower, upper] and run.summary["unique_experts"] == figure


@settings(max_examples=60, deadline=None)
@given(st.data(), st.booleans())
def test_without_reselecting_cold_rows_only_drop(data, speculate):
    spec = data.draw(specs().filter(lambda s: s.topk_group >= s.n_group))
    segment, where = data.draw(runs(spec=spec))
    policy = Team(speculate=speculate, reselect=False, hot_distance=1, hot_probability=1.0)
    trajectory = policy.acceptance().unroll(segment, where)
    check(policy, segment, where, trajectory)
    offsets = trajectory.forwards.row_offsets
    again = Team(speculate=speculate, hot_distance=1, hot_probability=1.0)
    for layer in segment.layers:
        found = gather_layer(segment.layer(layer, True), segment.forwards, trajectory)
        fewer = policy.select(replace(found, router_scores=None), trajectory, where)
        full = again.select(found, trajectory, where)
        # Cold rows stay inside what the others use, so ids are enough for the unique experts.
        assert np.array_equal(
            unique_experts(fewer.expert_ids, fewer.count, offsets, spec.num_experts),
            unique_experts(full.expert_ids, full.count, offsets, spec.num_experts),
        )


@pytest.mark.parametrize(("experts", "groups"), [(128, (1, 1)), (256, (8, 4))])
@pytest.mark.parametrize("speculate", [False, True])
def test_real_sizes(experts, groups, speculate):
    rng = np.random.default_rng(4)
    function = "softmax" if groups == (1, 1) else "sigmoid"
    spec = router(rng, experts, 8, function, *groups, bias=function == "sigmoid")
    segment, _ = block_run(rng, specs={1: spec}, block_length=32, blocks=1, prompt=40, max_accept=8)
    policy = Team(speculate=speculate)
    where = geometry_of(segment, 32)
    trajectory = policy.acceptance().unroll(segment, where)
    assert trajectory.cold.any()
    check(policy, segment, where, trajectory)


@settings(max_examples=30, deadline=None)
@given(runs())
def test_everything_off_is_vanilla(run):
    segment, where = run
    policy = Team(reuse=False, limit=False, speculate=False)
    trajectory = policy.acceptance().unroll(segment, where)
    assert trajectory.forwards is segment.forwards
    for layer in segment.layers:
        found = segment.layer(layer)
        vanilla = Vanilla().select(found, recorded(segment, where), where)
        assert rows_of(policy.select(found, trajectory, where)) == rows_of(vanilla)


def test_it_brings_its_acceptance_along():
    policy = load_policy("routing", "team:speculate=false,threshold=0.9,quota=2,hot_probability=0.6,hot_distance=3")
    assert policy.acceptance() == TeamAcceptance(True, True, False, 0.9, 2, 0.6, 3)
    assert load_policy("routing", "team").acceptance() == load_policy("acceptance", "team")


def test_requirements_follow_the_switches():
    assert Team().requires == {TOKENS, CONFIDENCE, SCORES} == Team.requires
    assert Team(speculate=False).requires == {TOKENS, CONFIDENCE, ACTIVE}
    assert Team(reselect=False).requires == {TOKENS, CONFIDENCE}
    assert Team(limit=False, speculate=False).requires == {TOKENS}
    assert Team(reuse=False, limit=False, speculate=False).requires == frozenset()


def test_what_it_cannot_do_is_refused():
    rng = np.random.default_rng(11)
    spec = router(rng, 8, 2, n_group=4, topk_group=2)
    segment, _ = block_run(rng, specs={1: spec}, block_length=8, kv_cache=False)
    where = geometry_of(segment, 8)
    policy = Team(speculate=False, hot_distance=1, hot_probability=1.0)
    trajectory = policy.acceptance().unroll(segment, where)
    assert trajectory.cold.any()
    with pytest.raises(UserError, match="reselect=false is exact for routers without groups"):
        replace(policy, reselect=False).select(segment.layer(1), trajectory, where)
    with pytest.raises(UserError, match="which the trace does not hold in layer 1"):
        policy.select(segment.layer(1), trajectory, where)
    with pytest.raises(UserError, match="hot_distance must be 1 or more"):
        Team(hot_distance=0)
