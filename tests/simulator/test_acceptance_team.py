"""TEAM's row states and simulated forwards against a plain simulation with sets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.acceptance.recorded import Recorded
from simulator.acceptance.team import LAST_STEP, TeamAcceptance
from simulator.streams.gather import check_trajectory
from tests.made_up.changes import calls_of
from tests.made_up.runs import block_run
from tests.made_up.strategies import runs, seeds
from tests.made_up.tables import geometry_of
from tracer.errors import UserError
from tracer.schema import DECODED, DENOISE, MASKED, PREFILL, PROMPT


def naive_quota(length, steps, step):
    """Tokens a block of ``length`` must gain at a step: its share, the remainder to the first steps, at least one."""
    return max(1, length // steps + (1 if step < length % steps else 0))


def naive_blocks(segment, block_length):
    """Blocks by (request, block): their steps as dicts of sets and maps over positions.

    And ``later``: where a position is a real token for the first time after the block's last step, whatever the forward.
    """
    forwards, tokens = segment.forwards, segment.tokens
    blocks = {}
    for f in range(forwards.num_forwards):
        block = int(forwards.block[f])
        rows = range(forwards.row_offsets[f], forwards.row_offsets[f + 1])
        own = {int(tokens.position[t]): t for t in rows if tokens.position[t] // block_length == block}
        entry = blocks.setdefault((int(forwards.request_id[f]), block), {"steps": [], "later": {}})
        if forwards.kind[f] == DENOISE:
            entry["steps"].append(
                {
                    "forward": f,
                    "rows": own,
                    "outside": [t for t in rows if t not in own.values()],
                    "known": {j for j, t in own.items() if tokens.state[t] != MASKED},
                    "accepted": {j for j, t in own.items() if tokens.accepted[t]},
                    "x": {j: int(tokens.predicted_id[t]) for j, t in own.items()},
                    "p": {j: tokens.confidence[t] for j, t in own.items()},
                }
            )
    blocks = {key: entry for key, entry in blocks.items() if entry["steps"]}
    for (request, block), entry in blocks.items():
        for f in range(entry["steps"][-1]["forward"] + 1, forwards.num_forwards):
            for t in range(forwards.row_offsets[f], forwards.row_offsets[f + 1]):
                real = tokens.position[t] // block_length == block and tokens.state[t] in (PROMPT, DECODED)
                if forwards.request_id[f] == request and real:
                    entry["later"].setdefault(int(tokens.position[t]), t)
    return blocks


def naive_accept(masked, p, threshold, quota):
    high = {j for j in masked if p[j] > np.float32(threshold)}
    return high if len(high) >= quota else set(sorted(masked, key=lambda j: (-p[j], j))[:quota])


def naive_cold(positions, known, p, exempt, hot_probability, hot_distance):
    cold = set()
    for j in positions:
        distance = min((abs(j - k) for k in known), default=0)
        if distance >= hot_distance and j not in exempt and p[j] < np.float32(hot_probability):
            cold.add(j)
    return cold


def naive_states(segment, block_length, policy):
    """Rows (reused, cold) of the recorded forwards, without speculation."""
    reused, cold = set(), set()
    for entry in naive_blocks(segment, block_length).values():
        for before, step in zip(entry["steps"], entry["steps"][1:], strict=False):
            masked = sorted(set(step["rows"]) - step["known"], key=lambda j: (-before["p"][j], j))
            if policy.reuse:
                reused |= {step["rows"][j] for j in step["known"] - before["accepted"]} | set(step["outside"])
            if policy.limit:
                far = naive_cold(
                    step["rows"],
                    step["known"],
                    before["p"],
                    masked[:2],
                    policy.hot_probability,
                    policy.hot_distance,
                )
                cold |= {step["rows"][j] for j in far}
    return reused, cold


def naive_block(entry, policy, threshold, quota):
    """The simulated denoise forwards of one block: each a dict of its rows and what it accepts; ``quota(step)`` at least."""
    steps = entry["steps"]
    positions = set(steps[0]["rows"])
    final = steps[-1]["known"] | steps[-1]["accepted"]

    def seen(state):
        return [s for s in steps if s["known"] <= state][-1]

    def router_row(state, step, j):
        if j not in state or j in step["known"]:
            return step["rows"][j]
        real = [s["rows"][j] for s in steps if j in s["known"]]
        return real[0] if real else entry["later"].get(j, steps[-1]["rows"][j])

    cur = set(steps[0]["known"])
    just = naive_accept(positions - cur, steps[0]["p"], threshold, quota(0))
    forwards = [{"like": steps[0]["forward"], "rows": None, "gained": len(just), "chosen": -1}]
    cur |= just
    last = steps[0]
    while not final <= cur:
        surest = sorted(positions - cur, key=lambda j: (-last["p"][j], j))[:2]
        a, b = surest[0], surest[1] if len(surest) > 1 else None
        joins = [set(), {a}, {b} - {None}, {a, b} - {None}]
        states = [cur | extra for extra in joins]
        sees = [seen(state) for state in states]
        taken = [
            naive_accept(positions - state, step["p"], threshold, quota(len(forwards)))
            for state, step in zip(states, sees, strict=True)
        ]
        decoded = (cur - just) if policy.reuse else set()
        cold = set()
        if policy.limit:
            cold = naive_cold(positions, states[3], last["p"], surest, policy.hot_probability, policy.hot_distance)
        rows = [(t, False, 0, policy.reuse, False) for t in sees[0]["outside"]]
        for r in range(4):
            for j in sorted(positions):
                rows.append((router_row(states[r], sees[r], j), j not in states[r], r, j in decoded, j in cold))

        def right(j, r, last=last, sees=sees, taken=taken):
            return j is not None and j in taken[r] and sees[r]["x"][j] == last["x"][j]

        a1, a2 = right(a, 0), right(b, 0)
        a12, a21 = right(b, 1), a2 and right(a, 2)
        chosen = 3 if (a1 and a2) or (a1 and a12) or (a2 and a21) else 1 if a1 else 2 if a2 else 0
        gained = (0, 1, 1, 2)[chosen] + len(taken[chosen])
        forwards.append({"like": sees[0]["forward"], "rows": rows, "gained": gained, "chosen": chosen})
        cur, just, last = states[chosen] | taken[chosen], taken[chosen], sees[chosen]
    return forwards


def naive_fewest(entry):
    """Fewest forwards of a block over vanilla's states when speculation is lucky whenever vanilla's future allows it."""
    steps = entry["steps"]
    positions = set(steps[0]["rows"])
    states = [s["known"] for s in steps] + [steps[-1]["known"] | steps[-1]["accepted"]]
    when = {}
    for i, step in enumerate(steps):
        for j in step["accepted"]:
            when.setdefault(j, (i, step["x"][j]))

    def farthest(i):
        before = steps[i - 1]
        surest = sorted(positions - states[i], key=lambda j: (-before["p"][j], j))[:2]
        lucky = {j for j in surest if j in when and when[j][0] <= i + 1 and when[j][1] == before["x"][j]}
        reached = states[i] | lucky
        reached = reached | [s for s in steps if s["known"] <= reached][-1]["accepted"]
        return max(i + 1, max(m for m, state in enumerate(states) if state <= reached))

    fewest = {1: 1}
    for i in range(1, len(steps)):
        for m in range(i + 1, farthest(i) + 1):
            fewest[m] = min(fewest.get(m, len(steps) + 1), fewest[i] + 1)
    return fewest[len(steps)]


def naive_bounds(entry, forwards):
    """A block's (tokens, forwards) at the fewest and the most tokens a forward, ``forwards`` being the simulated ones."""
    vanilla, own = sum(len(step["accepted"]) for step in entry["steps"]), sum(f["gained"] for f in forwards)
    return [
        (min(vanilla, own), max(len(entry["steps"]), len(forwards))),
        (max(vanilla, own), min(naive_fewest(entry), len(forwards))),
    ]


