"""What a layer foretells of the next, and whether popularity agrees, against the definitions below."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import replace
from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np
import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.metrics import agreement, predictability
from tests.analysis.naive_runs import QUICK, add_up, fields, naive_runs
from tests.made_up.runs import written_trace
from tests.made_up.strategies import traces
from tracer.schema import MASKED

EVERYTHING = {**QUICK, "sample_rows": 100_000}


def naive_recall(trace):
    """{layer: (share of experts guessed from the layer before, n)} over all block rows, half of the requests for the other."""
    layers = trace.meta.model.moe_layers
    together, used, rows = Counter(), Counter(), []
    for unit, _, _, steps in naive_runs(trace):
        for step in steps:
            for _, (_, _, sets) in step.items():
                rows.append((unit, sets))
                for before, after in pairwise(layers):
                    if sets.get(before) and sets.get(after):
                        used.update((unit % 2, before, e) for e in sets[before])
                        together.update((unit % 2, before, e, other) for e in sets[before] for other in sets[after])
    hits, asked = Counter(), Counter()
    for unit, sets in rows:
        for before, after in pairwise(layers):
            half = 1 - unit % 2
            learnt = any(used[half, before, e] for e in range(trace.meta.model.num_experts))
            if not sets.get(before) or not sets.get(after) or not learnt:
                continue
            score = [
                add_up(
                    together[half, before, e, other] / used[half, before, e]
                    for e in sorted(sets[before])
                    if used[half, before, e]
                )
                for other in range(trace.meta.model.num_experts)
            ]
            ranked = sorted(range(len(score)), key=lambda e: (-score[e], e))
            hits[after] += len(sets[after].intersection(ranked[: len(sets[after])]))
            asked[after] += len(sets[after])
    out = {(after,): (hits[after] / asked[after], asked[after]) for after in layers[1:] if asked[after]}
    if out:
        out[(None,)] = sum(hits.values()) / sum(asked.values()), sum(asked.values())
    return out


def naive_measures(a, b, size):
    """Cosine, Spearman's correlation and top-set overlap of two loads; None where there is none."""
    if not any(a) or not any(b):
        return None, None, None
    squares = [math.sqrt(sum(x * x for x in load)) for load in (a, b)]
    angle = sum(x * y for x, y in zip(a, b)) / (squares[0] * squares[1])

    def ranks(load):
        return [Fraction(2 * sum(y < x for y in load) + sum(y == x for y in load) + 1, 2) for x in load]

    middle = Fraction(len(a) + 1, 2)
    x, y = [r - middle for r in ranks(a)], [r - middle for r in ranks(b)]
    spread = [sum(v * v for v in values) for values in (x, y)]
    # Twice the ranks, as whole numbers: the same quotient.
    correlation = None
    if all(spread):
        below = math.sqrt(float(4 * spread[0])) * math.sqrt(float(4 * spread[1]))
        correlation = float(4 * sum(v * w for v, w in zip(x, y))) / below

    def top(load):
        return {e for e in sorted(range(len(load)), key=lambda e: (-load[e], e))[:size] if load[e]}

    return angle, correlation, len(top(a) & top(b)) / size


def naive_loads(trace):
    """{unit: {layer: loads}} over block rows."""
    experts = trace.meta.model.num_experts
    loads = defaultdict(lambda: {layer: [0] * experts for layer in trace.meta.model.moe_layers})
    for unit, _, _, steps in naive_runs(trace):
        mine = loads[unit]
        for step in steps:
            for layer in trace.meta.model.moe_layers:
                for found in step.sets(layer).values():
                    for e in found:
                        mine[layer][e] += 1
    return loads


@settings(max_examples=60, deadline=None)
@given(traces(min_requests=2))
def test_predictability_is_the_definition(trace):
    found = fields(predictability(trace, **EVERYTHING), "layer")
    assert {key: (row["value"], row["n"]) for key, row in found.items()} == naive_recall(trace)


