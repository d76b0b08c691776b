"""What replays cost: recorded traces against their own project's replay, memory, threads, sweeps, kernels' compilation.

Goals: 1000 times BigMoeOnEdge's own replay, 13.5 thousand decisions x settings a CPU second; at most 1 GiB whatever the trace's
length; two threads 1.8 times one on an idle machine; all kernels compiled for the first time in 20 s. Times are process CPU
time, threads by the clock; other traces than the recorded ones are synthetic, of LLaDA2.0-mini's shape.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from simulator.replaying import replay
from simulator.sweeping import sweep
from simulator.tallies.counting import unique_experts
from tests.tracer.test_import_bigmoe import MEBIBYTES, PUBLISHED, caches, recorded
from tracer.parquet import open_trace
from tracer.synthetic import SyntheticOptions, write_synthetic

pytestmark = pytest.mark.bench
REPEATS = 9
ROOT = Path(__file__).parents[1]
THEIRS = 13.5e3
# Budgets BigMoeOnEdge's README prints beside the recorded traces, with the first four caches.
PRINTED = (500, 2000)
RESIDENCIES = (
    "all_resident",
    "tide:budget=64,refresh_interval=4",
    "lru:budget=64",
    "lru:scope=global,budget=64",
    "lfu:budget=64",
    "static:budget=64",
    "belady:budget=64",
    "belady:scope=global,budget=64",
)
PEAK = """
import json, re, sys
from pathlib import Path
from simulator.replaying import replay
from tracer.parquet import open_trace
trace = open_trace(sys.argv[1])
residencies = ["lru:budget=64", "lru:scope=global,budget=64", "tide:budget=64,refresh_interval=4", "static:budget=64"]
result = replay(trace, sys.argv[3:], residencies)
result.write(sys.argv[2])
# Not getrusage, which starts from the memory of the process that started this one.
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(json.dumps([trace.num_decisions, trace.num_segments, peak * 1024]))
"""
FIRST = """
import json, sys, threading, time
from collections import defaultdict
from numba.core import event

class Clock(event.Listener):
    # Thread CPU seconds of each compilation, less those of what it compiles on the way.
    def __init__(self):
        self.open, self.seconds = defaultdict(list), defaultdict(list)
    def on_start(self, e):
        self.open[threading.get_ident()].append([time.thread_time(), 0.0])
    def on_end(self, e):
        compiling = self.open[threading.get_ident()]
        start, inside = compiling.pop()
        whole = time.thread_time() - start
        if compiling:
            compiling[-1][1] += whole
        kernel = e.data["dispatcher"].py_func
        name = f"{kernel.__module__}.{kernel.__name__}"
        self.seconds["what numba brings" if name.startswith("numba.") else name].append(whole - inside)

clock = Clock()
event.register("numba:compile", clock)
started = time.process_time()
from analysis.metrics import consistency
from simulator.registry import policy_names
from simulator.replaying import replay
from tracer.parquet import open_trace
trace = open_trace(sys.argv[1])
caches = [f"{name}:scope=global,budget=9" for name in ("lru", "lfu", "belady")]
fixed = ["all_resident", "none_resident", "fiddler:budget=9,cpu_tokens_max=2"]
limited = [f"{name}:budget=9" for name in policy_names("residency") if not any(f.startswith(name) for f in fixed)]
replay(trace, policy_names("routing"), [*fixed, *limited, *caches], keep_cells=False)
# Streams without an order are built by kernels of their own.
replay(trace, ["vanilla"], ["tide:budget=9"], keep_cells=False)
# Many settings of one policy share a pass, by kernels of their own.
replay(trace, ["vanilla"], ["lru:budget=9", "lru:budget=8"], keep_cells=False)
consistency(trace)
print(json.dumps([time.process_time() - started, clock.seconds]))
"""


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return open_trace(
        write_synthetic(tmp_path_factory.mktemp("traces") / "mini.trace", SyntheticOptions(requests=12, blocks=8))
    )


def cpu_seconds(function):
    """Least process CPU time of a few calls after one that compiles, and what the last one gave."""
    answer, least = function(), np.inf
    for _ in range(REPEATS):
        started = time.process_time()
        answer = function()
        least = min(least, time.process_time() - started)
    return least, answer


def in_a_process(code, *arguments, **environment):
    """What a fresh process printed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recorded_traces_against_their_own_replay(name, tmp_path, capsys):
    trace = recorded(name, tmp_path)
    decisions = trace.num_decisions
    printed = [
        f"{cache}hold=batch,budget_bytes={size << 20}"
        for cache in ("belady:scope=global,", "lru:scope=global,", "lru:")
        for size in PRINTED
    ]
    printed += [f"lfu:scope=global,hold=batch,budget_bytes={size << 20}" for size in PRINTED]
    every = [f"lru:budget_bytes={size << 20}" for size in range(1, MEBIBYTES[-1] + 1)]
    runs = {
        "whole replays, all published figures": (
            len(caches(name)),
            lambda: replay(trace, residency=caches(name), keep_cells=False),
        ),
        "whole replays, those of the README": (
            len(printed),
            lambda: replay(trace, residency=printed, keep_cells=False),
        ),
        "LRU a layer, every MiB": (len(every), lambda: replay(trace, residency=every, keep_cells=False)),
    }
    for what, (number, run) in runs.items():
        seconds, _ = cpu_seconds(run)
        speed = decisions * number / seconds
        with capsys.disabled():
            print(
                f"\n{name}, {decisions} decisions, {what}: {number} settings in {seconds * 1e3:.1f} ms, "
                f"{speed / 1e6:.1f} M decisions x settings a second, {speed / THEIRS:.0f} times BigMoeOnEdge's own (goal 1000)",
                end="",
            )
    rates = [
        round(100 * run.summary["expert_hit_rate_by_kind"]["decode"], 3)
        for run in replay(trace, residency=caches(name)).runs
    ]
    assert rates == [rate for row in PUBLISHED[name].values() for rate in row]


