"""What holds for every policy at the edges: other names for the experts, odd traces and budgets, traces that lack something."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.experiment import LACKS, make_experiments
from simulator.policy import ACTIVE, SCORES
from simulator.registry import load_policy, policy_names
from simulator.replaying import replay
from simulator.streams.gather import gather_layer
from tests.analysis.replayed import stored
from tests.made_up.changes import calls_of, unrouted, with_layers
from tests.made_up.routers import router
from tests.made_up.runs import block_run, random_trace
from tests.made_up.strategies import runs, seeds, specs
from tests.made_up.tables import MemoryTrace, meta_of
from tracer.errors import UserError
from tracer.parquet import open_trace
from tracer.schema import PREFILL

E, K = 12, 4
# dMoE counts votes, and equal counts go to the lowest id; with a top_p of 1 every expert with a vote is kept.
WITHOUT_TIES = {"dmoe": "dmoe:top_p=1.0,min_experts=1"}


def residency(name, budget):
    """A residency spec with a budget where it takes one that limits it."""
    return name if name in ("all_resident", "none_resident") else f"{name}:budget={budget}"


def decoded(seed, **kwargs):
    """A trace of decoding with scores of every expert, routers without groups."""
    rng = np.random.default_rng(seed)
    specs = {layer: router(rng, num_experts=E, top_k=K, bias=layer == 2) for layer in (1, 2)}
    piece, first_block = block_run(rng, blocks=2, prompt=6, block_length=4, specs=specs, **kwargs)
    return of_pieces(specs, [piece], first_block)


def of_pieces(specs, pieces, first_block):
    """A MemoryTrace of segments."""
    meta = meta_of(specs, block_length=4, expert_bytes=dict.fromkeys(specs, 1000))
    meta.decoding.update(steps=4, threshold=0.95, mask_id=1, loop="sdar")
    return MemoryTrace(meta, first_block, pieces)


def without_ties(trace, seed):
    """The same trace with gate weights no two of which, and no two sums of which, are equal, as float16 ones may be."""

    def layer(old):
        noise = np.random.default_rng((seed, old.layer)).uniform(0.999, 1.001, old.gate_weights.shape)
        return replace(old, gate_weights=(old.gate_weights * noise).astype(np.float32))

    return replace(trace, pieces=[replace(p, load=lambda *asked, p=p: layer(p.load(*asked))) for p in trace.pieces])


def renamed(trace, labels):
    """The same trace with expert e called labels[e]: ids, score columns and biases."""
    back = np.argsort(labels)

    def spec(old):
        return old if old.expert_bias is None else replace(old, expert_bias=old.expert_bias[back])

    def layer(old):
        return replace(
            old,
            expert_ids=labels[old.expert_ids].astype(old.expert_ids.dtype),
            router_scores=old.router_scores[:, back],
            router=spec(old.router),
        )

    pieces = [replace(p, load=lambda *asked, p=p: layer(p.load(*asked))) for p in trace.pieces]
    meta = replace(trace.meta, routers={n: spec(one) for n, one in trace.meta.routers.items()})
    return MemoryTrace(meta, trace.first_block, pieces)


def selected(trace, name):
    """For every layer and row of a routing policy's trajectory its experts with their weights."""
    geometry, (asked,) = make_experiments(trace, [name], ["all_resident"])
    found = []
    for piece in trace.segments():
        trajectory = asked.acceptance.unroll(piece, geometry)
        for number in geometry.layers:
            layer = gather_layer(piece.layer(number, True), piece.forwards, trajectory)
            selection = asked.routing.select(layer, trajectory, geometry)
            for t, n in enumerate(selection.count.tolist()):
                pairs = zip(selection.expert_ids[t, :n].tolist(), selection.gate_weights[t, :n].tolist(), strict=True)
                found.append(dict(pairs))
    return found


@pytest.mark.parametrize("name", policy_names("routing"))
@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_other_names_for_experts_give_the_same_selection_under_those_names(name, seed):
    trace = without_ties(decoded(seed), seed)
    labels = np.random.default_rng(seed).permutation(E)
    spec = WITHOUT_TIES.get(name, name)
    before, after = selected(trace, spec), selected(renamed(trace, labels), spec)
    assert [set(row) for row in after] == [{int(labels[e]) for e in row} for row in before]
    for row, other in zip(before, after, strict=True):
        # Weights are sums of floats over a row's experts, which come in another order.
        assert all(other[int(labels[e])] == pytest.approx(w, rel=1e-5) for e, w in row.items())


