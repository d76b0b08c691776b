"""Popularity across recordings of one model, against the definition below."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.metrics import SEEDS_COLUMNS, Settings, across_seeds, consistency
from analysis.metrics.shared.settings import UNITS
from tests.analysis.naive_runs import QUICK, add_up, fields
from tests.analysis.test_metrics_layers import naive_loads, naive_measures
from tests.made_up.runs import decoded_trace, written_trace
from tracer.errors import UserError
from tracer.schema import MASKED

METRICS = ("cosine", "rank_correlation", "top_overlap")
NULLS = ("null_hot", "null_independent", "null_shuffle")


def mean(numbers):
    """Mean of those that are there; None of none."""
    known = [number for number in numbers if number is not None]
    return add_up(known) / len(known) if known else None


def permuted(a, b, size):
    """What the measures are on average over all ways to permute the labels of one of the loads."""
    if not any(a) or not any(b):
        return None, None, None
    norms = [math.sqrt(sum(x * x for x in load)) for load in (a, b)]
    even = sum(a) * sum(b) / len(a) / (norms[0] * norms[1])
    held = [min(size, sum(x > 0 for x in load)) for load in (a, b)]
    return even, 0.0, held[0] * held[1] / len(a) / size


def naive_seeds(recordings):
    """{(metric, between, first, second, layer): (value, null hot, independent, shuffle, n)} of {name: trace}."""
    experts = next(iter(recordings.values())).meta.model.num_experts
    layers = next(iter(recordings.values())).meta.model.moe_layers
    size = max(1, experts // 4)
    loads = {name: naive_loads(trace) for name, trace in recordings.items()}
    totals = {
        name: {layer: [sum(mine[layer][e] for mine in units.values()) for e in range(experts)] for layer in layers}
        for name, units in loads.items()
    }
    # The requests of these traces are numbered from 0 in order of appearance, so that a unit is a request.
    prompts = {name: trace.requests.rows() for name, trace in recordings.items()}
    out = {}
    pairs = list(combinations(recordings, 2))
    for place, metric in enumerate(METRICS):
        found = {"traces": {}, "prompts": {}}
        for a, b in pairs:
            shared = [(i, prompts[b].index(prompt)) for i, prompt in enumerate(prompts[a]) if prompt in prompts[b]]
            for layer in layers:
                one, other = totals[a][layer], totals[b][layer]
                value, chance = (of(one, other, size)[place] for of in (naive_measures, permuted))
                found["traces"][a, b, layer] = (
                    value,
                    None,
                    None,
                    chance if value is not None else None,
                    int(value is not None),
                )
                x = [loads[a][i][layer] for i, _ in shared]
                y = [loads[b][j][layer] for _, j in shared]
                own = [naive_measures(p, q, size)[place] for p, q in zip(x, y)]
                strangers = [
                    naive_measures(p, q, size)[place] for i, p in enumerate(x) for j, q in enumerate(y) if i != j
                ]
                rest = [
                    naive_measures(p, [t - n for t, n in zip(total, q)], size)[place]
                    for mine, theirs, total in ((x, y, other), (y, x, one))
                    for p, q in zip(mine, theirs)
                ]
                labels = [permuted(p, q, size)[place] for p, q in zip(x, y)]
                n = sum(value is not None for value in own)
                found["prompts"][a, b, layer] = mean(own), mean(rest), mean(strangers), mean(labels), n
        for between, rows in found.items():
            for a, b in pairs:
                mine = [rows[a, b, layer] for layer in layers]
                rows[a, b, None] = (*(mean(row[k] for row in mine) for k in range(4)), max(row[4] for row in mine))
            for layer in (*layers, None):
                mine = [rows[a, b, layer] for a, b in pairs]
                n = (sum if between == "traces" else max)(row[4] for row in mine)
                rows[None, None, layer] = (*(mean(row[k] for row in mine) for k in range(4)), n)
            out |= {(metric, between, *key): row for key, row in rows.items() if row[4]}
    return out


@st.composite
def recordings(draw):
    """Two or three recordings of one made up model, of some of the same prompts."""
    shape = {
        "experts": draw(st.sampled_from([3, 5, 9])),
        "top_k": draw(st.integers(1, 3)),
        "layers": draw(st.integers(1, 2)),
        "block_length": draw(st.integers(1, 4)),
    }
    names = ("a", "b", "c")[: draw(st.integers(2, 3))]
    made = {}
    for name in names:
        requests = draw(st.integers(1, 3))
        trace = decoded_trace(draw(st.integers(0, 2**32 - 1)), requests=requests, blocks=1, **shape)
        datasets = [draw(st.sampled_from(["maths", "code"])) for _ in range(requests)]
        told = trace.requests.with_columns(pl.Series("dataset", datasets, dtype=pl.String))
        made[name] = replace(trace, requests=told)
    return made


@settings(max_examples=60, deadline=None)
@given(recordings())
def test_agreement_across_recordings_is_the_definition(made):
    frame = across_seeds(made, **QUICK)
    assert dict(frame.schema) == SEEDS_COLUMNS
    found = fields(frame, "metric", "between", "first", "second", "layer")
    got = {key: (row["value"], *(row[null] for null in NULLS), row["n"]) for key, row in found.items()}
    assert got == naive_seeds(made)


def prompts_of_their_own(seed, requests=6, steps=4, width=4, experts=24, shift=0):
    """Each prompt keeps to three experts of its own, with a little noise; ``shift`` moves every expert's number."""
    rng = np.random.default_rng(seed)
    own = np.random.default_rng(0).permutation(experts)[: 3 * requests].reshape(requests, 3)
    which = np.arange(requests * steps) // steps
    sets = own[which][:, None, :].repeat(width, 1)
    noise = rng.random((len(sets), width)) < 0.2
    sets[noise, 0] = rng.integers(0, experts, noise.sum())
    for row in sets.reshape(-1, 3):
        while len(set(row.tolist())) < 3:
            row[0] = rng.integers(0, experts)
    states = np.full((len(sets), width), MASKED)
    return written_trace({1: (sets + shift) % experts}, states, block_length=width, experts=experts, requests=which)