def test_replays_from_the_file_to_the_summary(trace, capsys):
    decisions = trace.num_decisions
    base, _ = cpu_seconds(lambda: replay(trace, keep_cells=False))
    with capsys.disabled():
        print(
            f"\nvanilla x all_resident: {base / decisions * 1e9:.1f} ns a decision, {decisions / base / 1e6:.0f} M/s",
            end="",
        )
    for residency in RESIDENCIES[1:]:
        whole, result = cpu_seconds(lambda r=residency: replay(trace, residency=["all_resident", r], keep_cells=False))
        assert result.runs[1].summary["assignments"] == decisions
        with capsys.disabled():
            print(f"\n  and {residency}: {(whole - base) / decisions * 1e9:.1f} ns a decision more", end="")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc/self/status, Linux only")
@pytest.mark.parametrize(
    ("routings", "level", "requests"), [(["vanilla"], "ids", (16, 64)), (["vanilla", "dmoe"], "scores", (3, 12))]
)
def test_memory_does_not_grow_with_the_trace(routings, level, requests, tmp_path, capsys):
    peaks = []
    for number in requests:
        path = write_synthetic(tmp_path / f"{number}.trace", SyntheticOptions(requests=number, blocks=8, level=level))
        decisions, segments, peak = in_a_process(PEAK, path, tmp_path / f"{number}.replay", *routings)
        peaks.append(peak)
        with capsys.disabled():
            print(
                f"\n{' and '.join(routings)} x 4 residencies, {decisions / 1e6:.1f} M decisions in {segments} segments: "
                f"{peak / 2**20:.0f} MiB at most (goal 1024)",
                end="",
            )
    assert max(peaks) < 1 << 30


def two_kernels_against_one():
    """How much sooner two threads are through with two calls of a kernel that share nothing: what the machine allows."""
    rng, rows = np.random.default_rng(0), 1 << 12
    jobs = [rng.permuted(np.tile(np.arange(256, dtype=np.uint8), (rows, 1)), axis=1)[:, :8].copy() for _ in range(2)]
    offsets, count = np.arange(0, rows + 1, 32), np.full(rows, 8, np.uint8)

    def job(ids):
        for _ in range(400):
            unique_experts(ids, count, offsets, 256)

    with ThreadPoolExecutor(2) as pool:
        least = {map: np.inf, pool.map: np.inf}
        for _ in range(REPEATS):
            for run in least:
                started = time.perf_counter()
                list(run(job, jobs))
                least[run] = min(least[run], time.perf_counter() - started)
        return least[map] / least[pool.map]


def test_two_threads_against_one(trace, capsys):
    least = {1: np.inf, 2: np.inf}
    for _ in range(REPEATS):
        for threads in least:
            started = time.perf_counter()
            result = replay(trace, residency=RESIDENCIES[:3], keep_cells=False, threads=threads)
            least[threads] = min(least[threads], time.perf_counter() - started)
            assert len(result.runs) == 3
    with capsys.disabled():
        print(
            f"\ntwo threads against one, by the clock: {least[1] / least[2]:.2f} times (goal 1.8 on an idle machine; two "
            f"kernels that share nothing here {two_kernels_against_one():.2f} times; "
            f"{os.cpu_count()} processors, {os.getloadavg()[0]:.1f} processes running)",
            end="",
        )


def test_sweep_shares_its_passes(trace, tmp_path, capsys):
    grid = ["tide:refresh_interval=1..31,budget=32|64|128"]
    seconds, result = cpu_seconds(lambda: sweep(trace, residency=grid, out=tmp_path / "r.parquet", force=True))
    single, _ = cpu_seconds(lambda: replay(trace, residency=["tide:budget=64"], keep_cells=False))
    assert result.computed == 93
    with capsys.disabled():
        print(
            f"\nsweep of {result.computed} TIDE configurations: "
            f"{seconds / result.computed / trace.num_decisions * 1e9:.1f} ns a decision and configuration, "
            f"the price of {seconds / single:.0f} single replays",
            end="",
        )


def test_first_compilation(tmp_path, capsys):
    path = write_synthetic(tmp_path / "small.trace", SyntheticOptions(blocks=2, layers=2, level="scores"))
    (first, kernels), (again, none) = (
        in_a_process(FIRST, path, NUMBA_CACHE_DIR=str(tmp_path / "cache")) for _ in range(2)
    )
    by_seconds = sorted(((sum(seconds), len(seconds), name) for name, seconds in kernels.items()), reverse=True)
    with capsys.disabled():
        for seconds, times, name in by_seconds:
            print(f"\n{seconds:6.2f} s {name}{f', {times} times' if times > 1 else ''}", end="")
        print(
            f"\nall kernels of every policy, curve and consistency table: {sum(row[0] for row in by_seconds):.1f} s compiling "
            f"(goal 20), the process {first:.1f} s; {again:.1f} s from the cache"
        )
    assert kernels and not none and again < first
