"""Acceptance, its order, and confidence, against the definitions below."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.metrics import acceptance, calibration, confidence, order
from tests.analysis.naive_runs import QUICK, add_up, fields, naive_runs
from tests.made_up.runs import written_trace
from tests.made_up.strategies import traces
from tracer.schema import DECODED, MASKED


def naive_final(steps, length):
    """{offset: (step, token)} of each position's acceptance for good."""
    out = {}
    for j in range(length):
        marked = False
        for s, step in enumerate(steps):
            if j not in step or step[j][1] != "masked":
                continue
            tokens, row = step.segment.tokens, step[j][0]
            following = steps[s + 1].get(j) if s + 1 < len(steps) else None
            if tokens.accepted[row]:
                marked = True
                out[j] = s, int(tokens.predicted_id[row])
            elif following and following[1] == "known" and not marked:
                out[j] = s, int(steps[s + 1].segment.tokens.token_id[following[0]])
    return out


def naive_correlation(offsets, steps):
    """Spearman's correlation with average ranks; None for fewer than two points or equal steps."""

    def ranks(values):
        return [2 * sum(b < a for b in values) + sum(b == a for b in values) + 1 for a in values]

    n = len(offsets)
    x, y = ([r - (n + 1) for r in ranks(values)] for values in (offsets, steps))
    squares = sum(v * v for v in x), sum(v * v for v in y)
    if not all(squares):
        return None
    return sum(v * w for v, w in zip(x, y)) / math.sqrt(float(squares[0]) * float(squares[1]))


def naive_order(trace):
    """{metric: (value, n, null)}."""
    by_unit, taken, left, chance = defaultdict(list), 0, 0, defaultdict(list)
    units = []
    for unit, _, _, steps in naive_runs(trace):
        units.append(unit)
        final = naive_final(steps, trace.meta.block_length)
        offsets = sorted(final)
        value = naive_correlation(offsets, [final[j][0] for j in offsets]) if offsets else None
        if value is not None:
            by_unit[unit].append(value)
        for s, step in enumerate(steps):
            masked = sorted(j for j, row in step.items() if row[1] == "masked")
            chosen = {j for j in final if final[j][0] == s}
            taken += len(chosen)
            left += len(chosen & set(masked[: len(chosen)]))
            if chosen:
                chance[unit].append(len(chosen) * len(chosen) / len(masked))
    units = sorted(set(units))
    out = {}
    ranked = sum(len(found) for found in by_unit.values())
    if ranked:
        out["rank_correlation"] = add_up(add_up(by_unit[u]) for u in units) / ranked, ranked, 0.0
    if taken:
        out["left_to_right"] = left / taken, taken, add_up(add_up(chance[u]) for u in units) / taken
    return out


def naive_guesses(trace):
    """Masked rows with prediction, confidence and final token: [(steps before acceptance, confidence, right, unit)]."""
    out = []
    for unit, _, _, steps in naive_runs(trace):
        final = naive_final(steps, trace.meta.block_length)
        for s, step in enumerate(steps):
            for j, (row, state, _) in sorted(step.items()):
                tokens = step.segment.tokens
                guess, sure = int(tokens.predicted_id[row]), float(tokens.confidence[row])
                if state == "masked" and j in final and final[j][0] >= s and min(final[j][1], guess) >= 0 and sure >= 0:
                    out.append((final[j][0] - s, sure, guess == final[j][1], unit))
    return out


def summed(rows):
    """Sum of the confidence of rows, unit by unit."""
    by_unit = defaultdict(list)
    for _, sure, _, unit in rows:
        by_unit[unit].append(sure)
    return add_up(add_up(by_unit[unit]) for unit in sorted(by_unit))


def naive_error(rows, bins):
    """Mean over rows of the distance between a bin's share of final predictions and its mean confidence."""
    binned = [[row for row in rows if min(int(row[1] * bins), bins - 1) == b] for b in range(bins)]
    return add_up(abs(sum(right for _, _, right, _ in found) - summed(found)) for found in binned) / len(rows)


@settings(max_examples=60, deadline=None)
@given(traces())
def test_order_is_the_definition(trace):
    found = fields(order(trace, **QUICK), "metric")
    got = {key: (row["value"], row["n"], row["null_independent"]) for (key,), row in found.items()}
    assert got == (naive_order(trace) if routed(trace) else {})


def routed(trace):
    return any(segment.layer(layer).count.any() for segment in trace.segments() for layer in segment.layers)