def naive_team(segment, block_length, policy, threshold, quota):
    """Every forward of the trajectory in order: a dict of the recorded forward it is like, its kind and its rows."""
    forwards, tokens = segment.forwards, segment.tokens
    blocks, found = naive_blocks(segment, block_length), []
    for f in range(forwards.num_forwards):
        key = (int(forwards.request_id[f]), int(forwards.block[f]))
        if forwards.kind[f] != DENOISE:
            found.append({"like": f, "rows": None, "gained": int(forwards.num_accepted[f]), "chosen": -1, "step": -1})
        elif blocks[key]["steps"][0]["forward"] == f:
            for step, forward in enumerate(naive_block(blocks[key], policy, threshold, quota)):
                found.append({**forward, "step": step})
    for forward in found:
        f = forward["like"]
        if forward["rows"] is None:
            plain = range(forwards.row_offsets[f], forwards.row_offsets[f + 1])
            forward["rows"] = [(t, tokens.state[t] == MASKED, 0, False, False) for t in plain]
            forward["branches"] = 1
        else:
            forward["branches"] = 4
    return found


def of_segment(segment, geometry, policy):
    """The definition as the rule asks for it (tests/simulator/definitions.py)."""
    found = naive_team(segment, geometry.block_length, policy, policy.threshold, lambda step: policy.quota)
    return [(f["step"], f["gained"], f["branches"], f["chosen"], f["rows"]) for f in found]


