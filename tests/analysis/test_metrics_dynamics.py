"""Cosine, drift, survival and working sets, against the definitions below."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from fractions import Fraction
from itertools import product

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.metrics import cosine, drift, survival, working_set
from tests.analysis.naive_runs import QUICK, add_up, fields, naive_runs
from tests.made_up.runs import written_trace
from tests.made_up.strategies import traces
from tracer.schema import MASKED


def naive_loads(step, layer, scope):
    """Rows that use each expert: of the block, or of all rows of the part."""
    if scope == "block":
        return Counter(e for experts in step.sets(layer).values() for e in experts)
    starts, ends = step.segment.forwards.part_rows
    routed = step.routing.get(layer)
    if routed is None:
        return Counter()
    return Counter(
        int(e)
        for row in range(int(starts[step.part]), int(ends[step.part]))
        for e in routed.expert_ids[row, : routed.count[row]]
    )


def wanted(load, budget):
    """The experts of largest count, ties to the lowest id, none without a token."""
    return set(sorted(load, key=lambda e: (-load[e], e))[:budget])


def naive_pairs(trace, scope, distances, budgets):
    """{(metric, layer, budget, distance): (value, n)} of cosine, drift and missed."""
    rows = defaultdict(list)
    layers = trace.meta.model.moe_layers
    units = set()
    for unit, _, _, steps in naive_runs(trace):
        units.add(unit)
        for layer in layers:
            loads = [naive_loads(step, layer, scope) for step in steps]
            for s, later in enumerate(loads):
                for d in range(1, min(distances, s) + 1):
                    earlier = loads[s - d]
                    if not earlier or not later:
                        continue
                    dot = sum(earlier[e] * later[e] for e in later)
                    squares = sum(n * n for n in earlier.values()), sum(n * n for n in later.values())
                    rows[unit, layer, "cosine", None, d].append(dot / math.sqrt(float(squares[0]) * float(squares[1])))
                    for budget in budgets:
                        before, now = wanted(earlier, budget), wanted(later, budget)
                        rows[unit, layer, "drift", budget, d].append(len(now - before) / len(now))
                        outside = sum(n for e, n in later.items() if e not in before)
                        rows[unit, layer, "missed", budget, d].append(outside / sum(later.values()))
    out = {}
    for metric, budget, d in {key[2:] for key in rows}:
        for layer in (*layers, None):
            chosen = layers if layer is None else (layer,)
            by_unit = [[rows.get((u, one, metric, budget, d), []) for one in chosen] for u in sorted(units)]
            n = sum(len(found) for unit in by_unit for found in unit)
            if n:
                total = add_up(add_up(add_up(found) for found in unit) for unit in by_unit)
                out[metric, layer, budget, d] = total / n, n
    return out


def members(load, budget):
    """The experts of a step that count: the wanted ones, or with no budget all that are active."""
    return set(load) if budget is None else wanted(load, budget)


def naive_survival(trace, scope, distances, budget=None):
    """{(layer, distance): (share, n)}."""
    risk, alive = Counter(), Counter()
    layers = trace.meta.model.moe_layers
    for _, _, _, steps in naive_runs(trace):
        for layer in layers:
            active = [members(naive_loads(step, layer, scope), budget) for step in steps]
            for s, experts in enumerate(active):
                for t in range(1, distances + 1):
                    if s + t < len(steps):
                        risk[layer, t] += len(experts)
                        alive[layer, t] += len(experts.intersection(*active[s + 1 : s + t + 1]))
    out = {}
    for t in range(1, distances + 1):
        for layer in (*layers, None):
            chosen = layers if layer is None else (layer,)
            n = sum(risk[one, t] for one in chosen)
            if n:
                out[layer, t] = sum(alive[one, t] for one in chosen) / n, n
    return out


def naive_working_set(trace, scope, windows):
    """{(layer, window): (mean distinct experts, n)} over windows of a request's denoise forwards, block after block."""
    requests = defaultdict(list)
    for _, request, _, steps in naive_runs(trace):
        requests[request].extend(steps)
    layers = trace.meta.model.moe_layers
    if not any(routed.count.any() for steps in requests.values() for step in steps for routed in step.routing.values()):
        return {}
    sizes = defaultdict(list)
    for steps in requests.values():
        for layer in layers:
            active = [set(naive_loads(step, layer, scope)) for step in steps]
            for w in windows:
                for last in range(w, len(steps) + 1):
                    sizes[layer, w].append(len(set().union(*active[last - w : last])))
    out = {}
    for w in windows:
        for layer in (*layers, None):
            found = [size for one in (layers if layer is None else (layer,)) for size in sizes[one, w]]
            if found:
                out[layer, w] = sum(found) / len(found), len(found)
    return out