@settings(max_examples=60, deadline=None)
@given(traces(), st.integers(1, 5), st.integers(1, 7))
def test_confidence_is_the_definition(trace, lags, bins):
    rows = naive_guesses(trace) if routed(trace) else []
    found = fields(confidence(trace, lags=lags, **QUICK), "steps_before")
    expected = {}
    for lag in range(lags + 1):
        if chosen := [row for row in rows if row[0] == lag]:
            changed = sum(not right for _, _, right, _ in chosen)
            expected[(lag,)] = changed / len(chosen), summed(chosen) / len(chosen), len(chosen)
    assert {key: (row["value"], row["confidence"], row["n"]) for key, row in found.items()} == expected
    frame = calibration(trace, bins=bins, **QUICK)
    found = fields(frame.filter(metric="final_share"), "rows", "bin")
    expected, errors = {}, {}
    for name, chosen in (("all", rows), ("waiting", [row for row in rows if row[0] > 0])):
        for b in (*range(bins), None):
            here = [row for row in chosen if b is None or min(int(row[1] * bins), bins - 1) == b]
            if here:
                expected[name, b] = sum(right for _, _, right, _ in here) / len(here), len(here)
                assert b is None or found[name, b]["confidence"] == summed(here) / len(here)
        if chosen:
            errors[(name,)] = naive_error(chosen, bins), len(chosen)
    assert {key: (row["value"], row["n"]) for key, row in found.items()} == expected
    found = fields(frame.filter(metric="calibration_error"), "rows")
    assert {key: (row["value"], row["n"]) for key, row in found.items()} == errors


@settings(max_examples=60, deadline=None)
@given(traces())
def test_acceptance_is_the_definition(trace):
    parts, accepted, blocks = Counter(), Counter(), 0
    for _, _, _, steps in naive_runs(trace):
        blocks += 1
        for step in steps:
            forwards = step.segment.forwards
            number = min(int(forwards.step[step.part]), trace.meta.block_length - 1)
            parts[number] += 1
            accepted[number] += int(forwards.num_accepted[step.part])
    expected = {("accepted_per_step", s): (accepted[s] / n, n) for s, n in parts.items()}
    expected["accepted_per_step", None] = accepted.total() / parts.total(), parts.total()
    expected["accepted_per_block", None] = accepted.total() / blocks, blocks
    expected["steps_per_block", None] = parts.total() / blocks, blocks
    found = fields(acceptance(trace, **QUICK), "metric", "step")
    got = {key: (row["value"], row["n"]) for key, row in found.items()}
    assert got == (expected if routed(trace) else {})


def decoded_in_order(picks, width, **arguments):
    """A block whose step s accepts the positions ``picks[s]``."""
    states = np.full((len(picks), width), MASKED)
    for s in range(1, len(picks)):
        states[s] = states[s - 1]
        states[s, picks[s - 1]] = DECODED
    sets = np.zeros((len(picks), width, 1), int)
    return written_trace({1: sets}, states, block_length=width, experts=2, **arguments)


def test_left_to_right_and_back():
    for picks, value, left in (([[0], [1], [2]], 1.0, 1.0), ([[2], [1], [0]], -1.0, 1 / 3)):
        found = fields(order(decoded_in_order(picks, 3)), "metric")
        assert found[("rank_correlation",)]["value"] == value
        assert found[("left_to_right",)]["value"] == left
        assert found[("left_to_right",)]["null_independent"] == float(Fraction(1, 3) + Fraction(1, 2) + 1) / 3


def test_a_guess_that_changes_and_its_calibration():
    # Position 0 says 7, then 9 and is accepted; position 1 says 4 and is accepted at once.
    trace = decoded_in_order([[1], [0]], 2, predicted=[[7, 4], [9, 4]], confidence=[[0.25, 0.75], [0.5, 1.0]])
    found = fields(confidence(trace), "steps_before")
    assert (found[(0,)]["value"], found[(0,)]["n"], found[(0,)]["confidence"]) == (0.0, 2, 0.625)
    assert (found[(1,)]["value"], found[(1,)]["n"], found[(1,)]["confidence"]) == (1.0, 1, 0.25)
    rows = fields(calibration(trace, bins=4), "metric", "rows", "bin")
    assert rows["final_share", "all", 1]["value"] == 0.0
    assert rows["final_share", "all", 1]["bin_low"] == 0.25
    assert rows["final_share", "all", 3]["value"] == 1.0
    assert rows["final_share", "waiting", None]["n"] == 1
    # |0 - .25| + |1 - .5| + |1 - .75| over three rows.
    assert rows["calibration_error", "all", None]["value"] == 1 / 3