NAIVE = {"team:threshold=0.6,quota=1": of_segment, "team:threshold=0.9,quota=2,reuse=false,hot_distance=1": of_segment}


def assert_simulated(segment, where, policy, threshold, quota):
    trajectory = policy.unroll(segment, where)
    check_trajectory(trajectory, segment, "team")
    expected = naive_team(segment, where.block_length, policy, threshold, quota)
    forwards, recorded, tokens = trajectory.forwards, segment.forwards, segment.tokens
    assert forwards.forward_id.tolist() == list(range(len(expected)))
    assert forwards.part_offsets.tolist() == list(range(len(expected) + 1))
    assert forwards.row_offsets.tolist() == np.cumsum([0] + [len(f["rows"]) for f in expected]).tolist()
    like = [f["like"] for f in expected]
    for column in ("request_id", "kind", "block", "kv_tokens"):
        assert getattr(forwards, column).tolist() == getattr(recorded, column)[like].tolist()
    for column, key in (("step", "step"), ("num_accepted", "gained"), ("branches", "branches")):
        assert getattr(forwards, column).tolist() == [f[key] for f in expected]
    assert forwards.chosen_branch.tolist() == [f["chosen"] for f in expected]
    assert forwards.num_tokens.tolist() == [len(f["rows"]) for f in expected]
    rows = [row for f in expected for row in f["rows"]]
    assert trajectory.source.tolist() == [row[0] for row in rows]
    assert trajectory.position.tolist() == [tokens.position[row[0]] for row in rows]
    masked = trajectory.state == MASKED
    assert masked.tolist() == [bool(row[1]) for row in rows]
    real = np.array([tokens.state[row[0]] for row in rows])
    assert trajectory.state[~masked].tolist() == np.where(real == MASKED, DECODED, real)[~masked].tolist()
    assert trajectory.branch.tolist() == [row[2] for row in rows]
    reused = [row[3] for row in rows]
    assert (trajectory.reused.tolist() if policy.reuse else [False] * len(rows)) == reused
    cold = [row[4] for row in rows]
    assert (trajectory.cold.tolist() if policy.limit else [False] * len(rows)) == cold
    masked_rows = np.concatenate(([0], np.cumsum(masked)))
    assert forwards.num_masked.tolist() == np.diff(masked_rows[forwards.row_offsets]).tolist()
    blocks = naive_blocks(segment, where.block_length).values()
    ends = [naive_bounds(entry, naive_block(entry, policy, threshold, quota)) for entry in blocks]
    lowest, highest = (tuple(sum(block[end][i] for block in ends) for i in (0, 1)) for end in (0, 1))
    assert trajectory.bounds == {
        "accepted": (lowest[0], highest[0]),
        "denoise_forwards": (lowest[1], highest[1]),
    }
    lower, upper = trajectory.bound_rows
    assert upper.tolist() == [not r for r in reused]
    assert lower.tolist() == [not r and row[2] == 0 and not c for row, r, c in zip(rows, reused, cold, strict=True)]
    return trajectory