@settings(max_examples=60, deadline=None)
@given(traces(min_requests=2))
def test_agreement_is_the_definition(trace):
    found = fields(agreement(trace, **QUICK), "metric", "layer")
    loads = naive_loads(trace)
    size = max(1, trace.meta.model.num_experts // 4)
    expected = {}
    for layer in trace.meta.model.moe_layers:
        pairs = [naive_measures(loads[a][layer], loads[b][layer], size) for a, b in combinations(sorted(loads), 2)]
        for place, metric in enumerate(("cosine", "rank_correlation", "top_overlap")):
            known = [pair[place] for pair in pairs if pair[place] is not None]
            if known:
                expected[metric, layer] = add_up(known) / len(known), len(known)
    got = {key: (row["value"], row["n"]) for key, row in found.items() if key[1] is not None}
    assert got == expected


def test_a_layer_that_copies_the_one_before_is_foretold_wholly():
    rng = np.random.default_rng(2)
    sets = rng.integers(0, 8, (12, 5, 1))
    trace = written_trace(
        {1: sets, 2: (sets + 3) % 8}, np.full((12, 5), MASKED), block_length=5, experts=8, requests=np.arange(12) // 3
    )
    row = predictability(trace).filter(layer=2).row(0, named=True)
    assert row["value"] == row["low"] == row["high"] == 1.0
    assert row["beats_null"] is True
    assert max(row["null_hot"], row["null_independent"], row["null_shuffle"]) < 0.5


def with_datasets(trace, names):
    return replace(trace, requests=trace.requests.with_columns(pl.Series("dataset", names, dtype=pl.String)))


def test_datasets_are_compared_in_pairs():
    # Requests 0 and 1 use experts 0 and 1, request 2 uses 2 and 3, request 3 has no dataset.
    sets = np.array([[[0, 1]], [[0, 1]], [[2, 3]], [[0, 3]]])
    trace = written_trace({5: sets}, np.full((4, 1), MASKED), block_length=1, experts=8, requests=np.arange(4))
    frame = agreement(with_datasets(trace, ["maths", "maths", "code", None])).filter(between="datasets", layer=5)
    found = {row["metric"]: row for row in frame.iter_rows(named=True)}
    assert {(row["first"], row["second"]) for row in found.values()} == {("code", "maths")}
    assert found["cosine"]["value"] == 0.0
    assert found["top_overlap"]["value"] == 0.0
    assert found["cosine"]["null_shuffle"] == 2 * 4 / 8 / (math.sqrt(2) * math.sqrt(8))
    assert found["rank_correlation"]["null_shuffle"] == 0.0
    assert found["top_overlap"]["null_shuffle"] == 2 * 2 / 8 / 2


@settings(max_examples=60, deadline=None)
@given(traces(min_requests=2), st.lists(st.sampled_from(["maths", "code", "prose", None]), min_size=3, max_size=3))
def test_agreement_of_datasets_is_the_definition(trace, names):
    names = names[: trace.requests.height]
    frame = agreement(with_datasets(trace, names), **QUICK).filter(between="datasets")
    experts = trace.meta.model.num_experts
    size = max(1, experts // 4)
    of_unit = {}
    for unit, request, _, _ in naive_runs(trace):
        of_unit[unit] = names[request]
    loads = naive_loads(trace)
    total = {
        (name, layer): [sum(loads[u][layer][e] for u in loads if of_unit[u] == name) for e in range(experts)]
        for name in names
        for layer in trace.meta.model.moe_layers
    }
    expected = {}
    for first, second in combinations(sorted({name for name in names if name}), 2):
        for layer in trace.meta.model.moe_layers:
            found = naive_measures(total[first, layer], total[second, layer], size)
            for metric, value in zip(("cosine", "rank_correlation", "top_overlap"), found):
                expected[metric, first, second, layer] = value
        for metric in ("cosine", "rank_correlation", "top_overlap"):
            known = [expected[metric, first, second, layer] for layer in trace.meta.model.moe_layers]
            known = [value for value in known if value is not None]
            expected[metric, first, second, None] = add_up(known) / len(known) if known else None
    found = fields(frame, "metric", "first", "second", "layer")
    if routed(trace):
        assert {key: row["value"] for key, row in found.items()} == expected


def routed(trace):
    return any(segment.layer(layer).count.any() for segment in trace.segments() for layer in segment.layers)


def test_equal_requests_agree_wholly():
    sets = np.array([[[0, 1], [0, 2]]] * 3)
    trace = written_trace({5: sets}, np.full((3, 2), MASKED), block_length=2, experts=8, requests=np.arange(3))
    frame = agreement(with_datasets(trace, ["a", "b", "b"]))
    assert frame.height == 3 * 2 * 2
    values = frame["value"].to_list()
    assert all(math.isclose(value, 1, rel_tol=1e-12) for value in values)
