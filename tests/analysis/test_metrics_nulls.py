"""Samples, nulls and bootstrap intervals, against the definitions below."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from analysis.metrics import Settings, consistency, cosine, drift, overlap
from analysis.metrics.shared.bootstrap import Bootstrap
from analysis.metrics.shared.frames import beats, ordered_sum
from analysis.metrics.shared.nulls import NeighbourBlocks, row_nulls
from analysis.metrics.shared.samples import RowSample, hashed
from analysis.metrics.shared.settings import UNITS
from analysis.metrics.shared.study import Study
from analysis.metrics.shared.view import shape_of
from tests.analysis.naive_runs import add_up, fields, naive_runs
from tests.analysis.test_metrics_positions import naive_hash
from tests.made_up.runs import written_trace
from tests.made_up.strategies import traces
from tracer.errors import UserError
from tracer.schema import DECODED, MASKED


def gathered(trace, watcher, **parameters):
    """A watcher that has seen the whole trace."""
    study = Study(trace, Settings(**parameters))
    watching = study.watch(watcher)
    study.run()
    return watching


def naive_sample(trace, capacity, seed):
    """The rows of smallest hash: [(hash, request, block, offset, state, sets)]."""
    rows = []
    for _, request, block, steps in naive_runs(trace):
        for step in steps:
            number = int(step.segment.forwards.step[step.part])
            for j, (_, state, sets) in step.items():
                rows.append((naive_hash(seed, request, block, number, j), request, block, j, state, sets))
    return sorted(rows, key=lambda row: row[0])[:capacity]


def overlaps(pairs):
    """Jaccard, kept and unchanged of pairs of sets; None without any."""
    pairs = [(a, b) for a, b in pairs if a and b]
    if not pairs:
        return {"jaccard": None, "kept": None, "unchanged": None}
    return {
        "jaccard": add_up(len(a & b) / len(a | b) for a, b in pairs) / len(pairs),
        "kept": sum(len(a & b) for a, b in pairs) / sum(len(a) for a, _ in pairs),
        "unchanged": sum(a == b for a, b in pairs) / len(pairs),
    }


def close_to(table, expected):
    """Whether a null's table [L + 1, classes] holds these values in its layers, NaN for None."""
    return all(
        np.array_equal(table[metric][:-1], np.array(expected[metric], np.float64), equal_nan=True)
        for metric in ("jaccard", "kept", "unchanged")
    )


@settings(max_examples=50, deadline=None)
@given(traces(), st.integers(1, 40), st.integers(0, 9))
def test_sampled_rows_are_those_of_smallest_hash(trace, capacity, seed):
    sample = gathered(trace, RowSample, sample_rows=capacity, seed=seed)
    expected = naive_sample(trace, capacity, seed)
    assert sample.key.tolist() == [row[0] for row in expected]
    for place, name in ((1, "request"), (2, "block"), (3, "offset")):
        assert sample.columns[name].tolist() == [row[place] for row in expected]
    for number, layer in enumerate(trace.meta.model.moe_layers):
        ids, count = sample.rows(number)
        got = [ids[m, : count[m]].tolist() for m in range(len(sample))]
        assert got == [sorted(row[5].get(layer) or ()) for row in expected]