policies = st.builds(
    TeamAcceptance,
    reuse=st.booleans(),
    limit=st.booleans(),
    speculate=st.just(True),
    threshold=st.one_of(st.none(), st.floats(0, 1)),
    quota=st.one_of(st.none(), st.integers(1, 3)),
    hot_probability=st.floats(0, 1),
    hot_distance=st.integers(1, 4),
)


def rounded(segment):
    """Confidences drawn from a few values, so that ties happen."""
    confidence = np.round(segment.tokens.confidence * 4) / 4
    return replace(segment, tokens=replace(segment.tokens, confidence=confidence.astype(np.float32)))


@settings(max_examples=150, deadline=None)
@given(runs(), policies, st.sampled_from([None, 1, 2, 3, 4, 5, 7]), st.booleans())
def test_speculation_is_the_plain_simulation(run, policy, steps, ties):
    segment, where = run
    segment = rounded(segment) if ties else segment
    where = replace(where, decoding={"threshold": 0.6, "steps": steps})
    threshold = 0.6 if policy.threshold is None else policy.threshold
    length = where.block_length

    def quota(step):
        return policy.quota or naive_quota(length, steps or length, step)

    assert_simulated(segment, where, policy, threshold, quota)


def test_speculation_at_real_size():
    rng = np.random.default_rng(5)
    for kv_cache in (True, False):
        segment, _ = block_run(rng, blocks=3, block_length=32, prompt=70, kv_cache=kv_cache, max_accept=4)
        where = geometry_of(segment, 32, steps=32)
        trajectory = assert_simulated(segment, where, TeamAcceptance(), 0.95, lambda step: 1)
        assert (LAST_STEP in trajectory.notes) == (not kv_cache)
        assert trajectory.cold.any() and trajectory.reused.any()


@pytest.mark.parametrize("kv_cache", [False, True])
def test_only_a_request_s_last_tokens_have_no_forward_as_real_ones(kv_cache):
    rng = np.random.default_rng(11)
    segment, _ = block_run(rng, blocks=3, block_length=4, prompt=5, kv_cache=kv_cache, max_accept=2, requests=2)
    trajectory = TeamAcceptance(threshold=0.5).unroll(segment, geometry_of(segment, 4))
    tokens, last = segment.tokens, int(segment.forwards.block.max())
    known = trajectory.state != MASKED
    stands_in = known & (tokens.state[trajectory.source] == MASKED)
    assert set(np.repeat(trajectory.forwards.block, np.diff(trajectory.forwards.row_offsets))[stands_in]) == (
        set() if kv_cache else {last}
    )
    assert (LAST_STEP in trajectory.notes) == (not kv_cache)


def test_a_next_block_that_begins_after_other_calls_gives_no_rows():
    rng = np.random.default_rng(12)
    segment, _ = block_run(rng, blocks=2, block_length=4, prompt=5, kv_cache=False, requests=2)
    where, policy = geometry_of(segment, 4), TeamAcceptance(threshold=0.5)
    forwards = segment.forwards
    end = int(np.flatnonzero(forwards.block == forwards.block.max())[0])
    other = int(np.flatnonzero(forwards.request_id == 1)[0])
    first = calls_of(segment, range(end))
    between = calls_of(segment, [*range(end), other, *range(end, other)])
    for without in (first, replace(first, following=lambda: None), between):
        assert LAST_STEP in policy.unroll(without, where).notes
    strange = policy.unroll(replace(first, following=lambda: calls_of(segment, [other])), where)
    assert LAST_STEP in strange.notes and strange.following is None
    assert strange.source.tolist() == policy.unroll(first, where).source.tolist()
    whole = policy.unroll(segment, where)
    held = policy.unroll(replace(first, following=lambda: calls_of(segment, [end])), where)
    assert LAST_STEP not in held.notes
    rows = len(held.source)
    assert held.source.tolist() == whole.source[:rows].tolist() and held.source.max() >= first.forwards.num_rows
    assert held.position.tolist() == whole.position[:rows].tolist()
    assert held.state.tolist() == whole.state[:rows].tolist()
    check_trajectory(held, first, "team")
    with pytest.raises(UserError, match="takes rows from outside the segment"):
        check_trajectory(replace(held, following=None), first, "team")


