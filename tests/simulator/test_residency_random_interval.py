"""random_interval against sets and loops, and what its lags depend on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.registry import load_policy
from simulator.residency.random_interval import RandomInterval
from simulator.residency.tide import Tide
from tests.made_up.tables import forward_table, geometry, stream_of
from tracer.errors import UserError
from tracer.schema import COMMIT, DECODE, DENOISE, PREFILL

E, BITS = 6, (1 << 64) - 1


def naive_mix(number):
    """SplitMix64's output in Python's integers."""
    number = (number + 0x9E3779B97F4A7C15) & BITS
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & BITS
    return number ^ (number >> 31)


def naive_lag(seed, request, block, step, longest):
    """Steps from a refresh to the next."""
    return 1 + naive_mix(naive_mix(naive_mix(naive_mix(seed) ^ request) ^ (block & BITS)) ^ step) % longest


def naive_refreshes(calls, first_block, seed, longest):
    """Which calls refresh: each request keeps the step its next one is due at, anew in every block."""
    decoded, due, flags = {}, {}, []
    for call in calls:
        asked = False
        for request, kind, block, step, *_ in call:
            if kind in (PREFILL, COMMIT):
                asked |= kind == PREFILL
                continue
            if kind == DECODE:
                step = decoded.get(request, 0)
                decoded[request] = step + 1
            in_first = first_block.get(request, -1) >= 0 and block == first_block[request]
            last_block, next_step = due.get(request, (None, 0))
            if in_first or step == 0 or block != last_block or step >= next_step:
                asked = True
                due[request] = (block, step + naive_lag(seed, request, block, step, longest))
        flags.append(bool(asked))
    return flags


def naive_tide(flags, cells, budget):
    """Per cell: experts that hit, promotions."""
    resident, answers = set(range(budget)), []
    for refresh, rows in zip(flags, cells, strict=True):
        load = {}
        for row in rows:
            for e in row:
                load[e] = load.get(e, 0) + 1
        promote = []
        if refresh:
            target = sorted(load, key=lambda e: (-load[e], e))[:budget]
            promote = [e for e in target if e not in resident]
            resident = resident - set(sorted(resident - set(target))[: len(promote)]) | set(promote)
        answers.append((resident & set(load), len(promote)))
    return answers


def of_run(run, policy):
    """The definition as the rule asks for it (tests/simulator/definitions.py)."""
    flags = naive_refreshes(run.calls, run.geometry.first_block, policy.seed, policy.max_interval)
    answers = naive_tide(flags, run.cells, policy.budget)
    return [(hits, hits, moved, moved, policy.budget) for hits, moved in answers]


NAIVE = {"random_interval:budget=3,max_interval=4": of_run, "random_interval:budget=5,max_interval=2,seed=9": of_run}

rows = st.lists(
    st.permutations(range(E)).flatmap(lambda p: st.integers(0, 3).map(lambda k: p[:k])), min_size=1, max_size=4
)
parts = st.tuples(
    st.sampled_from([0, 1, 4_000_000_000]),
    st.sampled_from([PREFILL, DENOISE, DENOISE, DENOISE, DENOISE, COMMIT, DECODE]),
    st.integers(-1, 2),
    st.integers(0, 6),
)
calls = st.lists(st.tuples(st.lists(parts, min_size=1, max_size=2, unique_by=lambda p: p[0]), rows), max_size=16)


@given(
    calls=calls,
    first_block=st.dictionaries(st.integers(0, 1), st.integers(-1, 2)),
    budget=st.integers(0, E),
    longest=st.integers(1, 5),
    seed=st.sampled_from([0, 1, (1 << 63) - 1]),
    cut=st.integers(0, 16),
)
@settings(max_examples=120, deadline=None)
def test_placements_equal_sets_and_loops_however_the_trace_is_cut(calls, first_block, budget, longest, seed, cut):
    made = [[(*part, len(rows), 0, 0) for part in call] for call, rows in calls]
    cells = [rows for _, rows in calls]
    policy = RandomInterval(budget=budget, max_interval=longest, seed=seed)
    about = geometry(E, first_block=first_block)
    state = policy.start(about, 0)
    expected = iter(naive_tide(naive_refreshes(made, first_block, seed, longest), cells, budget))
    for piece in (slice(None, cut), slice(cut, None)):
        stream = stream_of(cells[piece])
        placement, state = policy.place(stream, forward_table(made[piece]), about, state)
        assert (placement.on_gpu == placement.hit).all()
        assert (placement.promotions == placement.demotions).all()
        assert (placement.promotions == placement.copied_back).all()
        assert (placement.resident == budget).all()
        for c in range(len(stream.cell_forward)):
            cell = slice(stream.offsets[c], stream.offsets[c + 1])
            hit, promoted = next(expected)
            assert set(stream.experts[cell][placement.hit[cell]].tolist()) == hit
            assert placement.promotions[c] == promoted


def block_calls(blocks=40, steps=32, request=0):
    return [[(request, DENOISE, block, step, 1, 0, 0)] for block in range(blocks) for step in range(steps)]


def test_lags_take_every_value_up_to_the_largest_about_equally_often():
    table = forward_table(block_calls(200, 64))
    flags = RandomInterval(budget=1, max_interval=4).refreshes(table, {}, {}).reshape(200, 64)
    assert flags[:, 0].all()
    lags = np.concatenate([np.diff(np.flatnonzero(block)) for block in flags])
    found = np.bincount(lags, minlength=6)
    assert found[0] == found[5] == 0
    assert (abs(found[1:5] / len(lags) - 0.25) < 0.02).all()


def test_seeds_requests_and_blocks_draw_apart():
    def drawn(seed, request):
        policy = RandomInterval(budget=1, max_interval=8, seed=seed)
        return policy.refreshes(forward_table(block_calls(2, 32, request)), {}, {}).tolist()

    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(0, 0) != drawn(1, 0) and drawn(0, 0) != drawn(0, 1)
    assert drawn(0, 0)[:32] != drawn(0, 0)[32:]


def test_a_largest_lag_of_one_is_tide_refreshing_every_step():
    calls = block_calls(3, 5)
    rng = np.random.default_rng(0)
    stream = stream_of([[rng.permutation(E)[:2].tolist() for _ in range(4)] for _ in calls])
    about, answers = geometry(E, first_block={0: 1}), []
    for policy in (RandomInterval(budget=3, max_interval=1), Tide(budget=3, refresh_interval=1)):
        answers.append(policy.place(stream, forward_table(calls), about, policy.start(about, 0))[0])
    for name in ("hit", "promotions", "copied_back"):
        assert (getattr(answers[0], name) == getattr(answers[1], name)).all()


def test_without_copying_back_nothing_crosses_the_bus_again():
    policy = load_policy("residency", "random_interval:budget=1,seed=3,copy_back=false")
    placement, _ = policy.place(
        stream_of([[[1]], [[2]]]), forward_table(block_calls(2, 1)), geometry(E), policy.start(geometry(E), 0)
    )
    assert placement.promotions.tolist() == placement.demotions.tolist() == [1, 1]
    assert placement.copied_back.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [("max_interval=0", "max_interval=0 is no interval"), ("seed=-1", "seed=-1 is no seed")],
)
def test_parameters_out_of_range_are_refused(spec, reason):
    with pytest.raises(UserError, match=reason):
        load_policy("residency", f"random_interval:budget=1,{spec}")
