"""dMoE's coreset against the loops of its definition."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.policy import Trajectory
from simulator.routing.dmoe import Dmoe
from simulator.routing.vanilla import Vanilla
from tests.made_up.changes import active_only, unrouted, with_layers, with_padding
from tests.made_up.routers import naive_choose, router, scores
from tests.made_up.runs import block_run
from tests.made_up.strategies import recorded, runs, seeds, specs
from tests.made_up.tables import geometry_of
from tests.simulator.naive_rows import rows_of
from tracer.errors import UserError
from tracer.schema import PADDING
from tracer.trace import LayerTrace


def naive_coreset(selections, top_k, top_p, min_experts):
    """Vote, aggregate, normalise, top-p, guard: the experts of one chunk, in order of votes. Float32 throughout."""
    num_experts = len(selections[0])
    votes = [np.float32(0)] * num_experts
    for r in selections:
        held = [e for e in range(num_experts) if not np.isnan(r[e])]
        for e in sorted(held, key=lambda e, r=r: (-r[e], e))[:top_k]:
            votes[e] = np.float32(votes[e] + r[e])
    total = np.float32(0)
    for v in votes:
        total = np.float32(total + v)
    total = np.float32(total + np.float32(1e-20))
    votes = [np.float32(v / total) for v in votes]
    order = sorted(range(num_experts), key=lambda e: (-votes[e], e))
    n, c = 0, np.float32(0)
    while n < num_experts:
        c = np.float32(c + votes[order[n]])
        n += 1
        if c > np.float32(top_p):
            break
    return order[: max(n, min_experts)]


def naive_chunks(trajectory, computes, block_length, restrict_prefix):
    """Rows by (forward, request, branch, position // block_length); padding and rows that compute nothing left out."""
    forwards = trajectory.forwards
    start, stop = forwards.part_rows
    chunks = {}
    for n in range(len(start)):
        for t in range(start[n], stop[n]):
            if trajectory.position is None:
                copy, at = divmod(t - start[n], forwards.num_tokens[n] // forwards.branches[n])
                position = forwards.kv_tokens[n] + at
            else:
                position = trajectory.position[t]
                copy = 0 if trajectory.branch is None else trajectory.branch[t]
            padding = position < 0 or (trajectory.state is not None and trajectory.state[t] == PADDING)
            if not computes[t] or padding:
                continue
            if restrict_prefix or position // block_length == forwards.block[n]:
                chunks.setdefault((n, copy, position // block_length), []).append(t)
    return list(chunks.values())


def naive_dmoe(layer, trajectory, top_p, min_experts, block_length, restrict_prefix):
    """Per row ids and weights; None where a score is missing."""
    spec = layer.router
    bias = np.zeros(spec.num_experts, np.float32) if spec.expert_bias is None else spec.expert_bias
    reused = np.zeros(len(layer.count), bool) if trajectory.reused is None else trajectory.reused
    counts = [0 if reused[t] else int(layer.count[t]) for t in range(len(layer.count))]
    rows = [(layer.expert_ids[t, :n].tolist(), layer.gate_weights[t, :n].tolist()) for t, n in enumerate(counts)]
    for chunk in naive_chunks(trajectory, [n > 0 for n in counts], block_length, restrict_prefix):
        coreset = naive_coreset([layer.router_scores[t] + bias for t in chunk], spec.top_k, top_p, min_experts)
        for t in chunk:
            if np.isnan(layer.router_scores[t, coreset]).any():
                return None
            rows[t] = naive_choose(layer.router_scores[t], coreset, spec)
    return rows


def of_case(case, policy):
    """The definition as the rule asks for it (tests/simulator/definitions.py)."""
    length = policy.block_length or case.geometry.block_length
    rows = naive_dmoe(case.layer, case.trajectory, policy.top_p, policy.min_experts, length, policy.restrict_prefix)
    return [dict(zip(ids, map(np.float32, weights))) for ids, weights in rows]


NAIVE = {"dmoe:top_p=0.4": of_case, "dmoe:top_p=0.6,min_experts=3,block_length=3,restrict_prefix=false": of_case}


def check(segment, geometry, trajectory, policy, block_length):
    for layer in segment.layers:
        found = segment.layer(layer, True)
        expected = naive_dmoe(found, trajectory, policy.top_p, policy.min_experts, block_length, policy.restrict_prefix)
        if expected is None:
            with pytest.raises(UserError, match=f"does not hold for forward .*, layer {layer}"):
                policy.select(found, trajectory, geometry)
        else:
            assert rows_of(policy.select(found, trajectory, geometry)) == expected


policies = st.builds(
    Dmoe,
    top_p=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 0.6, 1.0])),
    min_experts=st.integers(1, 11),
    block_length=st.sampled_from([0, 0, 3]),
    restrict_prefix=st.booleans(),
)


@settings(max_examples=120, deadline=None)
@given(runs(), policies, seeds, st.booleans())
def test_rows_route_inside_the_coreset_of_their_chunk(run, policy, seed, active):
    segment, where = run
    rng = np.random.default_rng(seed)
    segment = with_padding(with_layers(segment, unrouted(rng)), rng)
    if active:
        segment = active_only(segment)
    reused = rng.random(segment.forwards.num_rows) < 0.2
    trajectory = replace(recorded(segment, where), reused=reused if rng.random() < 0.5 else None)
    check(segment, where, trajectory, policy, policy.block_length or where.block_length)


@settings(max_examples=40, deadline=None)
@given(runs(), policies, seeds)
def test_branches_and_rows_out_of_order_keep_to_their_chunk(run, policy, seed):
    segment, where = run
    rng = np.random.default_rng(seed)
    trajectory = recorded(segment, where)
    position = trajectory.position.copy()
    offsets = segment.forwards.row_offsets
    for f in range(segment.forwards.num_forwards):
        rng.shuffle(position[offsets[f] : offsets[f + 1]])
    branch = rng.integers(0, 3, len(position)).astype(np.uint8)
    check(
        segment,
        where,
        replace(trajectory, position=position, branch=branch),
        policy,
        policy.block_length or where.block_length,
    )


@settings(max_examples=40, deadline=None)
@given(runs(), policies)
def test_without_a_tokens_table_rows_follow_the_prefix(run, policy):
    segment, where = run
    trajectory = Trajectory(forwards=segment.forwards, position=None, state=None)
    check(segment, where, trajectory, policy, policy.block_length or where.block_length)


@settings(max_examples=40, deadline=None)
@given(runs(), seeds)
def test_votes_can_be_negative(run, seed):
    segment, where = run
    rng = np.random.default_rng(seed)

    def shift(layer):
        bias = (rng.standard_normal(layer.router.num_experts) - 0.7).astype(np.float32)
        return replace(layer, router=replace(layer.router, expert_bias=bias))

    check(with_layers(segment, shift), where, recorded(segment, where), Dmoe(0.6, 2), where.block_length)


@pytest.mark.parametrize(
    ("num_experts", "groups", "function"),
    [(256, (8, 4), "sigmoid"), (128, (1, 1), "softmax"), (200, (1, 1), "softmax")],
)
@pytest.mark.parametrize("ties", [False, True])
def test_real_sizes(num_experts, groups, function, ties):
    rng = np.random.default_rng(3)
    spec = router(rng, num_experts, 8, function, *groups, bias=function == "sigmoid", routed_scaling_factor=2.5)
    segment, _ = block_run(rng, specs={1: router(rng)}, block_length=32, prompt=70, blocks=1, kv_cache=False)
    rows = segment.forwards.num_rows
    common = rng.integers(0, num_experts, (rows // 32 + 1, 40))
    score = scores(rng, rows, spec, ties) * np.float32(0.3)
    for t in range(rows):
        score[t, common[t // 32]] += np.float32(0.01)
    layer = LayerTrace(
        layer=1,
        expert_ids=np.tile(np.arange(8, dtype=np.uint8), (rows, 1)),
        count=np.full(rows, 8, np.uint8),
        gate_weights=np.full((rows, 8), 0.125, np.float16),
        router_scores=score,
        present=np.ones(segment.forwards.num_forwards, bool),
        router=spec,
    )
    segment = with_layers(segment, lambda _: layer)
    for policy in (Dmoe(), Dmoe(0.3, 16), Dmoe(0.95, 12, 0, False)):
        check(segment, geometry_of(segment, 32), recorded(segment, None), policy, 32)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.floats(0, 1))
def test_a_coreset_of_all_experts_is_vanilla_without_groups(data, top_p):
    spec = data.draw(specs().filter(lambda s: s.topk_group >= s.n_group))
    segment, where = data.draw(runs(spec=spec))
    trajectory = recorded(segment, where)
    for layer in segment.layers:
        found = segment.layer(layer, True)
        restricted = Dmoe(top_p, spec.num_experts).select(found, trajectory, where)
        vanilla = Vanilla().select(found, trajectory, where)
        same = [sorted(ids) for ids, _ in rows_of(vanilla)]
        assert [ids for ids, _ in rows_of(restricted)] == same


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"top_p": 1.5}, "top_p must be between 0 and 1, not 1.5"),
        ({"top_p": float("nan")}, "top_p must be between 0 and 1, not nan"),
        ({"min_experts": 0}, "min_experts must be 1 or more, not 0"),
        ({"block_length": -1}, "block_length must be 0"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters, sentence):
    with pytest.raises(UserError, match=sentence):
        Dmoe(**parameters)


def test_a_trace_without_blocks_or_scores_is_refused():
    segment, _ = block_run(np.random.default_rng(0))
    trajectory = recorded(segment, None)
    with pytest.raises(UserError, match="give block_length"):
        Dmoe().select(segment.layer(1, True), trajectory, geometry_of(segment, 0))
    with pytest.raises(UserError, match="which the trace does not hold in layer 1"):
        Dmoe().select(segment.layer(1), trajectory, geometry_of(segment))
