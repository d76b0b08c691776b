"""Overlap between steps and settling after acceptance, against the definitions below."""

from __future__ import annotations

from collections import defaultdict
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.metrics import consistency, overlap, settling
from analysis.metrics.kernels.sets import shared_words
from tests.analysis.naive_runs import QUICK, add_up, fields, naive_runs
from tests.made_up.runs import written_trace
from tests.made_up.strategies import traces
from tracer.parquet import open_trace
from tracer.schema import DECODED, MASKED
from tracer.synthetic import SyntheticOptions, write_synthetic

STATES = ("masked", "accepted", "remasked", "decoded")
REFERENCES = ("previous", "accepting", "first_known", "final")


def naive_overlap(trace, distances):
    """{(metric, layer, state, distance): (value, n)}: means over pairs of rows, kept as a ratio of sums."""
    rows = defaultdict(list)
    units = set()
    for unit, _, _, steps in naive_runs(trace):
        units.add(unit)
        for s, later in enumerate(steps):
            for j, (_, state, sets) in sorted(later.items()):
                for d in range(1, min(distances, s) + 1):
                    if j not in steps[s - d]:
                        continue
                    _, state_before, before = steps[s - d][j]
                    kind = {
                        ("masked", "masked"): "masked",
                        ("masked", "known"): "accepted",
                        ("known", "masked"): "remasked",
                        ("known", "known"): "decoded",
                    }[state_before, state]
                    for layer in trace.meta.model.moe_layers:
                        a, b = before.get(layer), sets.get(layer)
                        if a and b:
                            row = (1, len(a & b) / len(a | b), len(a & b), len(a), int(a == b))
                            rows[unit, layer, kind, d].append(row)

    def sums(unit, layer, kind, d):
        if kind == "all":
            return np.array(add_up(sums(unit, layer, one, d) for one in STATES))
        if layer is None:
            return np.array(add_up(sums(unit, one, kind, d) for one in trace.meta.model.moe_layers))
        found = rows.get((unit, layer, kind, d), [])
        return np.array([add_up(row[column] for row in found) for column in range(5)], np.float64)

    out = {}
    for layer in (*trace.meta.model.moe_layers, None):
        for kind in ("all", *STATES):
            for d in range(1, distances + 1):
                total = add_up(sums(unit, layer, kind, d) for unit in sorted(units))
                if total[0]:
                    n, jaccard, kept, before, same = total
                    out["jaccard", layer, kind, d] = jaccard / n, n
                    out["kept", layer, kind, d] = kept / before, n
                    out["unchanged", layer, kind, d] = same / n, n
    return out


def naive_settling(trace, lags):
    """{(layer, reference, lag): (mean Jaccard, n)}."""
    rows = defaultdict(list)
    units = set()
    for unit, _, _, steps in naive_runs(trace):
        units.add(unit)
        for j in range(trace.meta.block_length):
            states = [step[j][1] if j in step else None for step in steps]
            for a in range(len(steps) - 1):
                if states[a : a + 2] != ["masked", "known"]:
                    continue
                after = a + 1
                while after + 1 < len(steps) and states[after + 1] == "known":
                    after += 1
                for lag in range(min(lags, after - a) + 1):
                    p = a + lag
                    held = {"previous": p - 1 if p and states[p - 1] else None}
                    held["accepting"] = a if lag > 0 else None
                    held["first_known"] = a + 1 if lag > 1 else None
                    held["final"] = after if p < after else None
                    for reference, q in held.items():
                        for layer in trace.meta.model.moe_layers if q is not None else ():
                            x, y = steps[p][j][2].get(layer), steps[q][j][2].get(layer)
                            if x and y:
                                rows[unit, layer, reference, lag].append(len(x & y) / len(x | y))
    layers = trace.meta.model.moe_layers
    out = {}
    for reference in REFERENCES:
        for lag in range(lags + 1):
            for layer in (*layers, None):
                chosen = layers if layer is None else (layer,)
                by_unit = [[rows.get((unit, one, reference, lag), []) for one in chosen] for unit in sorted(units)]
                n = sum(len(found) for unit in by_unit for found in unit)
                if n:
                    total = add_up(add_up(add_up(found) for found in unit) for unit in by_unit)
                    out[layer, reference, lag] = total / n, n
    return out


@settings(max_examples=60, deadline=None)
@given(traces(), st.integers(1, 8))
def test_overlap_is_the_definition(trace, distances):
    frame = overlap(trace, distances=distances, **QUICK)
    found = fields(frame, "metric", "layer", "state", "distance")
    assert {key: (row["value"], row["n"]) for key, row in found.items()} == naive_overlap(trace, distances)


@settings(max_examples=60, deadline=None)
@given(traces(), st.integers(1, 4))
def test_settling_is_the_definition(trace, lags):
    frame = settling(trace, lags=lags, **QUICK)
    found = fields(frame, "layer", "reference", "lag")
    assert {key: (row["value"], row["n"]) for key, row in found.items()} == naive_settling(trace, lags)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(8, 256), st.integers(1, 20))