def naive_shuffles(trace, scope, distances, windows, budget=None):
    """Survival {(layer, distance)} and working sets {(layer, window)} where each request's forwards change places at random.

    Of n forwards an expert is active in a, so k of them that are drawn are all among these in C(a, k) of C(n, k) cases.
    """
    layers = trace.meta.model.moe_layers
    requests = defaultdict(list)
    for _, request, _, steps in naive_runs(trace):
        requests[request].append(steps)
    top, bottom = Counter(), Counter()
    for blocks in requests.values():
        n = sum(len(steps) for steps in blocks)
        for layer in layers:
            uses = Counter(
                e for steps in blocks for step in steps for e in members(naive_loads(step, layer, scope), budget)
            )
            for t in range(1, distances + 1):
                spans = sum(max(0, len(steps) - t) for steps in blocks)
                alive = sum(Fraction(math.comb(a, t + 1), math.comb(n, t + 1)) for a in uses.values()) if n > t else 0
                top["survival", layer, t] += spans * alive
                bottom["survival", layer, t] += spans * Fraction(uses.total(), n)
            for w in windows:
                spans = max(0, n - w + 1)
                missed = sum(Fraction(math.comb(n - a, w), math.comb(n, w)) for a in uses.values()) if spans else 0
                top["working_set", layer, w] += spans * (len(uses) - missed)
                bottom["working_set", layer, w] += spans
    out = {}
    for name, layer, at in list(bottom):
        for one in (layer, None):
            chosen = layers if one is None else (one,)
            below = sum(bottom[name, each, at] for each in chosen)
            if below:
                out[name, one, at] = float(sum(top[name, each, at] for each in chosen) / below)
    return out


def naive_chances(trace, scope, distances, windows, budget=None):
    """The same without order: forwards in which each expert is as often active as it is, and a list as long as the mean set."""
    layers, experts = trace.meta.model.moe_layers, trace.meta.model.num_experts
    uses, filled = {layer: Counter() for layer in layers}, Counter()
    for _, _, _, steps in naive_runs(trace):
        for step in steps:
            for layer in layers:
                found = naive_loads(step, layer, scope)
                filled[layer] += bool(found)
                uses[layer].update(members(found, budget))
    share = {layer: [uses[layer][e] / max(1, filled[layer]) for e in range(experts)] for layer in layers}
    out = {}
    for layer in (*layers, None):
        chosen = layers if layer is None else (layer,)
        whole = add_up(add_up(share[one]) for one in chosen)
        listed = [add_up(sorted(share[one])[::-1][: round(add_up(share[one]))]) for one in chosen]
        for t in range(1, distances + 1):
            alive = add_up(add_up(q ** (t + 1) for q in share[one]) for one in chosen)
            out["survival", layer, t] = (alive / whole, add_up(listed) / whole) if whole else (None, None)
        for w in windows:
            distinct = [add_up(1 - (1 - q) ** w for q in share[one]) for one in chosen]
            out["working_set", layer, w] = (add_up(distinct) / len(chosen),)
    return out


