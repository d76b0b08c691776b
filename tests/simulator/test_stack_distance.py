"""LRU at every budget in one pass, against lists and loops and against single replays."""

from __future__ import annotations

from functools import partial

from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.caching import lru_curve, stack_distance
from simulator.caching.lru_curve import LruCurve
from simulator.policy import Selection
from simulator.replaying import replay
from simulator.residency.lru import Lru
from simulator.streams.gather import geometry_of
from simulator.streams.stream import build_stream
from simulator.tallies.placement_tally import DEMOTIONS, GPU_TOKENS, HIT_EXPERTS, HIT_TOKENS, LOOKUPS
from simulator.walk import Walk
from tests.made_up.changes import joined
from tests.made_up.runs import long_run, random_trace


def streams_of(trace, at):
    """The streams of one layer, a segment each."""
    geometry = geometry_of(trace)
    for piece in trace.pieces:
        layer = piece.layer(geometry.layers[at])
        selection = Selection(layer.expert_ids, layer.count, layer.gate_weights)
        offsets = piece.forwards.row_offsets
        yield build_stream(selection, offsets, at, geometry.num_experts, layer.present)


def naive_lru(streams, capacity):
    """Hit tokens, hit experts, most experts held at once and experts evicted: a list from oldest to newest, of which the last
    ``capacity`` stay at a batch's end."""
    cache, totals = [], [0, 0, 0, 0]
    for stream in streams:
        for c in range(len(stream.cell_forward)):
            batch = {}
            for i in range(stream.offsets[c], stream.offsets[c + 1]):
                expert = int(stream.experts[i])
                batch[int(stream.last_touch[i])] = expert
                if expert in cache:
                    totals[0] += int(stream.tokens[i])
                    totals[1] += 1
            touched = [batch[rank] for rank in sorted(batch)]
            everything = [expert for expert in cache if expert not in touched] + touched
            cache = everything[max(0, len(everything) - capacity) :]
            totals[2] = max(totals[2], len(cache))
            totals[3] += len(everything) - len(cache)
    return totals


def curve(trace, budgets):
    """{budget: tally} of one walk."""
    walk = Walk(trace, geometry_of(trace))
    watcher = walk.watch(LruCurve([Lru(budget=budget) for budget in budgets], walk.geometry))
    walk.run()
    return {policy.budget: tally for policy, tally in watcher.result().items()}


def hits(tally, at):
    """Hit tokens and hit experts of a layer."""
    return tally.totals[at].sum(axis=0)[[HIT_TOKENS, HIT_EXPERTS]].tolist()


@given(
    seed=st.integers(0, 10**6),
    num_experts=st.integers(3, 9),
    calls=st.integers(1, 10),
    segments=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_every_budget_of_a_layer_equals_lists_and_loops(seed, num_experts, calls, segments):
    trace = random_trace(seed, segments=segments, calls=calls, num_experts=num_experts)
    tallies = curve(trace, range(num_experts + 1))
    for at in range(2):
        streams = list(streams_of(trace, at))
        for budget, tally in tallies.items():
            held = int(tally.held[at] // tally.sizes[at])
            evicted = int(tally.totals[at, :, DEMOTIONS].sum())
            assert [*hits(tally, at), held, evicted] == naive_lru(streams, budget)
            assert tally.totals[at, :, GPU_TOKENS].sum() == sum(stream.tokens.sum() for stream in streams)
            assert tally.totals[at, :, LOOKUPS].sum() == sum(len(stream.experts) for stream in streams)


@given(seed=st.integers(0, 10**6), num_experts=st.integers(3, 9), calls=st.integers(1, 10), segments=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_every_figure_of_a_run_is_that_of_a_replay_of_its_own(seed, num_experts, calls, segments):
    trace = random_trace(seed, segments=segments, calls=calls, num_experts=num_experts)
    specs = [Lru(budget=budget) for budget in range(num_experts + 1)]
    specs += [Lru(budget_bytes=5000), Lru(budget_bytes=7777, split="auto"), Lru(budget=2, scope="global")]
    specs += [Lru(budget=2, hold="batch"), Lru(budget=3, hold="batch")]
    for routing in ("vanilla", "skip:beta=0.5"):
        in_one_pass = replay(trace, [routing], specs, keep_cells=False)
        alone = [replay(trace, [routing], [spec]).runs[0].summary for spec in specs]
        assert [run.summary for run in in_one_pass.runs] == alone


def test_a_long_run_packs_its_stack_and_equals_single_replays():
    trace = long_run(blocks=3, layers=2)
    tallies = curve(trace, [0, 30, 64, 100, 200, 256])
    for at in (0, 1):
        streams = list(streams_of(trace, at))
        assert all(hits(tally, at) == naive_lru(streams, budget)[:2] for budget, tally in tallies.items())
    found = [hits(tallies[budget], 0)[1] for budget in (64, 100, 256)]
    assert 0 < found[0] < found[1] < found[2] < tallies[64].totals[0, :, LOOKUPS].sum()


def test_a_stack_of_short_runs_is_packed_often(monkeypatch):
    monkeypatch.setattr(lru_curve, "empty_stack", partial(stack_distance.empty_stack, room=2))
    trace = random_trace(4, segments=3, calls=60, num_experts=9)
    tallies = curve(trace, range(10))
    assert [hits(tallies[budget], 1) for budget in range(10)] == [
        naive_lru(list(streams_of(trace, 1)), budget)[:2] for budget in range(10)
    ]


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_segments_do_not_show(seed):
    trace = random_trace(seed, segments=3, calls=4)
    apart, whole = (curve(one, range(8)) for one in (trace, joined(trace)))
    for budget, tally in apart.items():
        assert (tally.totals == whole[budget].totals).all() and (tally.held == whole[budget].held).all()
