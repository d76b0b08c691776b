"""The replay of a run recorded under TEAM against TEAM written out with sets, in every cell."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.acceptance.team import TeamAcceptance
from simulator.replaying import replay
from simulator.routing.team import Team
from simulator.speculation.recorded_team import quotas_of
from tests.made_up.changes import active_only, with_layers
from tests.made_up.routers import naive_choose, router
from tests.made_up.strategies import recorded, seeds
from tests.made_up.tables import MemoryTrace, geometry_of, meta_of
from tests.simulator.naive_rows import rows_of
from tests.simulator.team_runs import team_run
from tests.simulator.test_acceptance_team import naive_quota
from tracer.errors import UserError
from tracer.schema import COMMIT, DENOISE, MASKED, PADDING


def decoding_of(policy, threshold, steps):
    names = ("reuse", "limit", "speculate", "hot_probability", "hot_distance")
    own = {name: getattr(policy, name) for name in names}
    return {"loop": "team", "threshold": threshold, "steps": steps, **own}


def trace_of(segment, specs, block_length, decoding):
    meta = meta_of(specs, block_length=block_length)
    meta = replace(meta, decoding={"block_length": block_length, "kv_cache": True, **decoding})
    return MemoryTrace(meta, {}, [segment])


policies = st.builds(
    TeamAcceptance,
    reuse=st.booleans(),
    limit=st.booleans(),
    speculate=st.booleans(),
    hot_probability=st.floats(0.2, 1),
    hot_distance=st.integers(1, 3),
)


@st.composite
def team_runs(draw, policies=policies):
    """(segment, what happened, specs, policy, geometry) of a TEAM run of one or two layers, routers without groups."""
    rng = np.random.default_rng(draw(seeds))
    policy = draw(policies)
    length, steps = draw(st.integers(2, 7)), draw(st.integers(1, 7))
    threshold = draw(st.sampled_from([0.3, 0.5, 0.8, 0.95, 1.0]))
    function = draw(st.sampled_from(["softmax", "sigmoid"]))
    specs = {}
    for layer in range(1, 1 + draw(st.integers(1, 2))):
        specs[layer] = router(rng, draw(st.integers(4, 11)), 2, function, bias=draw(st.booleans()))
    first = specs[1]
    specs = {
        layer: replace(first, expert_bias=None if spec.expert_bias is None else spec.expert_bias[: first.num_experts])
        for layer, spec in specs.items()
        if spec.expert_bias is None or len(spec.expert_bias) >= first.num_experts
    }
    segment, happened = team_run(
        rng,
        policy,
        threshold=threshold,
        steps=steps,
        specs=specs,
        block_length=length,
        blocks=draw(st.integers(1, 2)),
        prompt=draw(st.integers(1, 9)),
        requests=draw(st.integers(1, 2)),
        sure=draw(st.sampled_from([0.5, 0.9, 1.0])),
        kv_cache=draw(st.booleans()),
    )
    return segment, happened, specs, policy, geometry_of(segment, length, **decoding_of(policy, threshold, steps))


def flat(happened, column):
    return [row[column] for forward in happened for row in forward["rows"]]


@settings(max_examples=150, deadline=None)
@given(team_runs())
def test_row_states_are_those_of_the_plain_run(run):
    segment, happened, _, policy, where = run
    trajectory = policy.unroll(segment, where)
    assert trajectory.forwards is segment.forwards and trajectory.recorded
    assert trajectory.bounds is None and trajectory.notes == ()
    none = [False] * segment.forwards.num_rows
    assert (none if trajectory.reused is None else trajectory.reused.tolist()) == flat(happened, 5)
    assert (none if trajectory.cold is None else trajectory.cold.tolist()) == flat(happened, 6)
    assert (trajectory.reused is not None, trajectory.cold is not None) == (policy.reuse, policy.limit)
    branch = [0] * len(none) if trajectory.branch is None else trajectory.branch.tolist()
    assert branch == flat(happened, 7)


@settings(max_examples=100, deadline=None)
@given(team_runs(), st.booleans())
def test_experts_are_chosen_as_recorded(run, reselect):
    segment, happened, specs, policy, where = run
    names = ("reuse", "limit", "speculate", "hot_probability", "hot_distance")
    routing = Team(reselect=reselect, **{name: getattr(policy, name) for name in names})
    assert routing.recorded_in(where)
    trajectory = routing.acceptance().unroll(segment, where)
    cold = flat(happened, 6)
    for layer in specs:
        expected = [row for forward in happened for row in forward["experts"][layer]]
        found = segment.layer(layer, reselect)
        for t, (ids, weights) in enumerate(rows_of(routing.select(found, trajectory, where))):
            assert sorted(ids) == ([] if expected[t] is None else sorted(expected[t][0]))
            if expected[t] is not None and cold[t] and reselect:
                score = segment.layer(layer, True).router_scores[t]
                # K experts inside N are the K best of themselves, so their weights follow from the set alone.
                assert (ids, weights) == naive_choose(score, set(ids), specs[layer])


@settings(max_examples=80, deadline=None)
@given(team_runs())
def test_every_cell_of_a_replay(run):
    segment, happened, specs, policy, where = run
    names = ("reuse", "limit", "speculate", "hot_probability", "hot_distance")
    own = Team(**{name: getattr(policy, name) for name in names})
    result = replay(trace_of(segment, specs, where.block_length, where.decoding), ["vanilla", own])
    assert [r.estimate for r in result.runs] == [False, False]
    assert [r.bounds for r in result.runs] == [None, None]
    assert all(r.notes[0].startswith("Exact") for r in result.runs)
    unique, assignments = [], []
    for forward in happened:
        for layer in specs:
            rows = [row[0] for row in forward["experts"][layer] if row is not None]
            unique.append(len({e for row in rows for e in row}))
            assignments.append(sum(map(len, rows)))
    denoise = [f for f in happened if f["kind"] == DENOISE]
    gained = sum((0, 1, 1, 2)[max(f["chosen"], 0)] + len(kept(f)["accepted"]) for f in denoise)
    of_denoise = [len(specs) * [f["kind"] == DENOISE] for f in happened]
    counted = [n for n, yes in zip(unique, [y for ys in of_denoise for y in ys], strict=True) if yes]
    for number in (0, 1):
        cells = result.cells.filter(result.cells["run"] == number)
        assert cells["unique_experts"].to_list() == unique
        assert cells["assignments"].to_list() == assignments
        forwards = result.forwards.filter(result.forwards["run"] == number)
        assert forwards["forward_id"].to_list() == list(range(len(happened)))
        assert forwards["chosen_branch"].to_list() == [f["chosen"] for f in happened]
        assert forwards["num_accepted"].to_list() == [f["gained"] for f in happened]
        summary = result.runs[number].summary
        assert summary["tokens_per_forward"] == float(Fraction(gained, len(denoise)))
        assert summary["unique_experts"] == float(Fraction(sum(counted), len(counted)))
        with_commit = len(denoise) + sum(f["kind"] == COMMIT for f in happened)
        assert summary["tokens_per_forward_with_commit"] == float(Fraction(gained, with_commit))


def kept(forward):
    return forward["branches"][max(forward["chosen"], 0)]


def big_run(policy=None, experts=128, threshold=0.9, seed=3, **options):
    rng = np.random.default_rng(seed)
    policy = policy or TeamAcceptance()
    specs = {1: router(rng, experts, 8)}
    run = team_run(
        rng, policy, threshold=threshold, steps=32, specs=specs, block_length=32, prompt=40, blocks=2, **options
    )
    where = geometry_of(run[0], 32, **decoding_of(policy, threshold, 32))
    return *run, specs, policy, where


def test_real_size_takes_every_branch():
    segment, happened, _, policy, where = big_run()
    trajectory = policy.unroll(segment, where)
    assert trajectory.reused.tolist() == flat(happened, 5) and trajectory.cold.tolist() == flat(happened, 6)
    assert trajectory.cold.any() and trajectory.reused.any()
    seen = {f["chosen"] for s in range(3, 9) for f in big_run(seed=s)[1] if f["kind"] == DENOISE}
    assert seen == {-1, 0, 1, 2, 3}


@pytest.mark.parametrize(("length", "steps"), [(32, 32), (32, 5), (7, 3), (4, 9), (5, 1)])
def test_quotas_are_those_of_the_plain_run(length, steps):
    segment, _, _, _, _ = big_run()
    found = quotas_of(geometry_of(segment, length, steps=steps)).tolist()
    assert found == [naive_quota(length, steps, step) for step in range(steps)]


@pytest.mark.parametrize("threshold", [0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 5, 6, 24, 31, 32, 40])
def test_a_vanilla_run_of_any_number_of_steps_begins_every_block_as_its_loop_did(steps, threshold):
    rng, off = np.random.default_rng(steps), TeamAcceptance(reuse=False, limit=False, speculate=False)
    specs = {1: router(rng, 16, 2)}
    segment, _ = team_run(
        rng, off, threshold=threshold, steps=steps, specs=specs, block_length=32, prompt=40, blocks=3, sure=1.0
    )
    # Without its switches the loop is vanilla, of one branch a forward.
    assert segment.forwards.chosen_branch.max() == -1 and segment.forwards.branches.max() == 1
    trajectory = TeamAcceptance().unroll(
        segment, geometry_of(segment, 32, loop="sdar", threshold=threshold, steps=steps)
    )
    found, recorded = (f.num_accepted[f.step == 0].tolist() for f in (trajectory.forwards, segment.forwards))
    assert found == recorded
    assert threshold < 1 or found == [min(24, naive_quota(32, steps, 0)), *[naive_quota(32, steps, 0)] * 2]
    assert int(trajectory.forwards.step.max()) <= int(segment.forwards.step.max()) < max(steps, 32 // steps)


def test_scores_of_the_experts_in_use_are_enough():
    segment, _, _, policy, where = big_run()
    routing = Team()
    trajectory = policy.unroll(segment, where)
    narrow = active_only(segment).layer(1, True)
    # The columns a call recorded hold all of N, so re-selection inside it never misses one.
    assert rows_of(routing.select(narrow, trajectory, where)) == rows_of(
        routing.select(segment.layer(1, True), trajectory, where)
    )


def test_other_parameters_are_refused():
    segment, _, specs, _, where = big_run()
    told = {
        "hot_probability": (0.6, "0.7"),
        "hot_distance": (3, "4"),
        "reuse": (False, "true"),
        "limit": (False, "true"),
        "speculate": (False, "true"),
        "threshold": (0.5, "0.9"),
        "quota": (2, "1"),
    }
    for name, (value, recorded_value) in told.items():
        policy = Team(**{name: value})
        assert not policy.recorded_in(where)
        with pytest.raises(UserError, match=f"recorded under TEAM with {name}={recorded_value};"):
            replay(trace_of(segment, specs, 32, where.decoding), [policy])
    off = TeamAcceptance(reuse=False, limit=False, speculate=False)
    with pytest.raises(UserError, match="with reuse=true,limit=true,speculate=true;"):
        off.unroll(segment, where)
    same = Team(threshold=0.9, quota=1)
    assert same.recorded_in(where) and same.acceptance().unroll(segment, where).cold.any()
    assert not same.recorded_in(replace(where, decoding={**where.decoding, "loop": "sdar"}))


def test_without_the_limit_its_numbers_do_not_matter():
    segment, _, _, policy, where = big_run(TeamAcceptance(limit=False))
    other = Team(limit=False, hot_probability=0.1, hot_distance=9)
    assert other.recorded_in(where)
    expected = policy.unroll(segment, where).reused.tolist()
    assert other.acceptance().unroll(segment, where).reused.tolist() == expected


def changed(array, at, value):
    array = array.copy()
    array[at] = value
    return array


def test_runs_of_other_rules_are_refused():
    segment, happened, _, policy, where = big_run()
    forwards, tokens = segment.forwards, segment.tokens
    at = next(n for n, f in enumerate(happened) if f["chosen"] == 3)
    row = int(forwards.row_offsets[at])
    branches, span = happened[at]["branches"], 32
    first = happened[at]["rows"][0][0]

    def refused(sentence, **changes):
        made = replace(
            segment,
            forwards=replace(forwards, **{k: v for k, v in changes.items() if k in forwards.__slots__}),
            tokens=replace(tokens, **{k: v for k, v in changes.items() if k in tokens.__slots__}),
        )
        with pytest.raises(UserError, match=sentence):
            policy.unroll(made, where)

    taken = row + 3 * span + min(branches[3]["accepted"]) - first
    refused(f"forward {at} accepted other tokens", accepted=changed(tokens.accepted, taken, False))
    refused(f"forward {at} accepted other tokens", confidence=changed(tokens.confidence, taken, 0.0))
    masked = row + 2 * span + min(set(branches[3]["known"]) - branches[2]["known"]) - first
    refused("other tokens than TEAM's rules give", state=changed(tokens.state, masked, 1))
    refused(f"forward {at} kept another branch", chosen_branch=changed(forwards.chosen_branch, at, 1))
    gained = int(forwards.num_accepted[at]) + 1
    refused(f"forward {at} gained another number", num_accepted=changed(forwards.num_accepted, at, gained))
    refused("this trace edits them", edited=changed(tokens.edited, taken, True))
    refused(f"1 or 4 branches, but forward {at} has 2", branches=changed(forwards.branches, at, 2))
    refused(f"forward {at} holds another number of branches", branches=changed(forwards.branches, at, 1))
    refused(f"which forward {at} lacks", confidence=changed(tokens.confidence, taken, np.nan))
    refused(f"forward {at} does not", position=changed(tokens.position, taken, -1))
    names = set(forwards.__slots__) - {"forward_id", "row_offsets", "part_offsets"}
    twice = {name: np.insert(getattr(forwards, name), at, getattr(forwards, name)[at]) for name in names}
    twice["part_offsets"] = forwards.part_offsets + (np.arange(len(happened) + 1) > at)
    twice["num_tokens"] = changed(twice["num_tokens"], [at, at + 1], 2 * span)
    twice["row_start"] = changed(twice["row_start"], at + 1, 2 * span)
    refused(f"forward {at} holds several", **twice)
    with pytest.raises(UserError, match="needs token states"):
        policy.unroll(replace(segment, tokens=None), where)
    with pytest.raises(UserError, match="works on blocks"):
        policy.unroll(segment, replace(where, block_length=0))
    # The same calls without a word that TEAM made them are no run to start from.
    with pytest.raises(UserError, match="starts from a vanilla run"):
        policy.unroll(segment, replace(where, decoding={"threshold": 0.9}))


def test_tokens_gained_need_not_be_known():
    segment, _, _, policy, where = big_run()
    nobody_knows = replace(segment.forwards, num_accepted=np.full_like(segment.forwards.num_accepted, -1))
    one, other = (policy.unroll(each, where) for each in (segment, replace(segment, forwards=nobody_knows)))
    assert one.reused.tolist() == other.reused.tolist() and one.cold.tolist() == other.cold.tolist()


def test_padding_is_idle_whatever_the_rules_say():
    segment, _, _, policy, where = big_run()
    trajectory = policy.unroll(segment, where)
    row = int(np.flatnonzero(~trajectory.reused)[0])
    padded = replace(trajectory, state=changed(trajectory.state, row, PADDING))
    made = with_layers(segment, lambda layer: replace(layer, count=changed(layer.count, row, 0))).layer(1, True)
    Team().select(made, padded, where)
    with pytest.raises(UserError, match="computed other rows in layer 1"):
        Team().select(made, trajectory, where)


def test_other_rows_and_other_experts_are_refused():
    segment, _, _, policy, where = big_run()
    trajectory, routing = policy.unroll(segment, where), Team()
    idle = int(np.flatnonzero(trajectory.reused)[0])
    cold = int(np.flatnonzero(trajectory.cold)[0])
    of = lambda row: int(np.searchsorted(segment.forwards.row_offsets, row, "right")) - 1  # noqa: E731

    def refused(sentence, policy=routing, **changes):
        made = with_layers(segment, lambda layer: replace(layer, **{k: v(layer) for k, v in changes.items()}))
        with pytest.raises(UserError, match=sentence):
            policy.select(made.layer(1, True), trajectory, where)

    busy = lambda layer: changed(layer.count, idle, 8)  # noqa: E731
    refused(f"forward {of(idle)} computed other rows in layer 1", count=busy)
    refused(f"forward {of(idle)} computed other rows in layer 1", Team(reselect=False), count=busy)

    def another(layer):
        return changed(layer.expert_ids, (cold, 0), min(set(range(128)) - set(layer.expert_ids[cold].tolist())))

    refused(f"cold rows of forward {of(cold)}, layer 1, choose other experts", expert_ids=another)
    kept = with_layers(segment, lambda layer: replace(layer, expert_ids=another(layer))).layer(1)
    selection = Team(reselect=False).select(kept, trajectory, where)
    assert selection.expert_ids is kept.expert_ids


def test_vanilla_counts_all_computed_rows_of_all_branches():
    segment, happened, specs, _, where = big_run()
    trajectory = recorded(segment, where)
    assert trajectory.reused is None and trajectory.branch.tolist() == flat(happened, 7)
    result = replay(trace_of(segment, specs, 32, where.decoding), ["vanilla"])
    of_spec = [n for n, f in enumerate(happened) if f["chosen"] >= 0]
    unique = dict(zip(result.cells["forward_id"].to_list(), result.cells["unique_experts"].to_list(), strict=True))
    for n in of_spec:
        rows = happened[n]["experts"][1]
        assert unique[n] == len({e for row in rows if row for e in row[0]})
        assert sum(row is not None for row in rows) == sum(not row[5] for row in happened[n]["rows"])
    masked = sum(f["rows"][t][1] is False for f in happened for t in range(len(f["rows"])))
    assert int((segment.tokens.state == MASKED).sum()) == masked