def follow_the_rule(segment, rng, threshold):
    """Confidences that make the recorded acceptances those of the accept rule with quota 1."""
    tokens, forwards = segment.tokens, segment.forwards
    confidence = (rng.random(len(tokens.state)) * threshold * 0.99).astype(np.float32)
    confidence[tokens.accepted] = (threshold + (1 - threshold) * rng.random(int(tokens.accepted.sum()))) * 0.999 + 0.001
    for f in np.flatnonzero(forwards.num_accepted == 1):
        rows = np.arange(forwards.row_offsets[f], forwards.row_offsets[f + 1])
        masked = rows[(tokens.state[rows] == MASKED) & ~tokens.accepted[rows]]
        if rng.random() < 0.5:
            own = rows[tokens.accepted[rows]]
            confidence[own] = np.float32(threshold)
            confidence[masked] *= np.float32(0.9)
    confidence[np.isnan(tokens.confidence)] = np.nan
    return replace(segment, tokens=replace(tokens, confidence=confidence))


@settings(max_examples=120, deadline=None)
@given(runs(), seeds)
def test_bounds_hold_at_vanillas_states(run, seed):
    segment, where = run
    rng = np.random.default_rng(seed)
    segment = follow_the_rule(segment, rng, 0.5)
    trajectory = TeamAcceptance(threshold=0.5, quota=1).unroll(segment, where)
    vanilla, fewest = trajectory.bounds["denoise_forwards"]
    simulated = int((trajectory.forwards.kind == DENOISE).sum())
    assert fewest <= simulated <= vanilla
    denoise = trajectory.forwards.kind == DENOISE
    assert int(trajectory.forwards.num_accepted[denoise].sum()) == trajectory.bounds["accepted"][0]


@settings(max_examples=120, deadline=None)
@given(
    runs(),
    st.builds(
        TeamAcceptance,
        reuse=st.booleans(),
        limit=st.booleans(),
        speculate=st.just(False),
        hot_probability=st.floats(0, 1),
        hot_distance=st.integers(1, 4),
    ),
    st.booleans(),
)
def test_without_speculation_rows_get_states(run, policy, ties):
    segment, where = run
    segment = rounded(segment) if ties else segment
    trajectory = policy.unroll(segment, where)
    reused, cold = naive_states(segment, where.block_length, policy)
    assert trajectory.forwards is segment.forwards and trajectory.recorded
    assert (set() if trajectory.reused is None else set(np.flatnonzero(trajectory.reused).tolist())) == reused
    assert (set() if trajectory.cold is None else set(np.flatnonzero(trajectory.cold).tolist())) == cold
    assert (trajectory.reused is not None, trajectory.cold is not None) == (policy.reuse, policy.limit)
    assert trajectory.bounds is None and trajectory.notes == ()


def test_padding_outside_the_block_is_reused_and_never_cold():
    rng = np.random.default_rng(6)
    segment, _ = block_run(rng, blocks=2, block_length=6, prompt=9, kv_cache=False)
    tokens = segment.tokens
    outside = (tokens.position < 3) & (tokens.position >= 0)
    padded = replace(tokens, position=np.where(outside, np.int32(-1), tokens.position))
    segment = replace(segment, tokens=padded)
    policy = TeamAcceptance(speculate=False)
    trajectory = policy.unroll(segment, geometry_of(segment, 6))
    reused, cold = naive_states(segment, 6, policy)
    assert set(np.flatnonzero(trajectory.reused).tolist()) == reused
    assert set(np.flatnonzero(trajectory.cold).tolist()) == cold
    assert trajectory.reused[outside].any() and not trajectory.cold[outside].any()


