"""Traces and geometries for routing and acceptance tests."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
from hypothesis import strategies as st

from simulator.acceptance.recorded import Recorded
from simulator.policy import Geometry
from tests.builders import block_run, in_memory, router
from tracer.schema import PADDING
from tracer.trace import Segment

seeds = st.integers(0, 2**32 - 1)


@st.composite
def specs(draw):
    """A RouterSpec of up to 9 experts, K <= 3, every option reachable."""
    num_experts, n_group, topk_group = draw(
        st.sampled_from([(9, 1, 1), (7, 1, 1), (9, 3, 2), (8, 4, 2), (8, 2, 1), (6, 6, 3), (9, 3, 3), (3, 1, 1)])
    )
    rng = np.random.default_rng(draw(seeds))
    # Every kept group of the recorded routing must hold K experts in all.
    most = min(3, topk_group * (num_experts // n_group))
    return router(
        rng,
        num_experts=num_experts,
        top_k=draw(st.integers(1, most)),
        score_function=draw(st.sampled_from(["softmax", "sigmoid"])),
        n_group=n_group,
        topk_group=topk_group,
        bias=draw(st.booleans()),
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        bias_in_weights=draw(st.booleans()),
        group_score=draw(st.sampled_from(["top2_sum", "max"])),
        expert_scale=rng.random(num_experts).astype(np.float32) if draw(st.booleans()) else None,
    )


def geometry(segment, block_length=4, **decoding):
    """The Geometry of an in-memory segment."""
    routers = {layer: segment.layer(layer).router for layer in segment.layers}
    first = next(iter(routers.values()))
    return Geometry(
        layers=segment.layers,
        num_experts=first.num_experts,
        top_k=first.top_k,
        routers=routers,
        expert_bytes={layer: 1 for layer in segment.layers},
        block_length=block_length,
        first_block={},
        decoding=decoding,
    )


@st.composite
def runs(draw, spec=None, **kwargs):
    """A vanilla run of a few blocks with one or two layers: (segment, geometry)."""
    rng = np.random.default_rng(draw(seeds))
    block_length = draw(st.integers(2, 6))
    found = {layer: spec or draw(specs()) for layer in range(1, 1 + draw(st.integers(1, 2)))}
    options = {
        "requests": draw(st.integers(1, 2)),
        "blocks": draw(st.integers(1, 2)),
        "block_length": block_length,
        "prompt": draw(st.integers(1, 9)),
        "kv_cache": draw(st.booleans()),
        "max_accept": draw(st.integers(1, 3)),
        "ties": draw(st.booleans()),
    }
    segment, _ = block_run(rng, specs=found, **(options | kwargs))
    return segment, geometry(segment, block_length)


def recorded(segment, geometry):
    """The identity trajectory."""
    return Recorded().unroll(segment, geometry)


def with_layers(segment, change):
    """The segment with ``change(layer_trace)`` in the place of each layer."""
    layers = {layer: change(segment.layer(layer, True)) for layer in segment.layers}

    return in_memory(segment.forwards, segment.tokens, layers)


def calls_of(segment, calls):
    """A segment of the model calls ``calls`` of another, in that order, of one request each."""
    forwards, calls = segment.forwards, np.array(calls, np.int64)
    rows = np.concatenate([np.arange(*forwards.row_offsets[f : f + 2]) for f in calls])
    per_call = ("row_offsets", "part_offsets")
    table = replace(
        forwards,
        row_offsets=np.concatenate(([0], np.cumsum(np.diff(forwards.row_offsets)[calls]))),
        part_offsets=np.arange(len(calls) + 1),
        **{f.name: getattr(forwards, f.name)[calls] for f in fields(forwards) if f.name not in per_call},
    )
    tokens = replace(segment.tokens, **{f.name: getattr(segment.tokens, f.name)[rows] for f in fields(segment.tokens)})

    def load(layer, with_scores, with_weights):
        found = segment.load(layer, with_scores, with_weights)
        arrays = ("expert_ids", "count", "gate_weights", "router_scores")
        taken = {name: None if getattr(found, name) is None else getattr(found, name)[rows] for name in arrays}
        return replace(found, present=found.present[calls], **taken)

    return Segment(forwards=table, tokens=tokens, layers=segment.layers, load=load)


def with_padding(segment, rng, share=0.2):
    """Some rows turned into padding: position -1, state padding."""
    tokens = segment.tokens
    hit = rng.random(len(tokens.position)) < share
    tokens = replace(
        tokens,
        position=np.where(hit, np.int32(-1), tokens.position),
        state=np.where(hit, np.uint8(PADDING), tokens.state),
        accepted=tokens.accepted & ~hit,
    )
    return replace(segment, tokens=tokens)


def unrouted(rng, share=0.2):
    """A change for :func:`with_layers`: some rows were not routed."""

    def change(layer):
        return replace(layer, count=np.where(rng.random(len(layer.count)) < share, np.uint8(0), layer.count))

    return change


def active_only(segment):
    """The segment at capture level "active": NaN outside recorded ids and plain top-K of each call."""

    def change(layer):
        spec = layer.router
        scores = np.full_like(layer.router_scores, np.nan)
        bias = 0 if spec.expert_bias is None else spec.expert_bias
        offsets = segment.forwards.row_offsets
        for f in range(len(offsets) - 1):
            rows = slice(offsets[f], offsets[f + 1])
            plain = np.argsort(-(layer.router_scores[rows] + bias), axis=1, kind="stable")[:, : spec.top_k]
            columns = np.union1d(plain, layer.expert_ids[rows])
            scores[rows, columns] = layer.router_scores[rows, columns]
        return replace(layer, router_scores=scores)

    return with_layers(segment, change)


def rows_of(selection):
    """A selection as plain lists: per row its ids and weights, in slot order."""
    weights = selection.gate_weights
    return [
        (
            selection.expert_ids[t, : selection.count[t]].tolist(),
            None if weights is None else weights[t, : selection.count[t]].tolist(),
        )
        for t in range(len(selection.count))
    ]
