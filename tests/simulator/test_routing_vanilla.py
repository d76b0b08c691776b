"""The vanilla and top_k policies against loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.routing.top_k import TopK
from simulator.routing.vanilla import Vanilla
from tests.made_up.changes import active_only, unrouted, with_layers
from tests.made_up.routers import naive_weights
from tests.made_up.runs import block_run
from tests.made_up.strategies import recorded, runs, seeds
from tests.made_up.tables import geometry_of
from tests.simulator.naive_rows import rows_of
from tracer.errors import UserError


def naive_vanilla(layer, reused):
    """Per row: recorded ids and weights, nothing where the row keeps its previous output."""
    rows = []
    for t in range(len(layer.count)):
        count = 0 if reused[t] else layer.count[t]
        rows.append((layer.expert_ids[t, :count].tolist(), layer.gate_weights[t, :count].tolist()))
    return rows


def naive_top_k(layer, reused, k):
    """Per row: the ``k`` recorded experts of highest selection score, ties to the lowest id, weighed anew."""
    bias = 0 if layer.router.expert_bias is None else layer.router.expert_bias
    rows = []
    for t, (ids, weights) in enumerate(naive_vanilla(layer, reused)):
        if len(ids) > k:
            selection = layer.router_scores[t] + bias
            ids = sorted(sorted(ids, key=lambda e, s=selection: (-s[e], e))[:k])
            weights = naive_weights(layer.router_scores[t], ids, layer.router)
        rows.append((ids, weights))
    return rows


def in_rows(case, naive, *more):
    """A definition's (ids, weights) as the rule asks for them (tests/simulator/definitions.py)."""
    return [
        dict(zip(ids, map(np.float32, weights))) for ids, weights in naive(case.layer, case.trajectory.reused, *more)
    ]


NAIVE = {
    "vanilla": lambda case, policy: in_rows(case, naive_vanilla),
    "top_k:k=2": lambda case, policy: in_rows(case, naive_top_k, policy.k),
}


@settings(max_examples=50, deadline=None)
@given(runs(), seeds)
def test_vanilla_keeps_what_was_recorded(run, seed):
    segment, geometry = run
    rng = np.random.default_rng(seed)
    segment = with_layers(segment, unrouted(rng))
    reused = rng.random(segment.forwards.num_rows) < 0.3
    trajectory = replace(recorded(segment, geometry), reused=reused)
    for layer in segment.layers:
        found = Vanilla().select(segment.layer(layer), trajectory, geometry)
        assert rows_of(found) == naive_vanilla(segment.layer(layer), reused)


@settings(max_examples=80, deadline=None)
@given(runs(), seeds, st.integers(1, 3))
def test_top_k_keeps_the_best(run, seed, k):
    segment, geometry = run
    rng = np.random.default_rng(seed)
    segment = active_only(with_layers(segment, unrouted(rng)))
    reused = rng.random(segment.forwards.num_rows) < 0.2
    trajectory = replace(recorded(segment, geometry), reused=reused)
    for layer in segment.layers:
        found = segment.layer(layer, True)
        if k > found.router.top_k:
            with pytest.raises(UserError, match="k must be 1 to"):
                TopK(k).select(found, trajectory, geometry)
            continue
        assert rows_of(TopK(k).select(found, trajectory, geometry)) == naive_top_k(found, reused, k)


@settings(max_examples=20, deadline=None)
@given(runs())
def test_top_k_of_all_is_vanilla(run):
    segment, geometry = run
    trajectory = recorded(segment, geometry)
    for layer in segment.layers:
        found = segment.layer(layer, True)
        all_of_them = TopK(found.router.top_k).select(found, trajectory, geometry)
        assert rows_of(all_of_them) == rows_of(Vanilla().select(found, trajectory, geometry))


def test_top_k_refuses_a_k_out_of_range():
    with pytest.raises(UserError, match="k must be 1 or more, not 0"):
        TopK(0)


def test_top_k_needs_scores():
    segment, _ = block_run(np.random.default_rng(0))
    where = geometry_of(segment)
    with pytest.raises(UserError, match="router scores, which the trace does not hold in layer 1"):
        TopK(1).select(segment.layer(1), recorded(segment, where), where)
    missing = with_layers(
        segment, lambda layer: replace(layer, router_scores=np.full_like(layer.router_scores, np.nan))
    )
    with pytest.raises(UserError, match="does not hold for forward 0, layer 1"):
        TopK(1).select(missing.layer(1, True), recorded(segment, where), where)
