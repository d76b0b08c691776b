"""What residency replays cost: caches against libcachesim, TIDE at every interval and budget, LRU at every budget.

Goals: LRU, LFU and Belady 10, 6 and 5 times libcachesim, the stream's building included in ours; TIDE's grid at most 0.01 ns a
decision and configuration; stack distances at most 40 ns a request for 256 budgets. The run is synthetic, of LLaDA2.0-mini's
shape. libcachesim knows no batches: it is fed the stream one expert after the other, and so is ours for equal miss counts, as
cells of one expert; "batches" is ours on the cells as they are. Its file is written and its next uses are known beforehand,
ours are not. Its LFU forgets the uses of what it evicts, so ours is asked to as well. Ratios are to its ``process_trace``,
which never leaves native code; the other way its documentation shows, a Python loop over the reader, is printed beside it.
"""

from __future__ import annotations

import time

import numpy as np
import pytest

from simulator.caching.lru_curve import LruCurve
from simulator.caching.stack_distance import empty_stack, serve_stack
from simulator.caching.tide_grid import TideGrid
from simulator.policy import ExpertStream, Selection
from simulator.registry import load_policy
from simulator.residency.lru import Lru
from simulator.residency.tide import Tide
from simulator.spec import expand
from simulator.streams.gather import geometry_of
from simulator.streams.stream import build_stream
from simulator.sweeping import sweep
from simulator.tallies.placement_tally import GPU_TOKENS, LOOKUPS
from simulator.walk import Walk
from tests.made_up.runs import EXPERTS, long_run
from tracer.parquet import open_trace
from tracer.synthetic import SyntheticOptions, write_synthetic

pytestmark = pytest.mark.bench
REPEATS = 5
REQUEST = np.dtype([("time", "<u4"), ("object", "<u8"), ("size", "<u4"), ("next", "<i8")])


def cpu_seconds(function, repeats=REPEATS):
    """Least process CPU time of a few calls after one that compiles, and what the last one gave."""
    answer, least = function(), np.inf
    for _ in range(repeats):
        started = time.process_time()
        answer = function()
        least = min(least, time.process_time() - started)
    return least, answer


def stream_of_layer(trace, ordered=True):
    """The first layer's stream, built from its recorded experts; in any order for policies that need none."""
    piece = trace.pieces[0]
    layer = piece.layer(trace.meta.model.moe_layers[0])
    selection = Selection(layer.expert_ids, layer.count, layer.gate_weights)
    return build_stream(selection, piece.forwards.row_offsets, 0, EXPERTS, ordered=ordered)


def one_by_one(stream):
    """The same lookups, each a cell of its own."""
    lookups = len(stream.experts)
    return ExpertStream(
        cell_forward=np.repeat(stream.cell_forward, np.diff(stream.offsets)),
        cell_layer=np.zeros(lookups, np.int32),
        offsets=np.arange(lookups + 1),
        experts=stream.experts,
        tokens=stream.tokens,
        last_touch=np.zeros(lookups, np.uint16),
    )


def write_requests(path, experts):
    """A trace in libcachesim's oracleGeneral format: each request with the number of the next one for its expert."""
    requests, last = np.zeros(len(experts), REQUEST), {}
    requests["object"], requests["size"] = experts.astype(np.uint64) + 1, 1
    for i, expert in reversed(list(enumerate(experts.tolist(), 1))):
        requests["next"][i - 1] = last.get(expert, -1)
        last[expert] = i
    path.write_bytes(requests.tobytes())


def served(policy, stream, trace, geometry):
    """The placement of a whole run by a policy."""
    state = policy.fit([stream], geometry, 0) if policy.passes == 2 else policy.start(geometry, 0)
    return policy.place(stream, trace.pieces[0].forwards, geometry, state)[0]


@pytest.mark.parametrize(("name", "peer", "goal"), [("lru", "LRU", 10), ("lfu", "LFU", 6), ("belady", "Belady", 5)])
def test_caches_against_libcachesim(tmp_path, capsys, name, peer, goal):
    libcachesim = pytest.importorskip("libcachesim")
    trace = long_run(blocks=64)
    geometry = geometry_of(trace)
    lookups = one_by_one(stream_of_layer(trace))
    path = tmp_path / "requests.oracleGeneral"
    write_requests(path, lookups.experts)
    number = len(lookups.experts)
    ordered = getattr(load_policy("residency", f"{name}:budget=1"), "ordered", True)
    building, _ = cpu_seconds(lambda: stream_of_layer(trace, ordered))

    def opened(budget):
        parameters = libcachesim.ReaderInitParam(ignore_obj_size=True)
        reader = libcachesim.TraceReader(str(path), libcachesim.TraceType.ORACLE_GENERAL_TRACE, parameters)
        # A table of 2 ** 12 slots holds all experts; the default takes 128 MiB.
        return getattr(libcachesim, peer)(cache_size=budget, hashpower=12), reader

    def theirs(budget):
        cache, reader = opened(budget)
        return round(cache.process_trace(reader)[0] * number)

    def theirs_in_a_loop(budget):
        cache, reader = opened(budget)
        return sum(not cache.get(request) for request in reader)

    for budget in (32, 64, 128, EXPERTS):
        policy = load_policy("residency", f"{name}:budget={budget}" + ",forget=true" * (name == "lfu"))
        their_time, their_misses = cpu_seconds(lambda budget=budget: theirs(budget))
        loop_time, loop_misses = cpu_seconds(lambda budget=budget: theirs_in_a_loop(budget), repeats=1)
        our_time, placed = cpu_seconds(lambda policy=policy: served(policy, lookups, trace, geometry))
        batch_time, _ = cpu_seconds(
            lambda policy=policy: served(policy, stream_of_layer(trace, ordered), trace, geometry)
        )
        our_misses = int((~placed.hit).sum())
        assert our_misses == their_misses == loop_misses
        with capsys.disabled():
            print(
                f"\n{name} budget {budget}: libcachesim {their_time / number * 1e9:.1f} ns a request, "
                f"{loop_time / number * 1e9:.0f} in a Python loop over its reader, {their_misses} misses; "
                f"ours {(our_time + building) / number * 1e9:.1f} (stream {building / number * 1e9:.1f}), "
                f"{our_misses} misses; batches {batch_time / number * 1e9:.1f} with the stream: "
                f"{their_time / (our_time + building):.1f}x one by one, {their_time / batch_time:.1f}x in batches "
                f"(goal {goal}x)",
                end="",
            )


