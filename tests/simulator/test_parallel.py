"""Expert parallelism against dictionaries."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.expert_placement import PLACEMENTS, place_experts
from simulator.parallel import expert_parallel, parallel_runs
from simulator.registry import load_policy
from tests.made_up.runs import random_trace
from tracer.errors import UserError
from tracer.schema import DENOISE, KINDS


def naive_placement(num_experts, gpus, placement, load):
    """The GPU of every expert, one expert at a time."""
    if placement == "round_robin":
        return [e % gpus for e in range(num_experts)]
    if placement == "contiguous":
        found = []
        for gpu in range(gpus):
            found += [gpu] * (num_experts // gpus + (gpu < num_experts % gpus))
        return found
    slots = num_experts // gpus + (num_experts % gpus > 0)
    groups = [[] for _ in range(gpus)]
    for expert in sorted(range(num_experts), key=lambda e: (-load[e], e)):
        open_gpus = [g for g in range(gpus) if len(groups[g]) < slots]
        best = min(open_gpus, key=lambda g: (sum(load[e] for e in groups[g]), g))
        groups[best].append(expert)
    return [next(g for g in range(gpus) if e in groups[g]) for e in range(num_experts)]


def naive_parallel(trace, gpus, placement):
    """{(forward, layer): (kind, tokens of each GPU, bytes each GPU reads)} of the recorded experts."""
    model = trace.meta.model
    load = {layer: [0] * model.num_experts for layer in model.moe_layers}
    used = {}
    for piece in trace.pieces:
        forwards = piece.forwards
        for number in piece.layers:
            layer = piece.layer(number)
            for f, forward in enumerate(forwards.forward_id):
                rows = range(forwards.row_offsets[f], forwards.row_offsets[f + 1])
                ids = [int(e) for t in rows for e in layer.expert_ids[t, : layer.count[t]]]
                if ids:
                    used[int(forward), number] = (KINDS[forwards.forward_kind[f]], ids)
                for e in ids:
                    load[number][e] += 1
    found = {}
    for (forward, number), (kind, ids) in used.items():
        gpu_of = naive_placement(model.num_experts, gpus, placement, load[number])
        tokens = [sum(gpu_of[e] == g for e in ids) for g in range(gpus)]
        read = [sum(gpu_of[e] == g for e in set(ids)) * model.expert_bytes[number] for g in range(gpus)]
        found[forward, number] = (kind, tokens, read)
    return found


@given(seed=st.integers(0, 10**6), gpus=st.integers(1, 7), placement=st.sampled_from(PLACEMENTS), ties=st.booleans())
@settings(max_examples=60, deadline=None)
def test_loads_equal_dictionaries(seed, gpus, placement, ties):
    trace = random_trace(seed, ties=ties)
    result = expert_parallel(trace, gpus, placement)
    expected = naive_parallel(trace, gpus, placement)
    rows = {(row["forward_id"], row["layer"]): row for row in result.frame.iter_rows(named=True)}
    assert list(rows) == sorted(expected)
    for key, (kind, tokens, read) in expected.items():
        row = rows[key]
        assert (row["kind"], row["gpu_tokens"], row["gpu_bytes"]) == (kind, tokens, read)
        assert (row["assignments"], row["max_tokens"], row["max_bytes"]) == (sum(tokens), max(tokens), max(read))
        assert (row["mean_tokens"], row["mean_bytes"]) == (sum(tokens) / gpus, sum(read) / gpus)
        assert row["imbalance"] == max(tokens) / (sum(tokens) / gpus)


@given(seed=st.integers(0, 10**6), gpus=st.integers(1, 7), placement=st.sampled_from(PLACEMENTS))
@settings(max_examples=30, deadline=None)
def test_the_summary_is_of_denoise_forwards_and_of_all(seed, gpus, placement):
    trace = random_trace(seed)
    summary = expert_parallel(trace, gpus, placement).summary
    expected = naive_parallel(trace, gpus, placement)
    assert (summary["gpus"], summary["placement"]) == (gpus, placement)
    for suffix, kinds in (("", {KINDS[DENOISE]}), ("_all_forwards", set(KINDS))):
        cells = [(tokens, read) for kind, tokens, read in expected.values() if kind in kinds]
        if not cells:
            assert summary[f"imbalance{suffix}"] is None and summary[f"gpu_bytes{suffix}"] is None
            continue
        assert summary[f"gpu_tokens{suffix}"] == [sum(tokens[g] for tokens, _ in cells) for g in range(gpus)]
        assert summary[f"gpu_bytes{suffix}"] == [sum(read[g] for _, read in cells) for g in range(gpus)]
        total, slowest = sum(sum(tokens) for tokens, _ in cells), sum(max(tokens) for tokens, _ in cells)
        assert summary[f"busy{suffix}"] == pytest.approx(total / gpus / slowest, rel=1e-12)
        imbalance = [max(tokens) * gpus / sum(tokens) for tokens, _ in cells]
        assert summary[f"imbalance{suffix}"] == pytest.approx(sum(imbalance) / len(cells), rel=1e-12)
        assert summary[f"max_bytes{suffix}"] == pytest.approx(sum(max(r) for _, r in cells) / len(cells), rel=1e-12)


@given(
    load=st.lists(st.integers(0, 20), min_size=1, max_size=12),
    gpus=st.integers(1, 12),
    name=st.sampled_from(PLACEMENTS),
)
@settings(max_examples=100, deadline=None)
def test_placements_equal_the_naive_definition(load, gpus, name):
    gpus = min(gpus, len(load))
    found = place_experts(len(load), gpus, name, np.array(load)).tolist()
    assert found == naive_placement(len(load), gpus, name, load)
    assert max(found.count(g) for g in range(gpus)) <= -(-len(load) // gpus)


def test_the_heaviest_expert_goes_first():
    # 40 alone, 30 to the other GPU, 20 beside it (30 < 40), 10 where a slot is left.
    assert place_experts(4, 2, "balanced", np.array([10, 30, 20, 40])).tolist() == [0, 1, 1, 0]


def test_one_gpu_does_everything():
    summary = expert_parallel(random_trace(3), 1).summary
    assert summary["imbalance"] == summary["busy"] == summary["busy_all_forwards"] == 1


def test_another_routing_is_followed():
    trace = random_trace(5)
    half = expert_parallel(trace, 2, routing="skip:beta=0.5").frame
    policy = load_policy("routing", "skip:beta=0.5")
    assert half.equals(expert_parallel(trace, 2, routing=policy).frame)
    assert half["assignments"].sum() < expert_parallel(trace, 2).frame["assignments"].sum()


def test_a_trace_in_which_nothing_ran_gives_an_empty_frame():
    trace = random_trace(6)
    result = expert_parallel(replace_pieces(trace, []), 2, "balanced")
    assert result.frame.is_empty()
    assert result.frame.schema["gpu_bytes"] == pl.Array(pl.UInt64, 2)
    assert result.summary["imbalance"] is None and result.summary["gpu_tokens_all_forwards"] is None


def replace_pieces(trace, pieces):
    return replace(trace, pieces=pieces)


def test_what_cannot_be_done_is_refused():
    trace = random_trace(7)
    with pytest.raises(UserError, match="no expert placement 'random'; there are contiguous, round_robin, balanced"):
        expert_parallel(trace, 2, "random")
    for gpus in (0, 8):
        with pytest.raises(UserError, match=f"gpus must be 1 to 7, the experts of a layer, not {gpus}"):
            expert_parallel(trace, gpus)
    with pytest.raises(UserError, match="routing policy block_pool needs router scores of all experts"):
        expert_parallel(replace(trace, holds=frozenset()), 2, routing="block_pool")


def test_several_groups_in_one_go_equal_each_alone():
    trace, seen = random_trace(4, num_experts=9), []
    runs = parallel_runs(
        trace,
        ["vanilla", "skip:beta=0.5"],
        [1, 4],
        ["balanced", "round_robin"],
        progress=lambda *step: seen.append(step),
    )
    # One walk for all of it, twice over the trace as a placement is balanced.
    calls = trace.num_forwards
    assert seen[-1] == (2 * calls, 2 * calls)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    specs = [
        (routing, n, name)
        for routing in ("vanilla", "skip:beta=0.5")
        for n in (1, 4)
        for name in ("balanced", "round_robin")
    ]
    assert len(runs) == len(specs)
    for run, (routing, gpus, name) in zip(runs, specs, strict=True):
        assert run["routing"]["name"] == routing.split(":")[0]
        alone = expert_parallel(trace, gpus, name, routing).summary
        assert {key: run[key] for key in alone} == alone
        assert run["estimate"] == (routing != "vanilla") and ("open loop" in run["notes"][0]) == run["estimate"]


@pytest.mark.parametrize("asked", [{"gpus": [10]}, {"placements": ["nearest"]}, {"routings": ["nothing"]}])
def test_groups_that_cannot_be_are_refused_before_the_trace_is_read(asked):
    trace = random_trace(0, num_experts=9)
    trace.pieces = None
    with pytest.raises(UserError):
        parallel_runs(trace, **asked)
