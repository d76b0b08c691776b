"""The program for TIDE's interval against sets and loops, and its replays against the simulator's own."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.break_even import expert_seconds
from simulator.interval import find_interval, longest_block, memoryless_misses, program_objective
from simulator.presets import load_hardware
from simulator.pricing import cost_model
from simulator.replaying import replay
from tests.made_up.runs import long_run, random_layer, random_trace
from tests.made_up.tables import MemoryTrace, forward_table
from tests.simulator.test_tide_grid import naive_loads, naive_refreshes
from tracer.errors import UserError
from tracer.schema import COMMIT, DENOISE, PREFILL
from tracer.trace import Segment

HARDWARE = "h100-pcie5"


def naive_measured(trace):
    """Denoise calls outside every request's first block: {call: (segment, request of its first part, block, step)}."""
    found, call = {}, 0
    for s, piece in enumerate(trace.pieces):
        table = piece.forwards
        for f in range(table.num_forwards):
            parts = range(table.part_offsets[f], table.part_offsets[f + 1])
            later = []
            for n in parts:
                first = trace.first_block.get(int(table.request_id[n]), -1)
                later.append(table.kind[n] == DENOISE and not (first >= 0 and table.block[n] == first))
            if all(later):
                n = parts[0]
                found[call] = (s, int(table.request_id[n]), int(table.block[n]), int(table.step[n]))
            call += 1
    return found


def naive_runs(trace, number):
    """Whether a layer ran in each call."""
    return [bool(ran) for piece in trace.pieces for ran in piece.layer(number).present]


def naive_drift(trace, budget):
    """Newly wanted experts over the budget, mean over measured cells whose step before is the latest of their block."""
    measured, changed, pairs = naive_measured(trace), 0, 0
    for number in trace.meta.model.moe_layers:
        loads, ran = naive_loads(trace, number), naive_runs(trace, number)
        wanted = {call: set(sorted(loads[call], key=lambda e: (-loads[call][e], e))[:budget]) for call in measured}
        latest = {}
        for call, (segment, request, block, step) in measured.items():
            earlier, its_step = latest.get((segment, request, block), (None, None))
            latest[segment, request, block] = call, step
            if earlier is not None and its_step == step - 1 and ran[earlier] and ran[call]:
                changed += len(wanted[call] - wanted[earlier])
                pairs += 1
    return changed / (pairs * budget) if pairs else 0.0


def naive_missed(trace, budget, interval):
    """Tokens of every expert missed in a measured cell, layer by layer, and the number of measured cells."""
    flags, measured, missed, cells = naive_refreshes(trace, interval), naive_measured(trace), [], 0
    for number in trace.meta.model.moe_layers:
        loads, resident, of_layer = naive_loads(trace, number), set(range(budget)), []
        cells += sum(ran for call, ran in enumerate(naive_runs(trace, number)) if call in measured)
        for call, load in enumerate(loads):
            if flags[call] and load:
                target = sorted(load, key=lambda e: (-load[e], e))[:budget]
                new = [e for e in target if e not in resident]
                resident = resident - set(sorted(resident - set(target))[: len(new)]) | set(new)
            if call in measured:
                of_layer += [n for e, n in load.items() if e not in resident]
        missed.append(of_layer)
    return missed, cells