def test_words_share_what_their_sets_share(seed, experts, rows):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(experts)[:8] for _ in range(2 * rows)]).astype(np.uint8).reshape(2, rows, 8)
    ids[1, 0] = rng.permutation(ids[0, 0])
    shared = np.zeros(rows, np.uint8)
    shared_words(ids[0].view(np.uint64)[:, 0], ids[1].view(np.uint64)[:, 0], shared)
    assert shared.tolist() == [len(set(a) & set(b)) for a, b in zip(ids[0].tolist(), ids[1].tolist(), strict=True)]


def test_overlap_of_a_stored_trace(tmp_path):
    path = write_synthetic(
        tmp_path / "small.trace",
        SyntheticOptions(experts=32, layers=2, blocks=2, block_length=6, prompt_tokens=8, groups=1, topk_group=1),
    )
    trace = open_trace(path)
    found = fields(overlap(trace), "metric", "layer", "state", "distance")
    expected = naive_overlap(trace, 8)
    assert {key: (row["value"], row["n"]) for key, row in found.items()} == expected
    assert expected["jaccard", 1, "all", 1][0] > 0.5


def frozen(requests=3, blocks=2, steps=5, width=4):
    """Every position keeps its set through its block; sets differ between positions and blocks."""
    rng = np.random.default_rng(0)
    forwards = requests * blocks * steps
    sets = np.concatenate(
        [
            np.repeat(np.stack([rng.permutation(40)[:3] for _ in range(width)])[None], steps, 0)
            for _ in range(requests * blocks)
        ]
    )
    states = np.full((forwards, width), MASKED)
    for f in range(forwards):
        states[f, : f % steps] = DECODED
    return written_trace(
        {1: sets},
        states,
        block_length=width,
        experts=40,
        requests=np.repeat(np.arange(requests), blocks * steps),
        blocks=np.tile(np.repeat(np.arange(blocks), steps), requests),
    )


def test_frozen_routing_overlaps_wholly_and_beats_its_nulls():
    frame = overlap(frozen())
    assert frame["value"].to_list() == [1.0] * frame.height
    assert frame["low"].to_list() == [1.0] * frame.height
    assert frame.filter(state="all")["beats_null"].all()
    assert set(frame["state"]) == {"all", "masked", "accepted", "decoded"}
    assert set(settling(frozen())["value"]) == {1.0}


def independent(requests=60, experts=12, top_k=3, width=8, steps=6):
    rng = np.random.default_rng(1)
    shape = (requests * steps, width)
    sets = np.stack([rng.permutation(experts)[:top_k] for _ in range(shape[0] * width)]).reshape(*shape, top_k)
    states = np.full(shape, MASKED)
    return written_trace(
        {1: sets}, states, block_length=width, experts=experts, requests=np.repeat(np.arange(requests), steps)
    )


def test_independent_routing_is_what_chance_gives():
    experts, top_k = 12, 3
    chance = sum(
        comb(top_k, o) * comb(experts - top_k, top_k - o) / comb(experts, top_k) * o / (2 * top_k - o)
        for o in range(top_k + 1)
    )
    rows = overlap(independent(), distances=2, level=0.999).filter(layer=1, state="all", metric="jaccard")
    for row in rows.iter_rows(named=True):
        assert row["low"] < chance < row["high"]
        assert not row["beats_null"]
        # Of 4096 random pairs, four standard errors of a Jaccard that is at most 1.
        assert abs(row["null_independent"] - chance) < 4 * 0.5 / 64


def test_intervals_and_figures_do_not_depend_on_the_cut():
    forwards = 36
    rng = np.random.default_rng(5)
    shape = (forwards, 4)
    sets = np.stack([rng.permutation(9)[:2] for _ in range(forwards * 4)]).reshape(*shape, 2)
    states = rng.choice([DECODED, MASKED], shape)
    blocks = np.arange(forwards) // 4
    arguments = {"block_length": 4, "experts": 9, "requests": blocks // 3, "blocks": blocks % 3 + 1}
    bounds = np.flatnonzero(np.diff(blocks)) + 1
    one = consistency(written_trace({1: sets}, states, **arguments))
    many = consistency(written_trace({1: sets}, states, cut=bounds.tolist(), **arguments))
    assert one.frames.keys() == many.frames.keys()
    for name, frame in one.frames.items():
        assert frame.equals(many.frames[name]), name


@pytest.mark.parametrize("figure", [overlap, settling])
def test_one_forward_a_block_gives_an_empty_frame(figure):
    trace = written_trace(
        {1: np.zeros((2, 3, 1), int)}, np.full((2, 3), MASKED), block_length=3, experts=4, blocks=[0, 1]
    )
    assert figure(trace).height == 0