@given(seed=st.integers(0, 10**6), budget=st.integers(0, 7))
@settings(max_examples=40, deadline=None)
def test_belady_misses_least_of_all_that_load_on_demand_where_experts_are_of_one_size(seed, budget):
    trace = random_trace(seed, calls=8, num_experts=7, expert_bytes={1: 100, 2: 100})
    # Caches that load on demand are those that may span layers.
    names = [n for n in policy_names("residency") if "scope" in {f.name for f in fields(load_policy("residency", n))}]
    assert {"lru", "lfu", "belady"} <= set(names)
    for scope in ("layer", "global"):
        runs = replay(trace, ["vanilla"], [f"{n}:scope={scope},budget={budget}" for n in names]).runs
        missed = dict(zip(names, (run.summary["promotions"] for run in runs), strict=True))
        assert missed["belady"] == min(missed.values())


def constant_gate():
    """A trace whose second layer gives every expert the same score in every row: all of its choices are ties."""
    trace = decoded(3)

    def flat(piece, number, *asked):
        layer = piece.load(number, *asked)
        if number != 2:
            return layer
        rows = len(layer.count)
        return replace(
            layer,
            expert_ids=np.tile(np.arange(K, dtype=np.uint8), (rows, 1)),
            gate_weights=np.full((rows, K), 1 / K, np.float16),
            router_scores=np.full((rows, E), 1 / E, np.float32),
            router=replace(layer.router, expert_bias=None),
        )

    pieces = [replace(p, load=lambda *asked, p=p: flat(p, *asked)) for p in trace.pieces]
    meta = replace(trace.meta, routers={n: replace(r, expert_bias=None) for n, r in trace.meta.routers.items()})
    return MemoryTrace(meta, trace.first_block, pieces)


PER_CALL = ("forward_id", "row_offsets", "part_offsets")


def cut(trace, keep):
    """A trace of those model calls of the first segment that ``keep(forwards)`` names, one part each."""
    piece = trace.pieces[0]
    forwards = piece.forwards
    calls = np.flatnonzero(keep(forwards))
    rows = np.concatenate([np.arange(forwards.row_offsets[f], forwards.row_offsets[f + 1]) for f in calls])
    table = replace(
        forwards,
        forward_id=forwards.forward_id[calls],
        row_offsets=np.concatenate(([0], np.cumsum(np.diff(forwards.row_offsets)[calls]))),
        part_offsets=np.arange(len(calls) + 1),
        **{f.name: getattr(forwards, f.name)[calls] for f in fields(forwards) if f.name not in PER_CALL},
    )
    tokens = replace(piece.tokens, **{f.name: getattr(piece.tokens, f.name)[rows] for f in fields(piece.tokens)})

    def load(*asked):
        layer = piece.load(*asked)
        return replace(
            layer,
            expert_ids=layer.expert_ids[rows],
            count=layer.count[rows],
            gate_weights=layer.gate_weights[rows],
            router_scores=layer.router_scores[rows],
            present=layer.present[calls],
        )

    whole = replace(piece, forwards=table, tokens=tokens, load=load)
    return MemoryTrace(trace.meta, trace.first_block, [whole])


ODD = {
    "one forward": lambda: cut(decoded(1), lambda f: np.arange(len(f.forward_id)) == 1),
    "prefill only": lambda: cut(decoded(1), lambda f: f.kind == PREFILL),
    "no forward": lambda: of_pieces({1: router(np.random.default_rng(0), E, K)}, [], {}),
    "constant gate": constant_gate,
}


def finite(value):
    """No NaN and no infinity anywhere in a JSON document."""
    if isinstance(value, dict):
        return all(finite(v) for v in value.values())
    if isinstance(value, list):
        return all(finite(v) for v in value)
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("odd", ODD)
def test_odd_traces_have_an_answer_under_every_policy(odd):
    trace = ODD[odd]()
    routings = policy_names("routing")
    residencies = [
        residency(n, b) for n in policy_names("residency") for b in ((3,) if n == "all_resident" else (0, 3, E))
    ]
    result = replay(trace, routings, list(dict.fromkeys(residencies)), "h100-pcie5")
    document = result.to_json()
    assert finite(document) and json.dumps(document, allow_nan=False)
    assert len(document["runs"]) == len(routings) * len(dict.fromkeys(residencies))
    for run in document["runs"]:
        summary = run["summary"]
        assert summary["gpu_tokens"] + summary["cpu_tokens"] == summary["assignments"]
        assert summary["latency_s"] >= 0
        if not trace.num_forwards:
            assert summary["assignments"] == summary["forwards"] == 0 and summary["hit_rate"] is None
        if odd in ("prefill only", "no forward"):
            assert summary["denoise_forwards"] == 0
            assert summary["unique_experts"] is None and summary["tokens_per_forward"] is None
        if odd == "prefill only":
            assert summary["unique_experts_all_forwards"] > 0
        if odd == "one forward" and run["acceptance"]["name"] == "recorded":
            assert summary["forwards"] == 1


def pieces_of(segment):
    """The segment cut wherever no block of a request is open, each piece knowing the call that follows it."""
    forwards = segment.forwards
    pairs = [(r, b) if b >= 0 else None for r, b in zip(forwards.request_id, forwards.block, strict=True)]
    cuts = [i for i in range(1, len(pairs)) if not (set(pairs[:i]) - {None}) & set(pairs[i:])]
    bounds = [0, *cuts, len(pairs)]

    def following(end):
        return calls_of(segment, [end]) if end < len(pairs) else None

    return [
        replace(calls_of(segment, range(low, high)), following=lambda high=high: following(high))
        for low, high in pairwise(bounds)
    ]