@settings(max_examples=60, deadline=None)
@given(traces(), st.integers(1, 8), st.lists(st.integers(1, 12), min_size=1, max_size=3, unique=True))
def test_nulls_of_survival_and_working_sets_are_the_definition(trace, distances, windows):
    alive = survival(trace, distances=distances, budgets=(2,), **QUICK)
    sets = working_set(trace, windows=tuple(windows), **QUICK)
    for scope, budget in product(("block", "forward"), (None, 2)):
        shuffled = naive_shuffles(trace, scope, distances, windows, budget)
        chances = naive_chances(trace, scope, distances, windows, budget)
        for frame, at in ((alive.filter(pl.col("budget").eq_missing(budget)), "distance"), (sets, "window")):
            if at == "window" and budget:
                continue
            for row in frame.filter(scope=scope).iter_rows(named=True):
                key = row["metric"].replace("residency", "survival"), row["layer"], row[at]
                # Chances are products of floats here and quotients of whole numbers there.
                assert row["null_shuffle"] == pytest.approx(shuffled[key], rel=1e-12, abs=1e-15)
                hot = [row["null_hot"]] if at == "distance" else []
                assert [row["null_independent"], *hot] == pytest.approx(list(chances[key]), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(traces(), st.integers(1, 8), st.lists(st.integers(1, 12), min_size=1, max_size=3, unique=True))
def test_cosine_and_drift_are_the_definition(trace, distances, budgets):
    budgets = tuple(budgets)
    angles = cosine(trace, distances=distances, **QUICK)
    moved = drift(trace, distances=distances, budgets=budgets, **QUICK)
    for scope in ("block", "forward"):
        expected = naive_pairs(trace, scope, distances, budgets)
        found = fields(angles.filter(scope=scope), "metric", "layer", "distance")
        got = {(metric, layer, None, d): (row["value"], row["n"]) for (metric, layer, d), row in found.items()}
        found = fields(moved.filter(scope=scope), "metric", "layer", "budget", "distance")
        got |= {key: (row["value"], row["n"]) for key, row in found.items()}
        assert got == expected


@settings(max_examples=60, deadline=None)
@given(traces(), st.integers(1, 8), st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True))
def test_survival_and_working_sets_are_the_definition(trace, distances, windows):
    windows = tuple(windows)
    budgets = (1, 3)
    alive = survival(trace, distances=distances, budgets=budgets, **QUICK)
    sets = working_set(trace, windows=windows, **QUICK)
    for scope in ("block", "forward"):
        for budget in (None, *budgets):
            chosen = alive.filter(pl.col("budget").eq_missing(budget), scope=scope)
            assert set(chosen["metric"]) <= {"survival" if budget is None else "residency"}
            found = fields(chosen, "layer", "distance")
            expected = naive_survival(trace, scope, distances, budget)
            assert {key: (row["value"], row["n"]) for key, row in found.items()} == expected
        found = fields(sets.filter(scope=scope), "layer", "window")
        assert {key: (row["value"], row["n"]) for key, row in found.items()} == naive_working_set(trace, scope, windows)


def test_frozen_routing_does_not_drift():
    sets = np.repeat(np.array([[[3, 1], [1, 7]], [[2, 5], [0, 6]]]), 4, axis=0)
    trace = written_trace(
        {1: sets},
        np.full((8, 2), MASKED),
        block_length=2,
        experts=9,
        requests=np.repeat([0, 1], 4),
        blocks=np.zeros(8, int),
    )
    assert set(drift(trace, budgets=(1, 2, 9)).filter(metric="drift")["value"]) == {0.0}
    assert set(drift(trace, budgets=(4,))["value"]) == {0.0}
    assert set(cosine(trace)["value"]) == {1.0}
    assert set(survival(trace)["value"]) == {1.0}
    # One of four token-slots lies outside a budget of two in request 0 (experts 1, 3 | 7); two of four in request 1.
    missed = fields(drift(trace, budgets=(2,)).filter(metric="missed", scope="block"), "layer", "distance")
    assert missed[1, 1]["value"] == (3 * Fraction(1, 4) + 3 * Fraction(1, 2)) / 6
    assert missed[1, 1]["n"] == 6


def test_survival_null_follows_the_formula():
    # Expert 0 is active in every step, 1 and 2 in every other one.
    sets = np.array([[[0, 1]], [[0, 2]]] * 3)
    frame = survival(written_trace({4: sets}, np.full((6, 1), MASKED), block_length=1, experts=3), distances=2)
    row = frame.filter(scope="block", metric="survival", layer=4, distance=2).row(0, named=True)
    assert row["null_independent"] == (1 + 0.5**3 + 0.5**3) / 2
    assert row["null_hot"] == (1 + 0.5) / 2
    # Of three steps drawn from six, expert 0 is in all; 1 and 2 are in one case of twenty each. Two are active a step.
    assert row["null_shuffle"] == pytest.approx((1 + 2 / 20) / 2, rel=1e-15)
    assert row["value"] == 4 / 8


def test_working_set_goes_on_across_segments():
    sets = np.array([[[0]], [[1]], [[2]], [[3]]])
    arguments = {"block_length": 1, "experts": 5, "blocks": [0, 1, 2, 3]}
    whole = written_trace({1: sets}, np.full((4, 1), MASKED), **arguments)
    cut = written_trace({1: sets}, np.full((4, 1), MASKED), cut=[1, 3], **arguments)
    assert working_set(cut).equals(working_set(whole))
    assert working_set(cut).filter(layer=1, window=4, scope="block")["value"].to_list() == [4.0]
