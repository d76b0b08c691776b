"""static fitted on another trace, against lists and loops over that trace's recorded experts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.registry import describe, load_policy
from simulator.replaying import replay
from simulator.streams.gather import geometry_of
from tests.made_up.calls import record
from tests.made_up.runs import random_trace
from tests.made_up.tables import geometry
from tests.simulator.test_budget import naive_loads, naive_share
from tracer import parquet
from tracer.errors import UserError
from tracer.parquet import TraceWriter, open_trace

LAYERS = (1, 2)


def naive_residents(trace, layer, budget):
    """The experts of most (row, expert) pairs over all recorded forwards of any kind, ties to the lowest id."""
    used = []
    for piece in trace.pieces:
        routing = piece.layer(layer)
        for row, count in zip(routing.expert_ids.tolist(), routing.count.tolist(), strict=True):
            used += row[:count]
    return set(sorted(range(trace.meta.model.num_experts), key=lambda e: (-used.count(e), e))[:budget])


def naive_hits(trace, residents):
    """(row, expert) pairs of a trace whose expert is in its layer's resident set."""
    return sum(
        expert in residents[layer]
        for piece in trace.pieces
        for layer in LAYERS
        for row, count in zip(piece.layer(layer).expert_ids.tolist(), piece.layer(layer).count.tolist(), strict=True)
        for expert in row[:count]
    )


@given(seed=st.integers(0, 10**6), budget=st.integers(0, 7), segments=st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_popularity_of_another_trace_equals_lists_and_loops(seed, budget, segments):
    other, replayed = random_trace(seed, segments=segments), random_trace(seed + 1)
    residents = {layer: naive_residents(other, layer, budget) for layer in LAYERS}
    policy = load_policy("residency", f"static:budget={budget},fit_on=other.trace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "open_trace", {"other.trace": other}.get)
        for at, layer in enumerate(LAYERS):
            assert set(np.flatnonzero(policy.start(geometry_of(replayed), at)).tolist()) == residents[layer]
        run = replay(replayed, residency=[policy]).runs[0]
    assert run.summary["gpu_tokens"] == naive_hits(replayed, residents)
    assert run.summary["promotions"] == run.summary["demotions"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_a_split_goes_by_the_loads_of_the_trace_fitted_on(seed, monkeypatch):
    other, replayed = random_trace(seed), random_trace(seed + 1)
    monkeypatch.setattr(parquet, "open_trace", {"other.trace": other}.get)
    policy = load_policy("residency", "static:budget=3,split=auto,fit_on=other.trace")
    sizes = [replayed.meta.model.expert_bytes[layer] for layer in LAYERS]
    held = naive_share(3 * sum(sizes), sizes, naive_loads(other))
    residents = {layer: naive_residents(other, layer, n) for layer, n in zip(LAYERS, held, strict=True)}
    run = replay(replayed, residency=[policy]).runs[0]
    assert run.summary["gpu_tokens"] == naive_hits(replayed, residents)
    assert not any("shared out" in note for note in run.notes)


def stored(folder, name, seed, **shape):
    """Path of a trace on disk."""
    recorded = record(np.random.default_rng(seed), count=True, **{"layers": LAYERS, **shape})
    with TraceWriter(folder / name, recorded.meta, segment_forwards=3) as writer:
        recorded.write(writer)
    return folder / name


def test_fitted_on_another_trace_it_reads_the_replayed_one_once_and_says_whose_popularity_it_is(tmp_path):
    path = stored(tmp_path, "other.trace", 1)
    trace = open_trace(stored(tmp_path, "own.trace", 2))
    seen = []
    specs = [f"static:budget=2,fit_on={path}", "static:budget=2"]
    told = [replay(trace, residency=[spec], progress=lambda *now: seen.append(now)).runs[0] for spec in specs]
    assert [load_policy("residency", spec).passes for spec in specs] == [1, 2]
    assert {total for _, total in seen} == {trace.num_forwards, 2 * trace.num_forwards}
    for run, words in zip(told, ("popularity of experts from", "its best case"), strict=True):
        assert [note for note in run.notes if "popularity" in note] == [note for note in run.notes if words in note]
        assert len([note for note in run.notes if words in note]) == 1
    assert any(str(path) in note for note in told[0].notes)
    assert describe(load_policy("residency", specs[0])) == {
        "name": "static",
        "parameters": {"budget": 2, "fit_on": str(path)},
    }


def test_fitted_on_the_replayed_trace_itself_it_is_its_best_case(tmp_path):
    path = stored(tmp_path, "own.trace", 3)
    apart, best = (replay(open_trace(path), residency=[f"static:budget=3{more}"]) for more in (f",fit_on={path}", ""))
    assert apart.cells.equals(best.cells)


@pytest.mark.parametrize(
    ("shape", "theirs"),
    [
        ({"num_experts": 8}, "8 experts in layers 1-2"),
        ({"layers": (1, 2, 4)}, "9 experts in layers 1-2, 4"),
        ({"layers": (2,)}, "9 experts in layer 2"),
    ],
)
def test_a_trace_of_another_model_is_refused(tmp_path, shape, theirs):
    path = stored(tmp_path, "other.trace", 4, **shape)
    trace = open_trace(stored(tmp_path, "own.trace", 5))
    with pytest.raises(UserError, match=f"{theirs}, the replayed trace's has 9 experts in layers 1-2; give") as caught:
        replay(trace, residency=[f"static:budget=2,fit_on={path}"])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_trace_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no trace"):
        load_policy("residency", f"static:budget=2,fit_on={tmp_path / 'no.trace'}").start(geometry(9), 0)