@settings(max_examples=50, deadline=None)
@given(traces(), st.integers(2, 40), st.integers(0, 9))
def test_row_nulls_are_the_definition(trace, capacity, seed):
    shape = shape_of(trace.meta)
    sample = gathered(trace, RowSample, sample_rows=capacity, seed=seed)
    rng = np.random.default_rng(seed)
    load = rng.integers(0, 4, (len(shape.layers), shape.experts))
    found = row_nulls(sample, load, shape, 30, seed)
    rows = naive_sample(trace, capacity, seed)
    rng = np.random.default_rng(seed)
    masked = np.array([m for m, row in enumerate(rows) if row[4] == "masked"], np.int64)
    known = np.array([m for m, row in enumerate(rows) if row[4] == "known"], np.int64)
    everything = np.arange(len(rows))
    drawn = [
        sample.pairs(a, b, 30, rng) for a, b in ((masked, masked), (masked, known), (known, known), (everything,) * 2)
    ]
    for a, b in drawn:
        assert all(rows[x][1:3] != rows[y][1:3] for x, y in zip(a, b, strict=True))
    hot, independent = defaultdict(list), defaultdict(list)
    for number, layer in enumerate(shape.layers):
        ranked = sorted(range(shape.experts), key=lambda e: (-load[number, e], e))
        listed = frozenset(ranked[: shape.top_k[number]])
        by_class = [
            [(listed, rows[m][5].get(layer)) for m in chosen] for chosen in (masked, everything, known, everything)
        ]
        pairs = [[(rows[x][5].get(layer), rows[y][5].get(layer)) for x, y in zip(a, b, strict=True)] for a, b in drawn]
        for out, groups in ((hot, by_class), (independent, pairs)):
            made = [overlaps(group) for group in groups]
            for metric in ("jaccard", "kept", "unchanged"):
                out[metric].append([one[metric] for one in made])
    assert close_to(found["hot"], hot)
    assert close_to(found["independent"], independent)


@settings(max_examples=50, deadline=None)
@given(traces(), st.integers(0, 9))
def test_neighbour_blocks_are_the_definition(trace, seed):
    shape = shape_of(trace.meta)
    found = gathered(trace, NeighbourBlocks, seed=seed)
    before, pairs = {}, defaultdict(list)
    for _, request, block, steps in naive_runs(trace):
        chosen = {
            j: steps[naive_hash(seed + 1, request, block, j) % len(steps)].get(j) for j in range(shape.block_length)
        }
        for j, row in chosen.items():
            earlier = before.get(request, {}).get(j)
            if row and earlier:
                cell = 2 * (earlier[1] == "known") + (row[1] == "known")
                for number, layer in enumerate(shape.layers):
                    pairs[number, cell].append((earlier[2].get(layer), row[2].get(layer)))
        before[request] = chosen
    for number in range(len(shape.layers)):
        for cell in range(4):
            sets = [(a, b) for a, b in pairs[number, cell] if a and b]
            assert found.sums.pairs[number, cell] == len(sets)
            assert found.sums.kept[number, cell] == sum(len(a & b) for a, b in sets)
            assert found.sums.same[number, cell] == sum(a == b for a, b in sets)
            assert found.sums.jaccard[number, cell] == add_up(len(a & b) / len(a | b) for a, b in sets)


@given(st.integers(0, 2**63 - 1), st.integers(-(2**31), 2**31 - 1), st.integers(0, 2**40))
def test_hash_is_splitmix_on_integers(seed, first, second):
    got = int(hashed(seed, np.array([first]), np.array([second]))[0])
    assert got == naive_hash(seed, first, second)


@settings(max_examples=50, deadline=None)
@given(
    arrays(np.int64, st.tuples(st.integers(2, 6), st.integers(1, 3)), elements=st.integers(0, 50)), st.integers(0, 9)
)
def test_intervals_are_percentiles_of_resampled_ratios(counts, seed):
    units = len(counts)
    bootstrap = Bootstrap(units, 40, 0.9, seed)
    parts = np.maximum(counts, 1)
    value, low, high = bootstrap.ratio(counts, parts)
    draws = np.random.default_rng(seed).multinomial(units, [1 / units] * units, 40)
    for column in range(counts.shape[1]):
        drawn = [
            sum(int(w) * int(n) for w, n in zip(weights, counts[:, column], strict=True))
            / sum(int(w) * int(n) for w, n in zip(weights, parts[:, column], strict=True))
            for weights in draws
        ]
        assert value[column] == counts[:, column].sum() / parts[:, column].sum()
        ordered = sorted(drawn)
        for got, share in ((low[column], bootstrap.tail), (high[column], 1 - bootstrap.tail)):
            place = share * 39
            below = int(place)
            above = min(below + 1, 39)
            assert got == ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def test_replicates_that_lack_a_figure_are_left_out():
    bootstrap = Bootstrap(2, 200, 0.95, 0)
    numerator, denominator = np.array([[3], [0]]), np.array([[4], [0]])
    value, low, high = bootstrap.ratio(numerator, denominator)
    assert value[0] == low[0] == high[0] == 0.75


