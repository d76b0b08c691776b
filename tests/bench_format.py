"""What the trace format costs: bytes on disk, and decisions a second written, read back and counted.

A decision is one expert id of one row in one layer. Times are process CPU time, all threads together, best of some runs; goals
in brackets. The trace has LLaDA2.0-mini's shape with a prefix cache (32 rows a call) or without (several hundred rows a call).
"""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from simulator.tallies.counting import unique_experts
from tracer import synthetic
from tracer.parquet import TraceWriter, open_trace
from tracer.summary import describe
from tracer.synthetic import SyntheticOptions, write_synthetic
from tracer.trace import CallRouting

RUNS = 7
SHAPES = {
    "cached": {"requests": 16, "blocks": 16, "prompt_tokens": 256},
    "uncached": {"requests": 3, "blocks": 10, "prompt_tokens": 96, "kv_cache": False},
}


class Kept:
    """Stands in for TraceWriter and keeps the calls, so that writing can be measured apart from making them up."""

    def __init__(self, path, meta, compact=False, **_):
        self.meta, self.compact, self.calls = meta, compact, []
        Kept.last = self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def add_call(self, *call):
        self.calls.append(("add_call", call))

    def add_request(self, row):
        self.calls.append(("add_request", (row,)))

    def without_weights(self):
        calls = []
        for method, arguments in self.calls:
            if method == "add_call":
                parts, tokens, routing = arguments
                arguments = parts, tokens, CallRouting(routing.layers, routing.expert_ids)
            calls.append((method, arguments))
        return calls

    def write(self, path, calls):
        with TraceWriter(path, self.meta, force=True, compact=self.compact) as writer:
            for method, arguments in calls:
                getattr(writer, method)(*arguments)


def best(function, *arguments):
    """Least process time of some runs, seconds, after one that is not counted."""
    function(*arguments)
    times = []
    for _ in range(RUNS):
        started = time.process_time()
        function(*arguments)
        times.append(time.process_time() - started)
    return min(times)


def read_back(path, weights):
    """Read, check and hand out every layer of every segment."""
    for segment in open_trace(path).segments():
        for layer in segment.layers:
            segment.layer(layer, with_weights=weights)


def count_unique(path):
    """From the files to the number of distinct experts of each call and layer."""
    total = 0
    for segment in open_trace(path).segments():
        for number in segment.layers:
            layer = segment.layer(number, with_weights=False)
            offsets = segment.forwards.row_offsets
            total += int(unique_experts(layer.expert_ids, layer.count, offsets, layer.router.num_experts).sum())
    return total


@pytest.fixture(scope="module", params=[(shape, compact) for shape in SHAPES for compact in (False, True)], ids=str)
def kept(request):
    shape, compact = request.param
    patch = pytest.MonkeyPatch()
    patch.setattr(synthetic, "TraceWriter", Kept)
    write_synthetic("unused", SyntheticOptions(**SHAPES[shape]), compact=compact)
    patch.undo()
    return f"{shape}{', compact' * compact}", Kept.last


def entropy(trace, temporal, skew):
    """Bytes a decision that sets need whose experts leave independently: a draw from the popularity for every newcomer.

    Returns the figure for rows that go on from the step before, and that of the whole trace with the first sets of its rows.
    """
    popularity = np.arange(1, trace.meta.model.num_experts + 1.0) ** -skew
    popularity /= popularity.sum()
    draw = -(popularity * np.log2(popularity)).sum()
    leave = 1 - temporal
    going_on = -leave * math.log2(leave) - temporal * math.log2(temporal) + leave * draw
    columns = trace.forwards.columns
    ends = np.zeros(columns["request_id"].max() + 1, np.int64)
    np.maximum.at(ends, columns["request_id"], columns["kv_tokens"] + columns["num_tokens"])
    # every position has one first set
    fresh = ends.sum() / trace.num_rows
    return going_on / 8, (fresh * draw + (1 - fresh) * going_on) / 8


@pytest.mark.bench
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("compact", [False, True], ids=["default", "compact"])
@pytest.mark.parametrize("temporal", [0.9, 0.95])
def test_bytes_on_disk(temporal, compact, shape, tmp_path, benchmark, capsys):
    path = tmp_path / "a.trace"
    requests = 3 if shape == "cached" else 1
    options = SyntheticOptions(**SHAPES[shape] | {"requests": requests, "temporal": temporal, "spatial": 0.0})
    benchmark.pedantic(write_synthetic, (path, options), {"compact": compact, "force": True}, rounds=1)
    sizes = describe(open_trace(path))["bytes_per_decision"]
    going_on, floor = entropy(open_trace(path), temporal, 0.6)
    benchmark.extra_info.update(sizes, entropy=floor)
    with capsys.disabled():
        print(
            f"\nbytes a decision, {shape}{', compact' * compact}, experts stay with chance {temporal}: ids {sizes['ids']:.3f} "
            f"(goal <= 0.30 cached at 0.9; entropy of changes {going_on:.3f}, with first sets in order {floor:.3f}: "
            f"{sizes['ids'] / floor:.2f} times), ids and weights {sizes['ids_and_weights']:.3f} (goal <= "
            f"{1.62 if compact else 1.80}), everything {sizes['all']:.3f}; keys included"
        )


@pytest.mark.bench
@pytest.mark.parametrize("weights", [False, True], ids=["ids", "ids+weights"])
def test_speed(kept, weights, tmp_path, benchmark, capsys):
    shape, calls = kept
    path = tmp_path / "a.trace"
    write = best(calls.write, path, calls.calls if weights else calls.without_weights())
    decisions = open_trace(path).num_decisions
    read = best(read_back, path, weights)
    benchmark.pedantic(read_back, (path, weights), rounds=3)
    lines = [("write", write, 40 if weights else 50), ("read back", read, 140 if weights else 300)]
    if not weights:
        assert count_unique(path) > 0
        lines.append(("file to unique experts", best(count_unique, path), 300))
    found = {name: decisions / seconds / 1e6 for name, seconds, _ in lines}
    benchmark.extra_info.update(shape=shape, decisions=decisions, **found)
    with capsys.disabled():
        kind = "ids and weights" if weights else "ids"
        print(f"\n{shape}, {kind}, {decisions / 1e6:.1f} M decisions, M decisions a second on one core:")
        for name, _, goal in lines:
            print(f"  {name}: {found[name]:.0f} (goal >= {goal})")
