"""TIDE against sets and loops, its schedule case by case, and its published sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.registry import load_policy
from simulator.residency.tide import refreshes
from tests.made_up.tables import forward_table, geometry, stream_of
from tracer.errors import UserError
from tracer.schema import COMMIT, DECODE, DENOISE, PREFILL

E = 6
GIB = 1 << 30


def naive_refresh(part, first_block, interval, decoded):
    """Whether one request of a call asks for a refresh; ``decoded`` counts its decode forwards."""
    request, kind, block, step = part[:4]
    if kind == PREFILL:
        return True
    if kind == COMMIT:
        return False
    if kind == DECODE:
        step = decoded.get(request, 0)
        decoded[request] = step + 1
    first = first_block.get(request, -1)
    return (first >= 0 and block == first) or step % interval == 0


def naive_tide(calls, cells, first_block, budget, interval, experts=E):
    """Per cell: which experts hit by id, promotions, demotions; resident sets as Python sets."""
    resident, decoded, answers = set(range(min(budget, experts))), {}, []
    for call, rows in zip(calls, cells, strict=True):
        load = {}
        for row in rows:
            for e in row:
                load[e] = load.get(e, 0) + 1
        asked = [naive_refresh(part, first_block, interval, decoded) for part in call]
        promote, demote = [], []
        if any(asked):
            target = sorted(load, key=lambda e: (-load[e], e))[: min(budget, experts)]
            promote = [e for e in target if e not in resident]
            candidates = sorted(resident - set(target))
            demote = candidates[: len(promote)]
            resident = set(target) | set(candidates[len(promote) :])
        answers.append(({e for e in load if e in resident}, len(promote), len(demote), len(resident)))
    return answers


def of_run(run, policy):
    """The definition as the rule asks for it (tests/simulator/definitions.py)."""
    numbers = policy.budget, policy.refresh_interval
    answers = naive_tide(run.calls, run.cells, run.geometry.first_block, *numbers, run.geometry.num_experts)
    return [(hits, hits, *moved) for hits, *moved in answers]


NAIVE = {"tide:budget=3,refresh_interval=2": of_run, "tide:budget=6,refresh_interval=1": of_run}

rows = st.lists(
    st.permutations(range(E)).flatmap(lambda p: st.integers(0, 3).map(lambda k: p[:k])), min_size=1, max_size=4
)
parts = st.tuples(
    st.integers(0, 2),
    st.sampled_from([PREFILL, DENOISE, DENOISE, DENOISE, COMMIT, DECODE]),
    st.integers(-1, 2),
    st.integers(0, 5),
    st.just(1),
    st.just(0),
    st.just(0),
)
calls = st.lists(st.tuples(st.lists(parts, min_size=1, max_size=2), rows), min_size=1, max_size=12)


def answers_of(placement, stream):
    found = []
    for c in range(len(stream.cell_forward)):
        inside = slice(stream.offsets[c], stream.offsets[c + 1])
        hits = set(stream.experts[inside][placement.hit[inside]].tolist())
        found.append((hits, *(int(a[c]) for a in (placement.promotions, placement.demotions, placement.resident))))
    assert (placement.on_gpu == placement.hit).all()
    return found


@given(
    made=calls,
    first_block=st.dictionaries(st.integers(0, 2), st.integers(-1, 2)),
    budget=st.integers(0, E),
    interval=st.integers(1, 4),
    cut=st.integers(0, 12),
)
@settings(max_examples=150, deadline=None)
def test_tide_equals_the_naive_definition_however_the_trace_is_cut(made, first_block, budget, interval, cut):
    expected = naive_tide([call for call, _ in made], [cell for _, cell in made], first_block, budget, interval)
    policy = load_policy("residency", f"tide:budget={budget},refresh_interval={interval}")
    about = geometry(E, first_block=first_block)
    state, found = policy.start(about, 0), []
    for piece in (made[:cut], made[cut:]):
        if piece:
            stream = stream_of([cell for _, cell in piece])
            placement, state = policy.place(stream, forward_table([call for call, _ in piece]), about, state)
            found += answers_of(placement, stream)
            assert (placement.copied_back == placement.demotions).all()
    assert found == expected


def one(kind, block=0, step=0, request=0):
    return [(request, kind, block, step, 1, 0, 0)]


@pytest.mark.parametrize(
    ("call", "first_block", "interval", "wanted"),
    [
        (one(PREFILL, -1, -1), 5, 99, True),
        (one(COMMIT, 5, -1), 5, 1, False),
        (one(DENOISE, 5, 3), 5, 99, True),
        (one(DENOISE, 6, 3), 5, 99, False),
        (one(DENOISE, 6, 0), 5, 99, True),
        (one(DENOISE, 6, 4), 5, 2, True),
        (one(DENOISE, -1, 3), -1, 2, False),
        (one(DENOISE, 6, 3) + one(DENOISE, 6, 4, 1), 5, 4, True),
    ],
)
def test_the_schedule_case_by_case(call, first_block, interval, wanted):
    table = forward_table([call])
    assert refreshes(table, {0: first_block, 1: -1}, interval, {}).tolist() == [wanted]


def test_a_decode_forwards_step_is_its_index_in_the_request():
    table = forward_table([one(DECODE, -1, -1, request) for request in (0, 0, 1, 0, 1, 0, 1)])
    decoded = {}
    assert refreshes(table, {}, 3, decoded).tolist() == [True, False, True, False, False, True, False]
    assert decoded == {0: 4, 1: 3}
    assert refreshes(table, {}, 3, decoded).tolist()[:3] == [False, False, True]


def test_an_engine_with_a_host_copy_moves_nothing_back():
    cells, calls_made = [[[3, 4]], [[1, 2]]], [one(DENOISE), one(DENOISE)]
    stream, table, about = stream_of(cells), forward_table(calls_made), geometry(E)
    for copy_back, moved in ((True, [2, 2]), (False, [0, 0])):
        policy = load_policy("residency", f"tide:budget=2,copy_back={copy_back}")
        placement, _ = policy.place(stream, table, about, policy.start(about, 0))
        assert placement.demotions.tolist() == [2, 2]
        assert placement.copied_back.tolist() == moved


def test_surplus_residents_stay_where_fewer_experts_are_active_than_fit():
    # R = {0, 1, 2}; {4} is wanted: 4 enters, 0 leaves, 1 and 2 stay.
    policy, about = load_policy("residency", "tide:budget=3,refresh_interval=1"), geometry(E)
    stream = stream_of([[[4]], [[1, 2]], [[0]]])
    placement, state = policy.place(stream, forward_table([one(DENOISE)] * 3), about, policy.start(about, 0))
    assert placement.hit.tolist() == [True] * 4
    assert placement.promotions.tolist() == [1, 0, 1]
    assert np.flatnonzero(state[0]).tolist() == [0, 2, 4]


def test_a_refresh_interval_below_one_is_refused():
    with pytest.raises(UserError, match="refresh_interval=0"):
        load_policy("residency", "tide:budget=1,refresh_interval=0")


@pytest.mark.parametrize(
    ("budget", "layers", "hidden", "inter", "gib", "published"),
    [
        (128, 19, 2048, 512, 14.25, 14.25),
        (64, 19, 2048, 512, 7.125, 7.1),
        (64, 31, 4096, 1024, 46.5, 46.5),
        (32, 31, 4096, 1024, 23.25, 23.3),
    ],
)
def test_expert_bytes_of_the_published_rows(budget, layers, hidden, inter, gib, published):
    size = 3 * hidden * inter * 2
    about = geometry(256, layers=range(1, 1 + layers), expert_bytes=dict.fromkeys(range(1, 1 + layers), size))
    held = load_policy("residency", f"tide:budget={budget}").total_bytes(about)
    assert held == gib * GIB
    assert abs(gib - published) <= 0.05 + 1e-9


@given(vram=st.floats(0.5, 80), dense=st.integers(0, 8 * GIB), cap=st.none() | st.integers(0, 256))
@settings(max_examples=80, deadline=None)
def test_budget_from_memory_is_the_released_formula(vram, dense, cap):
    size, layers = 6 << 20, 19
    about = geometry(256, layers=range(layers), expert_bytes=dict.fromkeys(range(layers), size), dense_bytes=dense)
    total = int(vram * GIB)
    reserve = max(int(1.5 * GIB), int(0.1 * total))
    expected = min(256 if cap is None else cap, 256, max(0, total - dense - reserve) // (size * layers))
    limit = "" if cap is None else f",budget={cap}"
    for memory in (f"vram_gib={vram!r}", f"vram={total}", f"vram={total}B,vram_gib=80"):
        assert load_policy("residency", f"tide:{memory}{limit}").experts_per_layer(about, 3) == expected
    for hold, staging in (("budget", size), ("batch", 0)):
        left = max(0, total - staging - dense - reserve) // (size * layers)
        spec = f"lru:vram={total},hold={hold}{limit}"
        assert load_policy("residency", spec).experts_per_layer(about, 3) == min(256 if cap is None else cap, left)


def test_budget_from_memory_needs_the_bytes_of_the_other_weights():
    with pytest.raises(UserError, match="dense_bytes"):
        load_policy("residency", "tide:vram_gib=24").start(geometry(E), 0)