def test_one_unit_has_no_interval():
    value, low, high = Bootstrap(1, 10, 0.95, 0).ratio(np.array([[1.0]]), np.array([[2.0]]))
    assert value[0] == 0.5 and np.isnan(low[0]) and np.isnan(high[0])


def test_beats_null_needs_every_null_beaten():
    frame = pl.DataFrame(
        {
            "metric": ["jaccard"] * 4 + ["drift"] * 2,
            "low": [0.5, 0.5, 0.5, None, 0.1, 0.1],
            "high": [0.6, 0.6, 0.6, None, 0.2, 0.2],
            "null_hot": [0.4, 0.55, None, 0.1, 0.3, 0.3],
            "null_independent": [0.3, 0.3, None, 0.1, 0.25, 0.15],
        }
    )
    assert beats(frame, smaller=("drift",))["beats_null"].to_list() == [True, False, None, None, True, False]


def popular_only():
    """Rows of one forward differ, but hot experts 0 and 1 are in most of them, whatever the step or block."""
    rng = np.random.default_rng(4)
    forwards, width = 60, 6
    rest = rng.integers(2, 30, (forwards, width))
    hot = rng.integers(0, 2, (forwards, width))
    sets = np.stack([hot, rest], axis=2)
    states = rng.choice([DECODED, MASKED], (forwards, width))
    blocks = np.arange(forwards) // 5
    return written_trace({1: sets}, states, block_length=width, experts=30, requests=blocks // 2, blocks=blocks % 2)


def test_popularity_alone_beats_no_null():
    row = overlap(popular_only()).filter(metric="jaccard", layer=1, state="all", distance=1).row(0, named=True)
    assert row["null_hot"] > row["null_independent"] > 0.05
    assert row["beats_null"] is False


def test_forward_nulls_by_hand():
    # Blocks 0 and 1 of two requests use experts 0 and 1, one block each; the popular list is {0} (ties to the lowest id).
    sets = np.array([[[0]], [[0]], [[1]], [[1]]])
    trace = written_trace(
        {1: sets}, np.full((4, 1), MASKED), block_length=1, experts=4, requests=[0, 0, 1, 1], blocks=[0, 0, 1, 1]
    )
    row = fields(drift(trace, budgets=(1,)), "metric", "scope", "layer", "distance")["drift", "block", 1, 1]
    assert (row["value"], row["null_hot"], row["null_shuffle"]) == (0.0, 0.5, 1.0)
    assert 0.2 < row["null_independent"] < 0.8
    row = fields(cosine(trace), "scope", "layer", "distance")["block", 1, 1]
    assert (row["value"], row["null_shuffle"]) == (1.0, 0.0)
    assert row["null_hot"] == 2 / np.sqrt(8.0)
    assert row["beats_null"] is True


def test_more_requests_than_units_share_them():
    requests = UNITS + 5
    sets = np.zeros((requests * 2, 1, 1), int)
    states = np.full((requests * 2, 1), MASKED)
    trace = written_trace({1: sets}, states, block_length=1, experts=2, requests=np.arange(requests).repeat(2))
    result = consistency(trace, settings=Settings(replicates=20))
    assert result.summary["requests"] == requests
    assert any(f"{requests} requests are resampled in {UNITS} groups" in note for note in result.notes)
    assert result.frames["overlap"].filter(layer=1, state="all", metric="jaccard")["n"].to_list() == [requests]
    assert set(result.frames["load"]["load"]) == {2 * requests, 0}


@pytest.mark.parametrize(
    "wrong", [{"distances": 0}, {"level": 1.0}, {"budgets": (0,)}, {"windows": (-1,)}, {"seed": -1}, {"replicates": 0}]
)
def test_wrong_settings_are_refused_in_a_sentence(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Settings(**wrong)


def test_ordered_sum_adds_first_to_last():
    numbers = np.random.default_rng(0).random((300, 2)) * 10.0 ** np.arange(-150, 150)[:, None]
    assert ordered_sum(numbers, 0).tolist() == [add_up(numbers[:, 0].tolist()), add_up(numbers[:, 1].tolist())]
