"""Budgets in experts, bytes and device memory, shared out equally or by load."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.budget import share_out
from simulator.registry import load_policy
from simulator.replaying import replay
from simulator.streams.loads import recorded_loads
from tests.made_up.runs import random_trace
from tests.made_up.tables import geometry
from tracer.errors import UserError

BUDGETED = ["static", "lru", "lfu", "belady", "tide", "random_interval", "fiddler"]


def naive_share(total, sizes, loads):
    """Experts one after the other, the most tokens a byte first, ties to the lowest layer, those that fit."""
    every = [(loads[at][e] / sizes[at], at, e) for at in range(len(loads)) for e in range(len(loads[at]))]
    held = [0] * len(loads)
    for _, at, _ in sorted(every, key=lambda one: (-one[0], one[1])):
        if sizes[at] <= total:
            held[at] += 1
            total -= sizes[at]
    return tuple(held)


def naive_loads(trace):
    """Every (row, expert) pair of every layer, one by one."""
    layers = trace.meta.model.moe_layers
    loads = [[0] * trace.meta.model.num_experts for _ in layers]
    for piece in trace.pieces:
        for at, number in enumerate(layers):
            if number not in piece.layers:
                continue
            layer = piece.layer(number)
            for t in range(len(layer.count)):
                for k in range(layer.count[t]):
                    loads[at][layer.expert_ids[t, k]] += 1
    return loads


tables = st.integers(1, 4).flatmap(
    lambda experts: st.lists(
        st.lists(st.integers(0, 5), min_size=experts, max_size=experts).map(tuple), min_size=1, max_size=3
    )
)


@given(loads=tables, total=st.integers(0, 60), data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_budget_shared_out_by_load(loads, total, data):
    sizes = tuple(data.draw(st.integers(1, 7)) for _ in loads)
    held = share_out(total, sizes, tuple(loads))
    assert held == naive_share(total, sizes, loads)
    assert sum(n * size for n, size in zip(held, sizes, strict=True)) <= total


@given(loads=tables, total=st.integers(0, 12))
@settings(max_examples=100, deadline=None)
def test_no_other_split_serves_more_tokens_where_experts_are_of_one_size(loads, total):
    def served(held):
        return sum(sum(sorted(of_layer, reverse=True)[:n]) for of_layer, n in zip(loads, held, strict=True))

    held = share_out(total, (1,) * len(loads), tuple(loads))
    every = product(range(len(loads[0]) + 1), repeat=len(loads))
    assert served(held) == max(served(other) for other in every if sum(other) <= total)
    assert sum(held) == min(total, len(loads) * len(loads[0]))


@pytest.mark.parametrize("seed", range(4))
def test_loads_of_a_trace(seed):
    trace = random_trace(seed)
    assert recorded_loads(trace).tolist() == naive_loads(trace)


def test_a_replay_shares_a_budget_out_by_the_loads_of_its_trace():
    trace = random_trace(3, num_layers=3, num_experts=9, expert_bytes=dict.fromkeys((1, 2, 3), 100))
    result = replay(trace, ["vanilla"], ["static:budget=3", "static:budget=3,split=auto", "static:budget=3,split=auto"])
    equal, auto, again = (run.summary for run in result.runs)
    assert auto["hit_rate"] >= equal["hit_rate"]
    assert auto == again
    held = naive_share(9 * 100, [100] * 3, naive_loads(trace))
    assert auto["resident_bytes"] == sum(held) * 100
    tokens = sum(sum(sorted(of_layer, reverse=True)[:n]) for of_layer, n in zip(naive_loads(trace), held, strict=True))
    assert auto["gpu_tokens"] == tokens
    assert any("shared out by the recorded loads" in note for note in result.runs[1].notes)
    assert not any("shared out" in note for note in result.runs[0].notes)


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize("size", ["budget=4", "budget_bytes=1200"])
def test_every_policy_takes_a_split_budget(name, size):
    sizes = {1: 100, 2: 150}
    trace = random_trace(5, num_experts=9, expert_bytes=sizes)
    about = replace(geometry(9, tuple(sizes), sizes), loads=tuple(map(tuple, naive_loads(trace))))
    policy = load_policy("residency", f"{name}:{size},split=auto")
    total = 1000 if size == "budget=4" else 1200
    assert tuple(policy.experts_per_layer(about, at) for at in range(2)) == naive_share(
        total, [100, 150], naive_loads(trace)
    )
    summary = replay(trace, ["vanilla"], [policy]).runs[0].summary
    assert summary["assignments"] == sum(map(sum, naive_loads(trace)))
    held = sum(n * size for n, size in zip(naive_share(total, [100, 150], naive_loads(trace)), (100, 150), strict=True))
    # A cache fills up with what is needed, which may be less.
    assert summary["resident_bytes"] == held or (
        name in ("lru", "lfu", "belady") and 0 < summary["resident_bytes"] < held
    )


def test_a_split_without_a_trace_or_over_one_cache_is_refused():
    with pytest.raises(UserError, match="by the loads of a trace"):
        load_policy("residency", "static:budget=2,split=auto").start(geometry(6), 0)
    with pytest.raises(UserError, match="scope=global has no layers"):
        load_policy("residency", "lru:budget=2,split=auto,scope=global").start(geometry(6), None)
