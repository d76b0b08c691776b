"""TIDE at every interval and budget in one pass, against single replays and against sets and loops."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from simulator.caching.tide_grid import TideGrid
from simulator.policy import Selection
from simulator.replaying import replay
from simulator.residency.tide import Tide
from simulator.streams.gather import geometry_of
from simulator.streams.stream import build_stream
from simulator.tallies.placement_tally import GPU_TOKENS, HIT_EXPERTS, LOOKUPS, PROMOTIONS
from simulator.walk import Walk
from tests.made_up.changes import joined
from tests.made_up.runs import long_run, random_trace
from tracer.schema import COMMIT, DECODE, PREFILL


def grid(trace, intervals, budgets, **options):
    """{(interval, budget): tally} of one walk."""
    policies = [Tide(budget=budget, refresh_interval=tau, **options) for tau in intervals for budget in budgets]
    walk = Walk(trace, geometry_of(trace), weights=False)
    watcher = walk.watch(TideGrid(policies, walk.geometry))
    walk.run()
    return {(policy.refresh_interval, policy.budget): tally for policy, tally in watcher.result().items()}


def figures(tally, at):
    """GPU tokens, GPU experts, promotions and refreshes with too few experts of a layer."""
    of_layer = tally.totals[at].sum(axis=0)
    return [*of_layer[[GPU_TOKENS, HIT_EXPERTS, PROMOTIONS]].tolist(), int(tally.refreshes[at, 1])]


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
    tallies = grid(trace, intervals, range(num_experts + 1))
    for at, number in enumerate(trace.meta.model.moe_layers):
        loads = naive_loads(trace, number)
        for interval in intervals:
            flags = naive_refreshes(trace, interval)
            refreshes = sum(bool(load) for load, flag in zip(loads, flags, strict=True) if flag)
            for budget in range(num_experts + 1):
                tally = tallies[interval, budget]
                assert tally.refreshes[at, 0] == refreshes
                assert tally.totals[at, :, LOOKUPS].sum() == sum(map(len, loads))
                assert figures(tally, at) == naive_tide(loads, flags, budget).tolist()
                assert figures(tally, at)[:3] == single_replay(trace, at, interval, budget).tolist()


@given(
    seed=st.integers(0, 10**6),
    num_experts=st.integers(3, 9),
    calls=st.integers(1, 12),
    segments=st.integers(1, 3),
    copy_back=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_every_figure_of_a_run_is_that_of_a_replay_of_its_own(seed, num_experts, calls, segments, copy_back):
    trace = random_trace(seed, segments=segments, calls=calls, num_experts=num_experts)
    specs = [
        Tide(budget=budget, refresh_interval=tau, copy_back=copy_back)
        for budget in range(num_experts + 1)
        for tau in (1, 2, 5)
    ]
    specs += [Tide(budget_bytes=5000), Tide(budget=3, budget_bytes=9000, split="auto")]
    for routing in ("vanilla", "skip:beta=0.5"):
        in_one_pass = replay(trace, [routing], specs, keep_cells=False)
        alone = [replay(trace, [routing], [spec]).runs[0].summary for spec in specs]
        assert [run.summary for run in in_one_pass.runs] == alone


def test_a_long_run_of_256_experts_equals_single_replays_at_budgets_on_both_sides_of_the_active_experts():
    trace = long_run(blocks=3)
    budgets = (0, 1, 40, 64, 65, 128, 200, 255, 256)
    tallies = grid(trace, (1, 5, 31), budgets)
    for interval in (1, 5, 31):
        for budget in budgets:
            found = figures(tallies[interval, budget], 0)[:3]
            assert found == single_replay(trace, 0, interval, budget).tolist()
    refreshes, surplus = tallies[1, 64].refreshes[0].tolist()
    assert 0 < surplus < refreshes


def test_more_than_64_experts_need_more_than_one_word_and_ids_above_255_work():
    trace = random_trace(3, segments=2, calls=30, num_experts=300, top_k=5, num_layers=1, absent=False)
    budgets = (0, 3, 63, 64, 65, 128, 255, 256, 299, 300)
    tallies = grid(trace, (2, 3), budgets)
    for interval in (2, 3):
        for budget in budgets:
            found = figures(tallies[interval, budget], 0)[:3]
            assert found == single_replay(trace, 0, interval, budget).tolist()


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_segments_do_not_show(seed):
    trace = random_trace(seed, segments=3, calls=4)
    apart, whole = (grid(one, (1, 2, 3, 4), range(8)) for one in (trace, joined(trace)))
    for key, tally in apart.items():
        assert (tally.totals == whole[key].totals).all() and (tally.by_lag == whole[key].by_lag).all()
        assert (tally.refreshes == whole[key].refreshes).all() and (tally.held == whole[key].held).all()