def test_lru_at_every_budget_against_libcachesim(tmp_path, capsys):
    libcachesim = pytest.importorskip("libcachesim")
    trace = long_run(blocks=64)
    lookups = one_by_one(stream_of_layer(trace))
    path = tmp_path / "requests.oracleGeneral"
    write_requests(path, lookups.experts)
    number, budgets = len(lookups.experts), np.arange(1, EXPERTS + 1)
    kinds = np.zeros(number, np.uint8)

    def theirs():
        misses = []
        for budget in budgets.tolist():
            parameters = libcachesim.ReaderInitParam(ignore_obj_size=True)
            reader = libcachesim.TraceReader(str(path), libcachesim.TraceType.ORACLE_GENERAL_TRACE, parameters)
            cache = libcachesim.LRU(cache_size=budget, hashpower=12)
            misses.append(round(cache.process_trace(reader)[0] * number))
        return misses

    def ours():
        counts = np.zeros((1, EXPERTS + 1, 2), np.int64)
        one = lookups.offsets, lookups.experts, lookups.tokens, lookups.last_touch, kinds
        serve_stack(*one, budgets, empty_stack(EXPERTS), counts)
        return (number - np.cumsum(counts[0, :-1, 1])).tolist()

    building, _ = cpu_seconds(lambda: stream_of_layer(trace))
    their_time, their_misses = cpu_seconds(theirs, repeats=1)
    our_time, our_misses = cpu_seconds(ours)
    assert our_misses == their_misses
    with capsys.disabled():
        print(
            f"\nlru at {EXPERTS} budgets: libcachesim {their_time * 1e3:.0f} ms in {EXPERTS} runs, ours "
            f"{(our_time + building) * 1e3:.1f} ms in one pass with the stream, equal misses at all of them: "
            f"{their_time / (our_time + building):.0f}x",
            end="",
        )


def in_one_pass(watcher, policies, trace, weights):
    """What a watcher of many settings of a policy answers."""
    walk = Walk(trace, geometry_of(trace), weights=weights)
    made = walk.watch(watcher(policies, walk.geometry))
    walk.run()
    return made.result()


def test_tide_at_every_interval_and_budget(capsys):
    trace = long_run(blocks=32, layers=4)
    policies = [Tide(budget=n, refresh_interval=tau) for tau in range(1, 32) for n in range(1, EXPERTS + 1)]
    seconds, tallies = cpu_seconds(lambda: in_one_pass(TideGrid, policies, trace, False))
    stream, geometry = stream_of_layer(trace), geometry_of(trace)
    policy = Tide(budget=64, refresh_interval=4)
    single, placed = cpu_seconds(lambda: served(policy, stream, trace, geometry))
    assert tallies[policy].totals[0, :, GPU_TOKENS].sum() == stream.tokens[placed.on_gpu].sum()
    decisions = 4 * int(stream.tokens.sum())
    with capsys.disabled():
        print(
            f"\nTIDE, 31 intervals x {EXPERTS} budgets, streams and tallies built: "
            f"{seconds / decisions / len(policies) * 1e9:.4f} ns a decision and configuration (goal 0.01), the price of "
            f"{seconds / (4 * single):.0f} single replays",
            end="",
        )


def test_lru_at_every_budget(capsys):
    trace = long_run(blocks=64, layers=4)
    policies = [Lru(budget=n) for n in range(1, EXPERTS + 1)]
    whole, tallies = cpu_seconds(lambda: in_one_pass(LruCurve, policies, trace, True))
    # The same work for one budget but for the distances: streams built and counted.
    building, _ = cpu_seconds(lambda: [stream_of_layer(trace) for _ in range(4)])
    number = int(tallies[policies[0]].totals[..., LOOKUPS].sum())
    with capsys.disabled():
        print(
            f"\nLRU at {len(policies)} budgets, 4 layers: {(whole - building) / number * 1e9:.1f} ns a request (goal 30), "
            f"{whole / number * 1e9:.1f} with the streams built",
            end="",
        )


@pytest.mark.parametrize("grid", ["tide:refresh_interval=1..31,budget=1..256", "lru:budget=1..256"])
def test_a_sweep_reaches_the_one_pass(grid, tmp_path, capsys):
    trace = open_trace(write_synthetic(tmp_path / "sweep.trace", SyntheticOptions(requests=2, blocks=4)))
    runs = len(expand(grid))
    seconds, _ = cpu_seconds(
        lambda: sweep(trace, ["vanilla"], [grid], out=tmp_path / "r.parquet", force=True), repeats=1
    )
    with capsys.disabled():
        print(
            f"\nsweep {grid}, {runs} settings: {seconds / runs * 1e3:.3f} ms a setting, "
            f"{seconds / trace.num_decisions / runs * 1e9:.4f} ns a decision and setting",
            end="",
        )
