"""What holds for every policy the registry finds, with no list to edit: a new file is tested as soon as it is there."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.registry import load_policy, policy_names
from simulator.replaying import replay
from tests.made_up.changes import joined
from tests.made_up.routers import router
from tests.made_up.runs import block_run, random_trace
from tests.made_up.tables import MemoryTrace, geometry, meta_of, plain_forwards, stream_of
from tracer.errors import UserError
from tracer.schema import DENOISE

E, K, BUDGET = 60, 4, 9


@pytest.fixture(scope="module")
def trace():
    """Two segments of decoding with scores of every expert; commit forwards, a prompt tail, everything vanilla."""
    rng = np.random.default_rng(7)
    specs = {layer: router(rng, num_experts=E, top_k=K) for layer in (1, 2)}
    pieces, first_block, first = [], {}, 0
    for request in range(2):
        piece, found = block_run(rng, blocks=2, prompt=6, block_length=4, specs=specs, first_forward=first)
        first += piece.forwards.num_forwards
        table = replace(piece.forwards, request_id=np.full_like(piece.forwards.request_id, request))
        pieces.append(replace(piece, forwards=table))
        first_block[request] = found[0]
    meta = meta_of(specs, block_length=4)
    meta.decoding.update(steps=4, threshold=0.95, mask_id=1, loop="sdar")
    return MemoryTrace(meta, first_block, pieces)


def budgeted(name, budget):
    """A residency spec with a budget where it takes one that limits it."""
    return name if name in ("all_resident", "none_resident") else f"{name}:budget={budget}"


@pytest.mark.parametrize("name", policy_names("routing"))
def test_every_routing_policy_stays_within_the_model(name, trace):
    result = replay(trace, ["vanilla", name])
    own = result.cells.filter(pl.col("run") == 1)
    rows = (
        result.forwards.filter(pl.col("run") == 1).group_by("forward_id").agg(pl.col("num_tokens").sum().alias("rows"))
    )
    cells = own.join(rows, on="forward_id")
    assert len(cells) == len(own) > 0
    bound = pl.min_horizontal(pl.lit(E), pl.col("rows") * (E if name == "expert_choice" else K))
    assert cells.select((pl.col("unique_experts") <= bound).all()).item()
    assert cells.select((pl.col("unique_experts") <= pl.col("assignments")).all()).item()
    assert cells.select((pl.col("unique_experts_block") <= pl.col("unique_experts")).all()).item()
    assert cells["gate_retained"].is_between(0, 1 + 1e-6).all()
    run = result.runs[1]
    assert run.estimate == (name != "vanilla")
    assert run.bounds is None or set(run.bounds) == {"tokens_per_forward", "unique_experts"}
    assert any("open loop" in note for note in run.notes) == (name != "vanilla")
    assert any("training-free" in note for note in run.notes) == (name == "dmoe")


@pytest.mark.parametrize("name", policy_names("routing"))
def test_every_routing_policy_gives_the_same_answer_segment_by_segment(name, trace):
    several, one = (replay(t, [name], ["lru:budget=5"]) for t in (trace, joined(trace)))
    assert several.cells.equals(one.cells)
    assert several.runs[0].to_json() == one.runs[0].to_json()


@pytest.mark.parametrize("name", policy_names("residency"))
@given(seed=st.integers(0, 10**6), budget=st.integers(0, 5))
@settings(max_examples=10, deadline=None)
def test_every_residency_policy_answers_for_all_layers_together_as_for_each_alone(name, seed, budget):
    several = random_trace(seed, segments=3, num_layers=3)
    together = replay(several, ["vanilla"], [budgeted(name, budget)], "h100-pcie5")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("simulator.walk.SIDE_BY_SIDE", 0)
        alone = replay(several, ["vanilla"], [budgeted(name, budget)], "h100-pcie5")
    assert together.to_json() == alone.to_json()
    assert together.cells.equals(alone.cells, null_equal=True)


@pytest.mark.parametrize("name", policy_names("residency"))
def test_every_residency_policy_accounts_for_every_token(name, trace):
    result = replay(trace, ["vanilla"], ["all_resident", budgeted(name, BUDGET)])
    cells = result.cells.filter(pl.col("run") == 1)
    everything = result.cells.filter(pl.col("run") == 0)
    for column in ("assignments", "unique_experts", "gate_retained"):
        assert cells[column].equals(everything[column])
    for of_all, here, there in (
        ("assignments", "gpu_tokens", "cpu_tokens"),
        ("unique_experts", "gpu_experts", "cpu_experts"),
    ):
        assert cells.select((pl.col(here) + pl.col(there) == pl.col(of_all)).all()).item()
    assert cells.select((pl.col("hit_tokens") <= pl.col("gpu_tokens")).all()).item()
    on_demand = cells.select((pl.col("cpu_tokens") == 0).all()).item()
    size = sum(trace.meta.model.expert_bytes.values())
    if on_demand and name != "all_resident":
        missed = cells["unique_experts"] - cells["hit_experts"]
        assert cells["promotions"].equals(missed)
    elif name != "all_resident":
        assert result.runs[1].summary["resident_bytes"] <= BUDGET * size
        assert (cells["gpu_experts"] <= BUDGET).all()
    else:
        assert result.runs[1].summary["resident_bytes"] == E * size


@pytest.mark.parametrize("name", [n for n in policy_names("residency") if n != "none_resident"])
def test_a_budget_for_all_experts_equals_all_resident_once_warm(name, trace):
    twice = replace(trace, pieces=[*trace.pieces, *trace.pieces])
    cells = replay(twice, ["vanilla"], [budgeted(name, E)]).cells
    warm = cells[len(cells) // 2 :]
    assert warm["hit_tokens"].equals(warm["assignments"])
    assert warm["gpu_tokens"].equals(warm["assignments"])
    assert warm["promotions"].sum() == warm["demotions"].sum() == 0


@pytest.mark.parametrize("name", [n for n in policy_names("residency") if n != "none_resident"])
def test_a_budget_of_more_experts_than_a_layer_has_is_refused(name, trace):
    for budget in (E + 1, E + 5, "120%"):
        with pytest.raises(UserError, match=f"budget={budget} is out of range; give 0 to {E} experts per layer"):
            replay(trace, ["vanilla"], [f"{name}:budget={budget}"])


@pytest.mark.parametrize("name", policy_names("residency"))
def test_scopes_and_budgets_are_parameters_wherever_they_exist(name):
    policy = load_policy("residency", budgeted(name, 3))
    assert {"budget", "budget_bytes", "vram_gib"} <= {f.name for f in fields(policy)}
    assert policy.scope in ("layer", "global") and policy.passes in (1, 2)


@pytest.mark.parametrize("name", [n for n in policy_names("residency") if n != "all_resident"])
def test_a_budget_of_nothing_holds_nothing_that_was_not_just_used(name):
    policy, about = load_policy("residency", budgeted(name, 0)), geometry(8)
    stream = stream_of([[[0, 1]], [[2]], [[0]]])
    state = policy.fit([stream], about, 0) if policy.passes == 2 else policy.start(about, 0)
    placement, _ = policy.place(stream, plain_forwards([[]] * 3), about, state)
    assert not placement.hit.any()
    assert placement.resident.tolist() == [0, 0, 0]


def test_tide_with_interval_one_holds_the_most_loaded_experts_of_every_denoise_forward(trace):
    cells = replay(trace, ["vanilla"], [f"tide:budget={BUDGET},refresh_interval=1"]).cells
    kinds = {int(i): int(k) for p in trace.pieces for i, k in zip(p.forwards.forward_id, p.forwards.kind, strict=True)}
    denoise = cells.filter(pl.col("forward_id").replace_strict(kinds) == DENOISE)
    assert len(denoise)
    expected = denoise.select(pl.min_horizontal("unique_experts", pl.lit(BUDGET)).cast(pl.UInt16).alias("hit_experts"))
    assert denoise["hit_experts"].equals(expected["hit_experts"])