def test_everything_off_is_the_recorded_run():
    segment, _ = block_run(np.random.default_rng(7))
    off = TeamAcceptance(reuse=False, limit=False, speculate=False)
    found = off.unroll(segment, geometry_of(segment))
    expected = Recorded().unroll(segment, geometry_of(segment))
    assert found.forwards is segment.forwards and found.source is None
    assert found.reused is None and found.cold is None and found.branch is None
    assert found.position is expected.position and found.state is expected.state
    assert off.requires == frozenset()


def test_a_segment_without_denoise_forwards_stays_as_it_is():
    segment, _ = block_run(np.random.default_rng(8), blocks=1, prompt=9)
    first = int(np.flatnonzero(segment.forwards.kind == PREFILL)[0])
    forwards, tokens = segment.forwards, segment.tokens
    rows = slice(forwards.row_offsets[first], forwards.row_offsets[first + 1])
    columns = {
        name: getattr(forwards, name)[first : first + 1]
        for name in forwards.__slots__
        if name not in ("row_offsets", "part_offsets")
    }
    size = rows.stop - rows.start
    only = replace(forwards, row_offsets=np.array([0, size]), part_offsets=np.array([0, 1]), **columns)
    kept = replace(tokens, **{name: getattr(tokens, name)[rows] for name in tokens.__slots__})
    trajectory = TeamAcceptance().unroll(replace(segment, forwards=only, tokens=kept), geometry_of(segment))
    assert trajectory.source.tolist() == list(range(size)) and not trajectory.reused.any()
    assert trajectory.bounds == {"accepted": (0, 0), "denoise_forwards": (0, 0)}


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"threshold": -0.1}, "threshold must be 0 or more, not -0.1"),
        ({"quota": 0}, "quota must be 1 or more, not 0"),
        ({"hot_probability": 1.1}, "hot_probability must be between 0 and 1, not 1.1"),
        ({"hot_distance": 0}, "hot_distance must be 1 or more, not 0"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters, sentence):
    with pytest.raises(UserError, match=sentence):
        TeamAcceptance(**parameters)


def test_traces_it_cannot_replay_are_refused():
    rng = np.random.default_rng(9)
    segment, _ = block_run(rng)
    where, team = geometry_of(segment), TeamAcceptance()
    forwards, tokens = segment.forwards, segment.tokens
    first = int(np.flatnonzero(forwards.kind == DENOISE)[0])

    def refused(sentence, segment=segment, where=where):
        with pytest.raises(UserError, match=sentence):
            team.unroll(segment, where)

    refused("needs token states", replace(segment, tokens=None))
    refused("works on blocks", where=geometry_of(segment, 0))
    branches = forwards.branches.copy()
    branches[first] = 4
    refused(f"forward {first} has several branches", replace(segment, forwards=replace(forwards, branches=branches)))
    parts = forwards.part_offsets.copy()
    parts[first + 1 :] += 1
    refused(f"forward {first} holds several", replace(segment, forwards=replace(forwards, part_offsets=parts)))
    block = forwards.block.copy()
    block[first] = -1
    refused(f"denoise forward {first} has none", replace(segment, forwards=replace(forwards, block=block)))
    masked = forwards.row_offsets[first] + int(np.flatnonzero(tokens.state[forwards.row_offsets[first] :] == MASKED)[0])
    confidence = tokens.confidence.copy()
    confidence[masked] = np.nan
    refused(
        f"confidence of every masked token, which forward {first} lacks",
        replace(segment, tokens=replace(tokens, confidence=confidence)),
    )
    without = TeamAcceptance(limit=False, speculate=False)
    assert without.unroll(replace(segment, tokens=replace(tokens, confidence=confidence)), where).cold is None
    position = tokens.position.copy()
    position[masked] = -1
    refused("hold the same positions", replace(segment, tokens=replace(tokens, position=position)))


def test_requirements_follow_the_switches():
    assert TeamAcceptance().requires == {"tokens", "confidence"}
    assert TeamAcceptance(limit=False, speculate=False).requires == {"tokens"}
    assert TeamAcceptance(reuse=False, speculate=False).requires == {"tokens", "confidence"}