@given(
    seed=st.integers(0, 10**6),
    calls=st.integers(4, 14),
    budget=st.integers(1, 7),
    intervals=st.lists(st.integers(1, 6), min_size=1, max_size=3, unique=True),
)
@settings(max_examples=60, deadline=None)
def test_drift_misses_and_the_cost_of_one_equal_sets_and_loops(seed, calls, budget, intervals):
    trace = random_trace(seed, calls=calls)
    if not naive_measured(trace):
        with pytest.raises(UserError, match=r"first block|none"):
            find_interval(trace, budget, HARDWARE, intervals=intervals)
        return
    result = find_interval(trace, budget, HARDWARE, intervals=intervals)
    assert result.drift == naive_drift(trace, budget)
    at_one, cells = naive_missed(trace, budget, 1)
    extra, seconds, number = [], [], 0
    cost, _ = cost_model(load_hardware(HARDWARE), trace.meta.model)
    for interval in intervals:
        missed, _ = naive_missed(trace, budget, interval)
        extra.append((sum(map(len, missed)) - sum(map(len, at_one))) / (cells * budget))
        for size, of_layer in zip(trace.meta.model.expert_bytes.values(), missed, strict=True):
            on_cpu, on_gpu, _ = expert_seconds(cost, size, np.array(of_layer, np.int64))
            seconds += (on_cpu - on_gpu).tolist()
            number += len(of_layer)
    assert result.columns["extra_misses"].tolist() == extra
    if number:
        assert result.miss_s == pytest.approx(math.fsum(seconds) / number, rel=1e-12)
    columns = result.columns
    taus = np.array(intervals, float)
    for name, misses in (
        ("objective", columns["extra_misses"]),
        ("objective_memoryless", memoryless_misses(taus, result.drift)),
    ):
        expected = program_objective(taus, result.steps, budget, result.drift, misses, result.move_s, result.miss_s)
        assert columns[name].tolist() == expected.tolist()


@pytest.mark.parametrize("hardware", ["a100-pcie4", "h100-pcie5:overlap=true"])
@pytest.mark.parametrize("copy_back", [True, False])
def test_replays_equal_the_simulators_own(hardware, copy_back):
    trace = random_trace(11, segments=3, calls=25, num_experts=9)
    result = find_interval(trace, 3, hardware, copy_back)
    assert result.columns["refresh_interval"].tolist() == list(range(1, result.steps))
    specs = [f"tide:budget=3,refresh_interval={tau},copy_back={copy_back}".lower() for tau in range(1, result.steps)]
    runs = replay(trace, residency=specs, hardware=hardware).runs
    for name in ("latency_s", "hit_rate", "expert_hit_rate", "promotions", "bytes_to_gpu", "bytes_to_host"):
        assert result.columns[name].tolist() == [run.summary[name] for run in runs]
    fastest = min(runs, key=lambda run: (run.summary["latency_s"], run.residency["parameters"]["refresh_interval"]))
    assert result.best == fastest.residency["parameters"]["refresh_interval"]
    at_program = runs[result.program - 1].summary["latency_s"]
    assert result.regret == at_program / fastest.summary["latency_s"] - 1 >= 0


def test_program_by_hand():
    taus = np.array([1.0, 2.0, 4.0])
    # Half of the wanted set changes a step: 4 steps move 4 * 2, 2 * 2 * 3/4 * 2 and 4 / 4 * 15/16 * 4 / 2 experts of B = 4.
    objective = program_objective(taus, 4, 4, 0.5, np.array([0.0, 0.25, 0.5]), move_s=10.0, miss_s=1.0)
    assert objective.tolist() == [10 * 8 + 0, 10 * 6 + 4, 10 * 3.75 + 8]
    assert memoryless_misses(taus, 0.5).tolist() == [0, 0.25, 1 - (15 / 16) / 2]
    assert memoryless_misses(taus, 0.0).tolist() == [0, 0, 0]
    assert memoryless_misses(np.array([1.0, 2.0]), 0.3)[0] == 0


@given(
    drift=st.floats(0.001, 1),
    move_s=st.floats(1e-6, 1),
    miss_s=st.floats(1e-6, 1),
    steps=st.integers(3, 64),
)
@settings(max_examples=100, deadline=None)
def test_without_memory_the_best_interval_is_an_end(drift, move_s, miss_s, steps):
    taus = np.arange(1.0, steps)
    objective = program_objective(taus, steps, 8, drift, memoryless_misses(taus, drift), move_s, miss_s)
    assert min(objective[0], objective[-1]) <= objective.min() * (1 + 1e-12)


def test_moving_an_expert_costs_a_copy_in_and_with_copy_back_one_out():
    trace = random_trace(11, calls=25)
    machine = load_hardware("a100-pcie4")
    one_way = [machine.copy_latency_s + size / machine.h2d_bytes_per_s for size in (1100, 1200)]
    back = [machine.copy_latency_s + size / machine.d2h_bytes_per_s for size in (1100, 1200)]
    assert find_interval(trace, 3, "a100-pcie4", copy_back=False).move_s == pytest.approx(sum(one_way) / 2)
    assert find_interval(trace, 3, "a100-pcie4").move_s == pytest.approx(sum(one_way + back) / 2)


