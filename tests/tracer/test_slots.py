"""An expert keeps its slot from call to call, exactly as the naive definition says; sets and weights never change."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.made_up.calls import naive_active, record
from tracer.files.row_kernels import active_columns
from tracer.parquet import TraceWriter, open_trace


def naive_slots(calls, layer):
    """Slots of every row of a layer: lists of the real expert ids; rows with fewer than K keep the order they are given in."""
    remembered = {}  # request -> {position: slots} of the first branch of the request's previous call
    rows = []
    for parts, tokens, routing in calls:
        n = routing.layers.index(layer)
        for part in parts:
            first, count, branches = part["row_start"], part["num_tokens"], part["branches"]
            before, now = remembered.get(part["request_id"], {}), {}
            for r in range(first, first + count):
                branch = (r - first) // (count // branches)
                position = (
                    int(tokens["position"][r]) if tokens else part["kv_tokens"] + (r - first) % (count // branches)
                )
                earlier = before.get(position)
                ids = [int(e) for e in routing.expert_ids[n][r]]
                if routing.count is not None and routing.count[n][r] < len(ids):
                    rows.append(ids[: routing.count[n][r]])
                    continue
                if earlier:
                    slots = [e if e in ids else None for e in earlier]
                    newcomers = [e for e in ids if e not in earlier]
                    slots = [newcomers.pop(0) if e is None else e for e in slots]
                else:
                    slots = sorted(ids)
                if branch == 0:
                    now[position] = slots
                rows.append(slots)
            remembered[part["request_id"]] = now
    return rows


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    geometry=st.sampled_from([(4, 3), (5, 2), (12, 8), (60, 8), (300, 4)]),
    batch=st.integers(1, 3),
    tokens=st.booleans(),
    weights=st.booleans(),
    count=st.booleans(),
    branches=st.integers(1, 3),
    segment_forwards=st.integers(1, 9),
    # so small that blocks are cut inside, and rows go on from those of the segment before
    max_buffer_bytes=st.sampled_from([2, 128 << 20]),
)
def test_kernel_equals_naive(seed, geometry, batch, segment_forwards, max_buffer_bytes, **options):
    rng = np.random.default_rng(seed)
    recorded = record(rng, num_experts=geometry[0], top_k=geometry[1], batch=batch, **options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.trace"
        with TraceWriter(
            path, recorded.meta, segment_forwards=segment_forwards, max_buffer_bytes=max_buffer_bytes
        ) as writer:
            recorded.write(writer)
        segments = list(open_trace(path).segments())
        for layer in recorded.meta["model"]["moe_layers"]:
            found = [
                row[:count].tolist()
                for own in (segment.layer(layer) for segment in segments)
                for row, count in zip(own.expert_ids, own.count)
            ]
            assert found == naive_slots(recorded.calls, layer)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(0, 6), experts=st.integers(1, 12), with_bias=st.booleans())
def test_active_columns_equal_naive(seed, rows, experts, with_bias):
    rng = np.random.default_rng(seed)
    top_k = int(rng.integers(1, experts + 1))
    ids = np.array([rng.permutation(experts)[:top_k] for _ in range(rows)], np.uint8).reshape(rows, top_k)
    # few distinct values, so that ties are common
    scores = (rng.integers(0, 4, (rows, experts)) / 4).astype(np.float32)
    bias = (rng.integers(0, 3, experts) / 4).astype(np.float32) if with_bias else None
    routed = rng.random(rows) < 0.8
    # as the scores of a row that were not recorded
    scores[rng.random(rows) < 0.2] = np.nan
    own_bias = np.float32(0) if bias is None else bias
    known = ~np.isnan(scores).all(axis=1)
    real = [row if on else [] for row, on in zip(ids.tolist(), routed)]
    assert active_columns(ids, scores, bias, routed & known).tolist() == naive_active(real, scores, own_bias, top_k)
    everywhere = active_columns(ids[known], scores[known], bias, np.ones(known.sum(), bool))
    assert everywhere.tolist() == naive_active(ids.tolist(), scores, own_bias, top_k)
