"""all_resident, none_resident and static against sets."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.registry import load_policy
from tests.made_up.tables import geometry, plain_forwards, stream_of
from tracer.errors import UserError

E = 6

rows = st.lists(st.permutations(range(E)).flatmap(lambda p: st.integers(0, 3).map(lambda k: p[:k])), max_size=3)
traces = st.lists(rows, min_size=1, max_size=10)


def naive_residents(name, cells, budget, experts=E):
    """all_resident, none_resident and static as sets of experts."""
    if name == "all_resident":
        return set(range(experts))
    if name == "none_resident":
        return set()
    load = dict.fromkeys(range(experts), 0)
    for rows in cells:
        for row in rows:
            for e in row:
                load[e] += 1
    return set(sorted(load, key=lambda e: (-load[e], e))[:budget])


def of_run(run, policy):
    """The definition as the rule asks for it (tests/simulator/definitions.py)."""
    name = type(policy).__module__.rpartition(".")[2]
    resident, cells = naive_residents(name, run.cells, policy.budget, run.geometry.num_experts), []
    for rows in run.cells:
        hits = {e for row in rows for e in row} & resident
        cells.append((hits, hits, 0, 0, len(resident)))
    return cells


NAIVE = dict.fromkeys(("all_resident", "none_resident", "static:budget=3"), of_run)


@pytest.mark.parametrize("name", ["all_resident", "none_resident", "static"])
@given(cells=traces, budget=st.integers(0, E), cut=st.integers(0, 10))
@settings(max_examples=60, deadline=None)
def test_sets_that_never_change(name, cells, budget, cut):
    spec = f"static:budget={budget}" if name == "static" else name
    policy, about = load_policy("residency", spec), geometry(E)
    resident = naive_residents(name, cells, budget)
    streams = [stream_of(piece) for piece in (cells[:cut], cells[cut:])]
    state = policy.fit(iter(streams), about, 0) if policy.passes == 2 else policy.start(about, 0)
    for stream in streams:
        placement, state = policy.place(stream, plain_forwards([[]] * len(stream.cell_forward)), about, state)
        assert placement.hit.tolist() == placement.on_gpu.tolist() == [e in resident for e in stream.experts.tolist()]
        assert not placement.promotions.any() and not placement.demotions.any() and not placement.copied_back.any()
        assert placement.resident.tolist() == [len(resident)] * len(stream.cell_forward)


def test_static_without_a_look_at_the_run_takes_the_first_experts():
    assert load_policy("residency", "static:budget=2").start(geometry(E), 0).tolist() == [True, True] + [False] * 4


def test_all_resident_says_when_the_budget_is_too_small():
    with pytest.raises(UserError, match=r"needs all 6 experts .* holds 5"):
        load_policy("residency", "all_resident:budget=5").start(geometry(E), 0)
    assert load_policy("residency", "all_resident:budget=6").start(geometry(E), 0).all()


@pytest.mark.parametrize("value", ["budget=-1", "budget_bytes=-5", "vram_gib=nan", "vram_gib=-2"])
def test_negative_budgets_are_refused(value):
    with pytest.raises(UserError, match="is no amount of memory"):
        load_policy("residency", f"static:{value}")