def still_trace(blocks=3, steps=5):
    """Decoding in which every step of a layer wants the same experts."""
    calls = [[(0, PREFILL, -1, -1, 2, 0, 0)]]
    for block in range(blocks):
        calls += [[(0, DENOISE, block, step, 2, 0, 0)] for step in range(steps)]
        calls += [[(0, COMMIT, block, -1, 2, 0, 0)]]
    table = forward_table(calls)
    trace = random_trace(0, segments=1, calls=1, num_layers=1)
    spec = trace.meta.routers[1]
    layer = random_layer(np.random.default_rng(0), 1, table, spec, short_rows=False)
    layer = replace(layer, expert_ids=np.tile(layer.expert_ids[:2], (len(calls), 1)))
    return MemoryTrace(trace.meta, {0: 0}, [Segment(table, None, (1,), lambda *asked: layer)])


def test_a_trace_that_always_wants_the_same_has_no_drift_and_prefers_the_smallest_of_equals():
    result = find_interval(still_trace(), 2, HARDWARE)
    assert (result.steps, result.drift) == (5, 0.0)
    assert (result.program, result.memoryless, result.best) == (1, 1, 1)
    assert result.columns["extra_misses"].tolist() == [0, 0, 0, 0]
    assert find_interval(still_trace(), 2, HARDWARE, intervals=[3, 2, 4]).best == 2
    everything = find_interval(still_trace(), 7, HARDWARE)
    cost, _ = cost_model(load_hardware(HARDWARE), still_trace().meta.model)
    on_cpu, on_gpu, _ = expert_seconds(cost, 1100, np.ones(1))
    assert everything.miss_s == on_cpu[0] - on_gpu[0]
    assert everything.surplus_share == 1


def test_blocks_of_one_step_leave_one_interval():
    result = find_interval(still_trace(steps=1), 2, HARDWARE)
    assert result.columns["refresh_interval"].tolist() == [1]
    assert (result.steps, result.best, result.regret) == (1, 1, 0.0)


def test_surplus_share_counts_measured_cells_with_fewer_experts_than_the_budget():
    trace = long_run(blocks=2)
    sizes = [len(load) for load in naive_loads(trace, 1)]
    share = find_interval(trace, 60, HARDWARE, intervals=[4]).surplus_share
    assert share == sum(size < 60 for size in sizes) / len(sizes)
    assert 0 < share < 1


def test_the_result_is_a_table_and_plain_json():
    result = find_interval(random_trace(11, calls=25), 3, HARDWARE)
    assert result.frame.columns == list(result.columns) and len(result.frame) == result.steps - 1
    document = json.loads(json.dumps(result.to_json()))
    assert document["best"] == result.best and document["notes"] == list(result.notes)
    assert document["intervals"][1] == result.frame.row(1, named=True)


def test_progress_counts_model_calls():
    seen = []
    find_interval(random_trace(11, segments=2, calls=25), 3, HARDWARE, progress=lambda *call: seen.append(call))
    assert seen == [(25, 50), (50, 50)]


def test_what_it_cannot_answer_is_refused():
    trace = random_trace(11, calls=25)
    for budget in (0, 8):
        with pytest.raises(UserError, match="give 1 to 7 experts per layer"):
            find_interval(trace, budget, HARDWARE)
    with pytest.raises(UserError, match="distinct numbers of 1 or more"):
        find_interval(trace, 3, HARDWARE, intervals=[0])
    with pytest.raises(UserError, match="dense_bytes"):
        find_interval(random_trace(11, calls=25, dense_bytes=None), 3, HARDWARE)
    with pytest.raises(UserError, match="first block"):
        find_interval(still_trace(blocks=1), 3, HARDWARE)
    prefills = replace(trace, pieces=[Segment(forward_table([[(0, PREFILL, -1, -1, 1, 0, 0)]]), None, (), None)])
    with pytest.raises(UserError, match="denoise steps and this trace has none"):
        longest_block(prefills)