def interleaved(segment):
    """The calls of several requests, block by block in turn."""
    forwards = segment.forwards
    return calls_of(segment, np.lexsort((forwards.forward_id, forwards.request_id, forwards.block)))


@pytest.mark.parametrize("name", policy_names("routing"))
@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("kv_cache", [False, True])
def test_every_routing_policy_gives_the_same_answer_wherever_a_trace_is_cut(name, kv_cache, in_turn):
    for seed in range(6):
        trace = decoded(seed, kv_cache=kv_cache, requests=2, max_accept=2)
        segment = interleaved(trace.pieces[0]) if in_turn else trace.pieces[0]
        whole, cut_up = (replace(trace, pieces=pieces) for pieces in ([segment], pieces_of(segment)))
        assert len(cut_up.pieces) > (1 if in_turn else 3)
        one, several = (replay(t, [name], ["lru:budget=5"]) for t in (whole, cut_up))
        assert several.cells.equals(one.cells)
        assert several.to_json() == one.to_json()


@pytest.mark.parametrize("kv_cache", [False, True])
def test_a_stored_trace_gives_the_same_answer_wherever_it_is_cut(kv_cache, tmp_path, monkeypatch):
    _, one = stored(tmp_path / "a.trace", seed=3, kv_cache=kv_cache, blocks=4, block_length=4)
    assert one.num_segments == 1
    monkeypatch.setattr("tracer.files.reader.segment_rows", lambda meta: 1)
    several = open_trace(one.path)
    assert several.num_segments >= 8
    routings = ["vanilla", "team", "team:reuse=false,limit=false", "team:hot_distance=1,hot_probability=1.0"]
    found = [replay(trace, routings, ["lru:budget=5"]) for trace in (one, several)]
    assert found[0].cells.equals(found[1].cells) and found[0].to_json() == found[1].to_json()


# Bounds come with simulated forwards, so from policies that bring an acceptance policy along.
SIMULATES = [n for n in policy_names("routing") if hasattr(load_policy("routing", n), "acceptance")]
# Other thresholds and quotas than the run's, rows that are cold at once.
BOUNDED = [
    "team:hot_distance=1,hot_probability=1.0",
    "team:reuse=false,threshold=0.3",
    "team:quota=3",
    "team:limit=false",
]


@pytest.mark.parametrize("name", [*SIMULATES, *BOUNDED])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_scenario_bounds_enclose_the_replayed_figure(name, data):
    spec = data.draw(specs())
    segment, where = data.draw(runs(spec=spec))
    if data.draw(st.booleans()):
        segment = with_layers(segment, unrouted(np.random.default_rng(data.draw(seeds))))
    meta = meta_of(dict.fromkeys(segment.layers, spec), block_length=where.block_length)
    steps = data.draw(st.integers(1, where.block_length + 1))
    meta.decoding.update(steps=steps, threshold=data.draw(st.sampled_from([0.3, 0.9, 1.0])), mask_id=1, loop="sdar")
    first_block = dict.fromkeys(segment.forwards.request_id.tolist(), 0)
    (run,) = replay(MemoryTrace(meta, first_block, [segment]), [name]).runs
    for figure, (low, high) in (run.bounds or {}).items():
        assert low <= run.summary[figure] <= high


@pytest.mark.parametrize("name", [*SIMULATES, *BOUNDED])
def test_speculation_has_bounds(name):
    (run,) = replay(decoded(5), [name]).runs
    assert set(run.bounds) == {"tokens_per_forward", "unique_experts"}
    assert sum(note.startswith("Bounds:") for note in run.notes) == 1


NEEDS = [(axis, n) for axis in ("routing", "residency") for n in policy_names(axis) if load_policy(axis, n).requires]


@pytest.mark.parametrize(("axis", "name"), NEEDS)
def test_what_a_policy_needs_is_named_with_the_capture_level_that_holds_it(axis, name):
    trace = decoded(0)
    requires = load_policy(axis, name).requires
    assert requires <= set(LACKS)
    for requirement in requires:
        trace.holds = frozenset(LACKS) - {requirement}
        specs = ([name], ["all_resident"]) if axis == "routing" else (["vanilla"], [residency(name, 3)])
        with pytest.raises(UserError) as refused:
            replay(trace, *specs)
        sentence = str(refused.value)
        assert name in sentence and sentence.count(".") == 1 and sentence.endswith(".")
        if requirement in (ACTIVE, SCORES):
            assert ("--level scores" if requirement == SCORES else "--level active") in sentence


def test_some_policies_need_scores():
    assert {"dmoe", "block_pool"} <= {name for _, name in NEEDS}
