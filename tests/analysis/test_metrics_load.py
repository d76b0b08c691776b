"""Expert load, its skew, and unique experts, against the definitions below."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings

from analysis.metrics import balance, load, unique
from tests.analysis.naive_runs import QUICK, add_up, fields, naive_runs
from tests.made_up.runs import written_trace
from tests.made_up.strategies import traces
from tracer.schema import DECODED, MASKED


def naive_load(trace):
    """{(layer, expert): (load, activity)} over the block rows of denoise forwards; activity is a share of active forwards."""
    loads, active, steps_with_load = Counter(), Counter(), Counter()
    for _, _, _, steps in naive_runs(trace):
        for step in steps:
            for layer in trace.meta.model.moe_layers:
                found = Counter(e for experts in step.sets(layer).values() for e in experts)
                steps_with_load[layer] += bool(found)
                for e, n in found.items():
                    loads[layer, e] += n
                    active[layer, e] += 1
    return {
        (layer, e): (loads[layer, e], active[layer, e] / steps_with_load[layer])
        for layer in trace.meta.model.moe_layers
        for e in range(trace.meta.model.num_experts)
        if steps_with_load[layer]
    }


def naive_unique(trace, scope):
    """{(layer, state): (mean, sd, cv, sample mean, n)} of distinct experts."""
    sizes = defaultdict(list)
    for unit, _, _, steps in naive_runs(trace):
        for step in steps:
            starts, ends = step.segment.forwards.part_rows
            for layer in trace.meta.model.moe_layers:
                routed = step.routing.get(layer)
                if scope == "forward":
                    rows = range(int(starts[step.part]), int(ends[step.part]))
                    sets = [
                        ("all", frozenset(routed.expert_ids[r, : routed.count[r]].tolist())) for r in rows if routed
                    ]
                else:
                    sets = [
                        (kind, step[j][2][layer]) for j in step for kind in ("all", step[j][1]) if step[j][2].get(layer)
                    ]
                for state in ("all", "masked", "known"):
                    found = frozenset().union(*(experts for kind, experts in sets if kind == state))
                    if found:
                        sizes[unit, layer, state.replace("known", "decoded")].append(len(found))
    layers = trace.meta.model.moe_layers
    units = sorted({key[0] for key in sizes})
    out = {}
    for state in ("all", "masked", "decoded"):
        for layer in (*layers, None):
            chosen = layers if layer is None else (layer,)
            by_unit = [[n for one in chosen for n in sizes.get((u, one, state), [])] for u in units]
            found = [n for unit in by_unit for n in unit]
            if found:
                count, total, squares = len(found), sum(found), sum(n * n for n in found)
                mean, sd = total / count, math.sqrt((squares * count - total * total) / (count * count))
                means = [sum(unit) / len(unit) for unit in by_unit if unit]
                out[layer, state] = mean, sd, sd / mean, add_up(means) / len(means), count
    return out


def naive_balance(loads):
    """Figures of one layer's loads: differences of all pairs, deviation over mean, and counts."""
    n, total = len(loads), sum(loads)
    gini = Fraction(sum(abs(a - b) for a in loads for b in loads), 2 * n * total)
    squares = sum((a - b) ** 2 for a in loads for b in loads)
    shares = [a / total for a in loads if a]
    return {
        "gini": float(gini),
        # Half the mean squared difference of all pairs is the variance.
        "load_cv": math.sqrt(squares // 2) / total,
        "entropy_experts": math.exp(-add_up(p * math.log(p) for p in shares)),
        "top_tenth": sum(sorted(loads)[-math.ceil(n / 10) :]) / total,
        "hot_experts": float(sum(a * n >= 2 * total for a in loads)),
        "dead_experts": float(loads.count(0)),
    }


@settings(max_examples=60, deadline=None)
@given(traces())
def test_load_is_the_definition(trace):
    frame = load(trace, **QUICK)
    expected = naive_load(trace)
    found = fields(frame, "layer", "expert")
    assert {key: (row["load"], row["activity"]) for key, row in found.items()} == expected
    for layer in {key[0] for key in expected}:
        loads = [expected[layer, e][0] for e in range(trace.meta.model.num_experts)]
        ranked = sorted(range(len(loads)), key=lambda e: (-loads[e], e))
        assert [found[layer, e]["rank"] for e in ranked] == list(range(1, len(loads) + 1))
        assert all(found[layer, e]["share"] == loads[e] / sum(loads) for e in ranked)


@settings(max_examples=60, deadline=None)
@given(traces())
def test_unique_is_the_definition(trace):
    frame = unique(trace, **QUICK)
    for scope in ("block", "forward"):
        found = fields(frame.filter(scope=scope), "metric", "layer", "state")
        expected = naive_unique(trace, scope)
        if scope == "forward":
            expected = {key: value for key, value in expected.items() if key[1] == "all"}
        metrics = ("unique_mean", "unique_sd", "unique_cv", "unique_sample_mean")
        got = {
            key: (*(found[metric, *key]["value"] for metric in metrics), found["unique_mean", *key]["n"])
            for key in {key[1:] for key in found}
        }
        assert got == expected


def naive_expected(trace, scope):
    """{(layer, state): mean over forwards of the distinct experts of as many rows, drawn one by one from the layer's}."""
    layers, experts = trace.meta.model.moe_layers, trace.meta.model.num_experts
    used, rows, sizes = {layer: Counter() for layer in layers}, Counter(), defaultdict(Counter)
    for _, _, _, steps in naive_runs(trace):
        for step in steps:
            starts, ends = step.segment.forwards.part_rows
            for layer in layers:
                if scope == "block":
                    found = [(step[j][1].replace("known", "decoded"), s) for j, s in step.sets(layer).items()]
                else:
                    routed = step.routing.get(layer)
                    bounds = range(int(starts[step.part]), int(ends[step.part])) if routed else ()
                    found = [
                        ("other", routed.expert_ids[r, : routed.count[r]].tolist()) for r in bounds if routed.count[r]
                    ]
                used[layer].update(e for _, s in found for e in s)
                rows[layer] += len(found)
                for state in ("all", "masked", "decoded"):
                    n = sum(state in ("all", kind) for kind, _ in found)
                    sizes[layer, state][n] += n > 0
    out = {}
    for state in ("all", "masked", "decoded"):
        by_layer = {}
        for layer in layers:
            share = [used[layer][e] / rows[layer] if rows[layer] else 0.0 for e in range(experts)]
            found = sorted((n, times) for n, times in sizes[layer, state].items() if times)
            by_layer[layer] = (
                add_up(add_up(1 - (1 - p) ** n for p in share) * times for n, times in found),
                add_up(times for _, times in found),
            )
        for layer in (*layers, None):
            chosen = layers if layer is None else (layer,)
            top, bottom = (add_up(by_layer[one][k] for one in chosen) for k in (0, 1))
            if bottom:
                out[layer, state] = top / bottom
    return out


@settings(max_examples=60, deadline=None)
@given(traces())
def test_unique_against_independent_rows_is_the_definition(trace):
    frame = unique(trace, **QUICK)
    for scope in ("block", "forward"):
        expected = naive_expected(trace, scope)
        for row in frame.filter(scope=scope).iter_rows(named=True):
            want = expected[row["layer"], row["state"]] if row["metric"].endswith("mean") else None
            # NumPy's powers may differ from Python's in the last digit.
            assert row["null_independent"] == (want if want is None else pytest.approx(want, rel=1e-12))


def test_unique_against_as_many_independent_rows():
    # Two rows in one forward, one in the other: the null averages both.
    sets = np.array([[[0, 1], [0, 2]], [[0, 3], [-1, -1]]])
    trace = written_trace({1: sets}, [[MASKED, DECODED], [DECODED, DECODED]], block_length=2, experts=4)
    row = unique(trace).filter(metric="unique_mean", layer=1, scope="block", state="all").row(0, named=True)
    shares = [1.0, 1 / 3, 1 / 3, 1 / 3]
    assert row["value"] == 2.5
    assert (
        row["null_independent"] == (add_up(1 - (1 - p) for p in shares) + add_up(1 - (1 - p) ** 2 for p in shares)) / 2
    )


def layer_with_loads(loads):
    """A trace whose only layer has these loads: one row a token-slot."""
    ids = np.repeat(np.arange(len(loads)), loads)
    return written_trace({1: ids[:, None, None]}, np.full((len(ids), 1), MASKED), block_length=1, experts=len(loads))


@settings(max_examples=60, deadline=None)
@given(traces())
def test_balance_is_the_definition(trace):
    counted = naive_load(trace)
    layers = sorted({layer for layer, _ in counted})
    loads = {layer: [counted[layer, e][0] for e in range(trace.meta.model.num_experts)] for layer in layers}
    want = {layer: naive_balance(loads[layer]) for layer in layers}
    found = fields(balance(trace, **QUICK), "metric", "layer")
    assert {layer for _, layer in found} == {*layers, *([None] if layers else [])}
    for (metric, layer), row in found.items():
        value = want[layer][metric] if layer else add_up(want[one][metric] for one in layers) / len(layers)
        # Logarithms and powers of NumPy and Python may differ in the last digit.
        assert row["value"] == (pytest.approx(value, rel=1e-12) if metric == "entropy_experts" else value), metric
        assert row["n"] == (sum(loads[layer]) if layer else sum(map(sum, loads.values())))


def test_balance_by_hand():
    found = fields(balance(layer_with_loads([10, 0, 3, 1, 1, 1])).filter(layer=1), "metric")
    value = {metric: row["value"] for (metric,), row in found.items()}
    # Upwards 0, 1, 1, 1, 3, 10, weighted with -5, -3, -1, 1, 3, 5.
    assert value["gini"] == 56 / (6 * 16)
    assert value["load_cv"] == math.sqrt(6 * 112 - 16 * 16) / 16
    assert (value["top_tenth"], value["hot_experts"], value["dead_experts"]) == (10 / 16, 1.0, 1.0)


def test_even_load_has_no_skew():
    value = {
        row["metric"]: row["value"] for row in balance(layer_with_loads([2] * 8)).filter(layer=1).iter_rows(named=True)
    }
    # The exponential of a logarithm is the one figure that floats do not give exactly.
    assert math.isclose(value.pop("entropy_experts"), 8, rel_tol=1e-12)
    assert value == {
        "gini": 0.0,
        "load_cv": 0.0,
        "top_tenth": 0.125,
        "hot_experts": 0.0,
        "dead_experts": 0.0,
    }
