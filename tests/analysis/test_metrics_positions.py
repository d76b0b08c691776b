"""Overlap between positions and the growth of unique experts, against the definitions below."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.metrics import growth, spatial
from tests.analysis.naive_runs import QUICK, add_up, fields, naive_runs
from tests.made_up.runs import written_trace
from tests.made_up.strategies import traces
from tracer.schema import MASKED

STATES = ("masked", "mixed", "decoded")
GOLDEN, WORD = 0x9E3779B97F4A7C15, (1 << 64) - 1


def naive_spatial(trace, positions):
    """{(metric, layer, state, distance): (value, n)}."""
    rows = defaultdict(list)
    units = set()
    for unit, _, _, steps in naive_runs(trace):
        units.add(unit)
        for step in steps:
            for layer in trace.meta.model.moe_layers:
                sets = step.sets(layer)
                for i in sorted(sets):
                    for d in range(1, positions + 1):
                        if i + d in sets:
                            a, b = sets[i], sets[i + d]
                            known = [step[i][1], step[i + d][1]].count("known")
                            row = 1, len(a & b) / len(a | b), len(a & b), len(a)
                            rows[unit, layer, STATES[known], d].append(row)

    def sums(unit, layer, state, d):
        if state == "all":
            return add_up(sums(unit, layer, one, d) for one in STATES)
        if layer is None:
            return add_up(sums(unit, one, state, d) for one in trace.meta.model.moe_layers)
        found = rows.get((unit, layer, state, d), [])
        return np.array([add_up(row[column] for row in found) for column in range(4)], np.float64)

    out = {}
    for layer in (*trace.meta.model.moe_layers, None):
        for state in ("all", *STATES):
            for d in range(1, positions + 1):
                n, jaccard, kept, before = add_up(sums(unit, layer, state, d) for unit in sorted(units))
                if n:
                    out["jaccard", layer, state, d] = jaccard / n, n
                    out["kept", layer, state, d] = kept / before, n
    return out


def mixed(word):
    """SplitMix's next word, on Python integers."""
    word = (word + GOLDEN) & WORD
    word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ word >> 27) * 0x94D049BB133111EB) & WORD
    return word ^ word >> 31


def naive_hash(seed, *numbers):
    word = seed
    for number in numbers:
        word = mixed((word + number) & WORD)
    return word


def naive_growth(trace, seed):
    """{(order, layer, rows): (mean distinct experts, n)}."""
    sizes = defaultdict(list)
    for _, request, block, steps in naive_runs(trace):
        for step in steps:
            number = int(step.segment.forwards.step[step.part])
            for layer in trace.meta.model.moe_layers:
                sets = [experts for _, experts in sorted(step.sets(layer).items())]
                shuffled, word = list(sets), naive_hash(seed + 2, request, block, number)
                for n in range(len(sets) - 1, 0, -1):
                    word = mixed(word)
                    other = word % (n + 1)
                    shuffled[n], shuffled[other] = shuffled[other], shuffled[n]
                for order, rows in (("position", sets), ("random", shuffled)):
                    for n in range(1, len(rows) + 1):
                        sizes[order, layer, n].append(len(frozenset().union(*rows[:n])))
    layers = trace.meta.model.moe_layers
    out = {}
    for order, _, n in list(sizes):
        for layer in (*layers, None):
            found = [size for one in (layers if layer is None else (layer,)) for size in sizes.get((order, one, n), [])]
            if found:
                out[order, layer, n] = sum(found) / len(found), len(found)
    return out


@settings(max_examples=60, deadline=None)
@given(traces(), st.integers(1, 6))
def test_spatial_overlap_is_the_definition(trace, positions):
    found = fields(spatial(trace, positions=positions, **QUICK), "metric", "layer", "state", "distance")
    assert {key: (row["value"], row["n"]) for key, row in found.items()} == naive_spatial(trace, positions)


@settings(max_examples=60, deadline=None)
@given(traces(), st.integers(0, 99))
def test_growth_is_the_definition(trace, seed):
    found = fields(growth(trace, seed=seed, **QUICK), "order", "layer", "rows")
    assert {key: (row["value"], row["n"]) for key, row in found.items()} == naive_growth(trace, seed)


def test_identical_positions_overlap_wholly():
    sets = np.repeat(np.array([[[1, 4]], [[2, 3]], [[0, 5]], [[4, 5]]]), 3, axis=1)
    trace = written_trace({1: sets}, np.full((4, 3), MASKED), block_length=3, experts=6, requests=[0, 1, 2, 3])
    assert set(spatial(trace)["value"]) == {1.0}
    assert set(growth(trace)["value"]) == {2.0}


def test_independent_rows_grow_as_the_formulas_say():
    rng = np.random.default_rng(11)
    experts, top_k, width, forwards = 16, 3, 10, 400
    sets = np.stack([rng.permutation(experts)[:top_k] for _ in range(forwards * width)]).reshape(forwards, width, top_k)
    trace = written_trace(
        {1: sets},
        np.full((forwards, width), MASKED),
        block_length=width,
        experts=experts,
        requests=np.arange(forwards) // 4,
    )
    frame = growth(trace, level=0.999).filter(layer=1)
    assert set(frame["order"]) == {"position", "random"}
    for row in frame.filter(rows=list(range(1, 11))[-1]).iter_rows(named=True):
        assert row["null_uniform"] == experts * (1 - (1 - top_k / experts) ** width)
        assert row["low"] < row["null_uniform"] < row["high"]
        assert row["low"] < row["null_independent"] < row["high"]
        assert row["beats_null"] is False


def test_popular_formula_by_hand():
    # Expert 0 is in every row, 1 in half of them, 2 and 3 in a quarter each.
    sets = np.array([[[0, 1], [0, 2]], [[0, 1], [0, 3]]])
    trace = written_trace({1: sets}, np.full((2, 2), MASKED), block_length=2, experts=4)
    row = growth(trace).filter(layer=1, rows=2, order="position").row(0, named=True)
    assert row["null_independent"] == 1 + 0.75 + 2 * (1 - 0.75**2)
    assert row["value"] == 3.0


def test_long_blocks_are_sampled_at_fewer_points():
    sets = np.zeros((1, 100, 1), int)
    frame = growth(written_trace({1: sets}, np.full((1, 100), MASKED), block_length=100, experts=2))
    points = frame.filter(order="position", layer=1)["rows"].to_list()
    assert points == [*range(1, 65), 68, 72, 76, 80, 85, 90, 95, 100]