def test_a_recording_agrees_wholly_with_itself():
    trace = prompts_of_their_own(1)
    frame = across_seeds({"one": trace, "other": consistency(trace, settings=Settings(**QUICK))})
    assert set(frame["first"]) == {None, "one"} and set(frame["between"]) == {"traces", "prompts"}
    # A prompt that uses fewer experts than a quarter of them cannot fill the top set: its overlap is below 1.
    for row in frame.filter(pl.col("metric") != "top_overlap").iter_rows(named=True):
        # The same prompts are resampled together, so no resample tells the two apart.
        assert all(math.isclose(row[name], 1, rel_tol=1e-12) for name in ("value", "low", "high"))


def test_prompts_with_experts_of_their_own_beat_every_null():
    frame = across_seeds({"one": prompts_of_their_own(1), "other": prompts_of_their_own(2)})
    for row in frame.filter(between="prompts").iter_rows(named=True):
        assert row["n"] == 6
        assert row["low"] > max(row[null] for null in NULLS) and row["beats_null"] is True
    whole = frame.filter(between="traces", metric="cosine", layer=1, first="one").row(0, named=True)
    assert whole["low"] > whole["null_shuffle"] and whole["null_hot"] is None


def independent(seed, requests=40, experts=16, top_k=4, forwards=2, width=4):
    rng = np.random.default_rng(seed)
    rows = requests * forwards * width
    sets = np.stack([rng.permutation(experts)[:top_k] for _ in range(rows)]).reshape(-1, width, top_k)
    states = np.full((len(sets), width), MASKED)
    which = np.arange(len(sets)) // forwards
    return written_trace({1: sets}, states, block_length=width, experts=experts, requests=which)


def test_independent_recordings_agree_as_chance_has_it():
    frame = across_seeds({"one": independent(1), "other": independent(3)}, level=0.999)
    rows = fields(frame.filter(first="one", layer=1), "metric", "between")
    chance = {"rank_correlation": 0.0, "top_overlap": 0.25}
    for metric, value in chance.items():
        row = rows[metric, "prompts"]
        assert row["null_shuffle"] == value and row["low"] < value < row["high"]
        assert row["beats_null"] is False
    # Whatever its labels, a load of nonnegative counts has a cosine with another: the null says how much.
    row = rows["cosine", "prompts"]
    assert row["low"] < row["null_shuffle"] < row["high"] and row["beats_null"] is False


def test_prompts_are_matched_by_number_dataset_length_and_text():
    trace = prompts_of_their_own(1)
    other = trace.requests.with_columns(pl.Series("dataset", ["else"] * 3 + [None] * 3, dtype=pl.String))
    frame = across_seeds({"one": trace, "other": replace(trace, requests=other)})
    assert frame.filter(between="prompts")["n"].unique().to_list() == [3]
    longer = trace.requests.with_columns(pl.lit(7).alias("prompt_tokens"))
    frame = across_seeds({"one": trace, "other": replace(trace, requests=longer)})
    assert set(frame["between"]) == {"traces"}
    unnamed = replace(trace, requests=trace.requests.clear())
    assert set(across_seeds({"one": unnamed, "other": unnamed})["between"]) == {"traces"}


def test_one_request_each_has_figures_without_intervals():
    frame = across_seeds({"one": prompts_of_their_own(1, requests=1), "other": prompts_of_their_own(2, requests=1)})
    assert frame["value"].null_count() == 0 and frame["low"].null_count() == frame.height
    assert frame["beats_null"].null_count() == frame.height


def test_what_cannot_be_compared_is_refused_in_a_sentence():
    trace = prompts_of_their_own(1)
    with pytest.raises(UserError, match="at least two traces"):
        across_seeds({"one": trace})
    with pytest.raises(UserError, match="other and one differ in MoE layers, experts"):
        across_seeds({"one": trace, "other": prompts_of_their_own(1, experts=30)})
    silent = written_trace({1: np.full((1, 2, 3), -1)}, np.full((1, 2), MASKED), block_length=2, experts=24)
    with pytest.raises(UserError, match="other routes nothing"):
        across_seeds({"one": trace, "other": silent})


def test_more_requests_than_units_are_compared_as_a_whole_only():
    many = prompts_of_their_own(1, requests=UNITS + 3, steps=1, width=1, experts=3 * (UNITS + 3))
    frame = across_seeds({"one": many, "other": many}, replicates=5)
    assert set(frame["between"]) == {"traces"} and frame["low"].null_count() == 0
