"""TIDE at every interval and budget in one pass, against single replays and against sets and loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from simulator.policy import Selection
from simulator.residency.tide import Tide
from simulator.streams.gather import geometry_of
from simulator.streams.stream import build_stream
from simulator.tide_grid import tide_grid
from tests.made_up.changes import joined
from tests.made_up.runs import long_run, random_trace
from tracer.errors import UserError
from tracer.schema import COMMIT, DECODE, PREFILL

FIELDS = ("gpu_tokens", "gpu_experts", "promotions", "surplus")


def naive_refreshes(trace, interval):
    """Whether each call of the run refreshes: prefills do, commits never, else the first block or every interval steps."""
    decoded, flags = {}, []
    for piece in trace.pieces:
        table = piece.forwards
        for f in range(table.num_forwards):
            wanted = False
            for n in range(table.part_offsets[f], table.part_offsets[f + 1]):
                request, kind, step = int(table.request_id[n]), table.kind[n], int(table.step[n])
                if kind == DECODE:
                    step = decoded.get(request, 0)
                    decoded[request] = step + 1
                first = trace.first_block.get(request, -1)
                in_first = first >= 0 and table.block[n] == first
                wanted |= kind == PREFILL or (kind != COMMIT and (in_first or step % interval == 0))
            flags.append(wanted)
    return flags


def naive_loads(trace, number):
    """Tokens of each expert in each call of a layer, a dict a call."""
    calls = []
    for piece in trace.pieces:
        layer, table = piece.layer(number), piece.forwards
        for f in range(table.num_forwards):
            load = {}
            for t in range(table.row_offsets[f], table.row_offsets[f + 1]):
                for e in layer.expert_ids[t, : layer.count[t]].tolist():
                    load[e] = load.get(e, 0) + 1
            calls.append(load)
    return calls


def naive_tide(loads, flags, budget):
    """Totals of one layer at one interval and budget: gpu tokens, gpu experts, promotions, refreshes with too few experts."""
    resident = set(range(budget))
    totals = np.zeros(4, np.int64)
    for load, refresh in zip(loads, flags, strict=True):
        if refresh and load:
            target = sorted(load, key=lambda e: (-load[e], e))[:budget]
            promote = [e for e in target if e not in resident]
            demote = sorted(resident - set(target))[: len(promote)]
            resident = resident - set(demote) | set(promote)
            totals[2:] += (len(promote), len(load) < budget)
        totals[0] += sum(n for e, n in load.items() if e in resident)
        totals[1] += len(resident & set(load))
    return totals


def single_replay(trace, at, interval, budget):
    """Totals of residency/tide.py on one layer: gpu tokens, gpu experts, promotions."""
    geometry = geometry_of(trace)
    policy = Tide(budget=budget, refresh_interval=interval)
    state, totals = policy.start(geometry, at), np.zeros(3, np.int64)
    for piece in trace.pieces:
        layer = piece.layer(geometry.layers[at])
        selection = Selection(layer.expert_ids, layer.count, layer.gate_weights)
        offsets = piece.forwards.row_offsets
        stream = build_stream(selection, offsets, at, geometry.num_experts, layer.present)
        placement, state = policy.place(stream, piece.forwards, geometry, state)
        assert (placement.promotions == placement.demotions).all()
        on_gpu = placement.on_gpu
        totals += np.array([stream.tokens[on_gpu].sum(), on_gpu.sum(), placement.promotions.sum()], np.int64)
    return totals


@given(
    seed=st.integers(0, 10**6),
    num_experts=st.integers(3, 11),
    calls=st.integers(1, 12),
    segments=st.integers(1, 3),
    intervals=st.lists(st.integers(1, 7), min_size=1, max_size=4, unique=True),
)
@example(seed=5, num_experts=3, calls=9, segments=2, intervals=[1])
@settings(max_examples=60, deadline=None)
def test_every_cell_of_the_grid_equals_sets_and_loops_and_the_single_replay(
    seed, num_experts, calls, segments, intervals
):
    trace = random_trace(seed, segments=segments, calls=calls, num_experts=num_experts)
    grid = tide_grid(trace, intervals)
    assert grid.gpu_tokens.shape == (2, len(intervals), num_experts + 1)
    for at, number in enumerate(trace.meta.model.moe_layers):
        loads = naive_loads(trace, number)
        assert grid.tokens[at] == sum(sum(load.values()) for load in loads)
        assert grid.lookups[at] == sum(map(len, loads))
        for i, interval in enumerate(intervals):
            flags = naive_refreshes(trace, interval)
            assert grid.refreshes[at, i] == sum(bool(load) for load, flag in zip(loads, flags, strict=True) if flag)
            for budget in range(num_experts + 1):
                cell = [int(getattr(grid, name)[at, i, budget]) for name in FIELDS]
                assert cell == naive_tide(loads, flags, budget).tolist()
                assert cell[:3] == single_replay(trace, at, interval, budget).tolist()


def test_a_long_run_of_256_experts_equals_single_replays_at_budgets_on_both_sides_of_the_active_experts():
    trace = long_run(blocks=3)
    grid = tide_grid(trace)
    for interval in (1, 5, 31):
        for budget in (0, 1, 40, 64, 65, 128, 200, 255, 256):
            cell = [int(getattr(grid, name)[0, interval - 1, budget]) for name in FIELDS[:3]]
            assert cell == single_replay(trace, 0, interval, budget).tolist()
    assert 0 < grid.surplus[0, 0, 64] < grid.refreshes[0, 0]


def test_more_than_64_experts_need_more_than_one_word_and_ids_above_255_work():
    trace = random_trace(3, segments=2, calls=30, num_experts=300, top_k=5, num_layers=1, absent=False)
    grid = tide_grid(trace, (2, 3))
    for i, interval in enumerate((2, 3)):
        for budget in (0, 3, 63, 64, 65, 128, 255, 256, 299, 300):
            cell = [int(getattr(grid, name)[0, i, budget]) for name in FIELDS[:3]]
            assert cell == single_replay(trace, 0, interval, budget).tolist()


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_segments_do_not_show(seed):
    trace = random_trace(seed, segments=3, calls=4)
    apart, whole = tide_grid(trace, (1, 2, 3, 4)), tide_grid(joined(trace), (1, 2, 3, 4))
    for name in (*FIELDS, "tokens", "lookups", "refreshes"):
        assert (getattr(apart, name) == getattr(whole, name)).all()


def test_frame_adds_layers_up_and_bytes_by_layer():
    trace = random_trace(8, calls=20)
    grid = tide_grid(trace, (3, 1))
    frame = grid.frame()
    assert frame["refresh_interval"].to_list() == [3] * 8 + [1] * 8
    assert frame["budget"].to_list() == [*range(8), *range(8)]
    row = frame.row(2, named=True)
    assert row["gpu_tokens"] + row["cpu_tokens"] == grid.tokens.sum()
    assert row["gpu_tokens"] == grid.gpu_tokens[:, 0, 2].sum()
    assert row["hit_rate"] == row["gpu_tokens"] / grid.tokens.sum()
    assert row["expert_hit_rate"] == row["gpu_experts"] / (row["gpu_experts"] + row["cpu_experts"])
    assert row["bytes_to_gpu"] == 1100 * grid.promotions[0, 0, 2] + 1200 * grid.promotions[1, 0, 2]
    assert row["surplus_share"] == grid.surplus[:, 0, 2].sum() / grid.refreshes[:, 0].sum()


def test_a_run_that_computes_nothing_has_no_rates():
    trace = random_trace(8, segments=1, calls=3)
    for piece in trace.pieces:
        for number in trace.meta.model.moe_layers:
            piece.layer(number).count[:] = 0
    frame = tide_grid(trace, (1,)).frame()
    assert frame["gpu_tokens"].sum() == 0
    assert frame["hit_rate"].null_count() == frame["surplus_share"].null_count() == len(frame)


@pytest.mark.parametrize("intervals", [(), (0,), (1, 2, 1), (-3, 2)])
def test_intervals_that_are_none_are_refused(intervals):
    with pytest.raises(UserError, match="distinct numbers of 1 or more"):
        tide_grid(random_trace(1), intervals)


def test_progress_counts_model_calls():
    seen = []
    tide_grid(random_trace(1, segments=3, calls=4), (1,), lambda *call: seen.append(call))
    assert seen == [(4, 12), (8, 12), (12, 12)]
