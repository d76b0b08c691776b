"""LRU at every budget in one pass, against lists and loops and against single replays."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator import lru_curve as lru_curve_module
from simulator.caching import stack_distance
from simulator.lru_curve import lru_curve
from simulator.policy import Selection
from simulator.residency.lru import Lru
from simulator.streams.gather import geometry_of
from simulator.streams.stream import build_stream, merge_streams
from tests.made_up.changes import joined
from tests.made_up.runs import long_run, random_trace
from tracer.errors import UserError


def streams_of(trace, at):
    """The streams of one layer (or of all, None), a segment each."""
    geometry = geometry_of(trace)
    for piece in trace.pieces:
        found = []
        for i, number in enumerate(geometry.layers):
            layer = piece.layer(number)
            selection = Selection(layer.expert_ids, layer.count, layer.gate_weights)
            offsets = piece.forwards.row_offsets
            found.append(build_stream(selection, offsets, i, geometry.num_experts, layer.present))
        yield piece, merge_streams(found) if at is None else found[at]


def naive_lru(streams, sizes, capacity):
    """Hit tokens and hit experts of each layer: a list from oldest to newest, evicted after the batch, never the batch."""
    cache, hits = [], np.zeros((len(sizes), 2), np.int64)
    for _, stream in streams:
        for c in range(len(stream.cell_forward)):
            layer = int(stream.cell_layer[c])
            cell = range(stream.offsets[c], stream.offsets[c + 1])
            batch = {}
            for i in cell:
                key = (layer, int(stream.experts[i]))
                batch[int(stream.last_touch[i])] = key
                if key in cache:
                    hits[layer] += (stream.tokens[i], 1)
            touched = [batch[rank] for rank in sorted(batch)]
            older = [key for key in cache if key not in touched]
            while older and sum(sizes[key[0]] for key in older + touched) > capacity:
                older.pop(0)
            cache = older + touched
    return hits


def single_replay(trace, policy, at):
    """Hit tokens and hit experts of residency/lru.py by layer."""
    geometry = geometry_of(trace)
    state, hits = policy.start(geometry, at), np.zeros((len(geometry.layers), 2), np.int64)
    for piece, stream in streams_of(trace, at):
        placement, state = policy.place(stream, piece.forwards, geometry, state)
        layer = np.repeat(stream.cell_layer, np.diff(stream.offsets))
        np.add.at(
            hits, layer[placement.hit], np.column_stack((stream.tokens, placement.hit))[placement.hit].astype(int)
        )
    return hits


@given(
    seed=st.integers(0, 10**6),
    num_experts=st.integers(3, 9),
    calls=st.integers(1, 10),
    segments=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_every_budget_of_a_layer_equals_lists_and_loops_and_the_single_replay(seed, num_experts, calls, segments):
    trace = random_trace(seed, segments=segments, calls=calls, num_experts=num_experts)
    curve = lru_curve(trace)
    assert curve.budgets == tuple(range(num_experts + 1))
    for at in range(2):
        streams = list(streams_of(trace, at))
        assert curve.tokens[at] == sum(stream.tokens.sum() for _, stream in streams)
        assert curve.lookups[at] == sum(len(stream.experts) for _, stream in streams)
        for budget in curve.budgets:
            expected = naive_lru(streams, [1, 1], budget)[at].tolist()
            assert [curve.hit_tokens[at, budget], curve.hit_experts[at, budget]] == expected
            assert single_replay(trace, Lru(budget=budget), at)[at].tolist() == expected


@given(
    seed=st.integers(0, 10**6),
    num_experts=st.integers(3, 7),
    calls=st.integers(1, 8),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    scale=st.sampled_from([1, 10**9]),
    budget_bytes=st.lists(st.integers(0, 150), min_size=1, max_size=12),
)
@settings(max_examples=60, deadline=None)
def test_one_cache_over_layers_of_any_bytes_equals_lists_and_loops(
    seed, num_experts, calls, sizes, scale, budget_bytes
):
    sizes = [scale * size for size in sizes]
    trace = random_trace(
        seed, calls=calls, num_layers=3, num_experts=num_experts, expert_bytes=dict(enumerate(sizes, 1))
    )
    streams = list(streams_of(trace, None))
    in_experts = lru_curve(trace, "global")
    in_bytes = lru_curve(trace, "global", budget_bytes=[scale * n for n in budget_bytes])
    for curve, capacities in (
        (in_experts, [budget * sum(sizes) for budget in range(num_experts + 1)]),
        (in_bytes, [min(scale * n, num_experts * sum(sizes)) for n in budget_bytes]),
    ):
        for i, capacity in enumerate(capacities):
            expected = naive_lru(streams, sizes, capacity)
            assert np.column_stack((curve.hit_tokens[:, i], curve.hit_experts[:, i])).tolist() == expected.tolist()
    for i, capacity in enumerate(in_bytes.budgets):
        hits = single_replay(trace, Lru(budget_bytes=capacity, scope="global"), None)
        assert in_bytes.hit_experts[:, i].tolist() == hits[:, 1].tolist()


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_long_run_packs_its_stack_and_equals_single_replays(scope):
    trace = long_run(blocks=3, layers=2)
    curve = lru_curve(trace, scope, budgets=[0, 30, 64, 100, 64, 200, 256])
    for i, budget in enumerate(curve.budgets):
        policy = Lru(budget=budget, scope=scope)
        hits = sum(single_replay(trace, policy, at) for at in ((None,) if scope == "global" else (0, 1)))
        assert np.column_stack((curve.hit_tokens[:, i], curve.hit_experts[:, i])).tolist() == hits.tolist()
    assert 0 < curve.hit_experts[0, 2] < curve.hit_experts[0, 3] < curve.hit_experts[0, 6] < curve.lookups[0]


def test_a_stack_of_short_runs_is_packed_often(monkeypatch):
    monkeypatch.setattr(lru_curve_module, "empty_stack", partial(stack_distance.empty_stack, room=2))
    trace = random_trace(4, segments=3, calls=60, num_experts=9)
    expected = [naive_lru(list(streams_of(trace, 1)), [1, 1], budget)[1, 1] for budget in range(10)]
    assert lru_curve(trace).hit_experts[1].tolist() == expected


@given(seed=st.integers(0, 10**6), scope=st.sampled_from(["layer", "global"]))
@settings(max_examples=30, deadline=None)
def test_segments_do_not_show(seed, scope):
    trace = random_trace(seed, segments=3, calls=4)
    apart, whole = lru_curve(trace, scope), lru_curve(joined(trace), scope)
    for name in ("tokens", "lookups", "hit_tokens", "hit_experts"):
        assert (getattr(apart, name) == getattr(whole, name)).all()


def test_frame_adds_layers_up_and_bytes_by_layer():
    trace = random_trace(8, calls=20)
    curve = lru_curve(trace, budgets=[4, 2])
    frame = curve.frame()
    assert frame["budget"].to_list() == [4, 2]
    assert frame["hit_experts"].to_list() == curve.hit_experts.sum(axis=0).tolist()
    assert frame["promotions"].to_list() == (curve.lookups.sum() - curve.hit_experts.sum(axis=0)).tolist()
    assert frame["bytes_to_gpu"][0] == 1100 * curve.promotions[0, 0] + 1200 * curve.promotions[1, 0]
    assert frame["hit_rate"][1] == curve.hit_tokens[:, 1].sum() / curve.tokens.sum()
    assert frame["expert_hit_rate"][1] == curve.hit_experts[:, 1].sum() / curve.lookups.sum()
    assert lru_curve(trace, budget_bytes=[5000]).frame().columns[0] == "budget_bytes"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"scope": "model"}, "no scope 'model'"),
        ({"budgets": [1], "budget_bytes": [1]}, "not both"),
        ({"budgets": []}, "empty list"),
        ({"budgets": [3, -1]}, "budget=-1 is no amount of memory"),
    ],
)
def test_budgets_that_are_none_are_refused(arguments, reason):
    with pytest.raises(UserError, match=reason):
        lru_curve(random_trace(1), **arguments)
