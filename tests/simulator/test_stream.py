"""The ordered stream of distinct experts, against lists and dicts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.policy import Selection
from simulator.registry import load_policy
from simulator.streams import touches
from simulator.streams.stream import block_unique, build_stream, merge_streams
from simulator.streams.touches import sorting_network
from tests.made_up.runs import random_layer, random_trace
from tests.made_up.tables import geometry, naive_cell
from tracer.errors import UserError
from tracer.trace import RouterSpec


def naive_touches(selection, t):
    """A row's experts in the order they are touched."""
    slots = range(selection.count[t])
    weights = selection.gate_weights

    def order(k):
        return (-float(weights[t, k]) if weights is not None else 0.0, int(selection.expert_ids[t, k]))

    return [int(selection.expert_ids[t, k]) for k in sorted(slots, key=order)]


@given(
    seed=st.integers(0, 10**6),
    num_experts=st.sampled_from([3, 7, 300]),
    top_k=st.integers(1, 3),
    form=st.sampled_from(["none", "float16", "float32", "negative"]),
)
@settings(max_examples=80, deadline=None)
def test_streams_equal_the_naive_definition(seed, num_experts, top_k, form):
    forwards = random_trace(seed, segments=1, calls=4).pieces[0].forwards
    rng = np.random.default_rng(seed)
    layer = random_layer(rng, 0, forwards, RouterSpec(num_experts, top_k), weights=form != "none", ties=seed % 2 == 0)
    weights = layer.gate_weights
    if form == "float32":
        weights = rng.standard_normal(weights.shape).astype(np.float32)
    if form == "negative":
        weights = np.float16(0.5) - weights
        weights[weights == 0] *= np.float16(-1)
    selection = Selection(layer.expert_ids, layer.count, weights)
    stream = build_stream(selection, forwards.row_offsets, 3, num_experts)
    assert stream.cell_layer.tolist() == [3] * 4
    for f in range(4):
        rows = range(forwards.row_offsets[f], forwards.row_offsets[f + 1])
        first, counts, last = naive_cell([naive_touches(selection, t) for t in rows])
        cell = slice(stream.offsets[f], stream.offsets[f + 1])
        assert stream.experts[cell].tolist() == first
        assert stream.tokens[cell].tolist() == [counts[e] for e in first]
        assert stream.last_touch[cell].tolist() == [last.index(e) for e in first]


@given(
    seed=st.integers(0, 10**6),
    top_k=st.one_of(st.integers(1, 13), st.just(8)),
    rows=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    dtype=st.sampled_from([np.float16, np.float32]),
    short=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_forwards_of_many_rows_and_wide_rows_equal_the_naive_definition(seed, top_k, rows, dtype, short):
    rng = np.random.default_rng(seed)
    offsets = np.cumsum([0, *rows])
    ids = rng.permuted(np.tile(np.arange(20, dtype=np.uint16), (offsets[-1], 1)), axis=1)[:, :top_k]
    count = rng.integers(0 if short else top_k, top_k + 1, offsets[-1]).astype(np.uint8)
    # Few values tie often; 0 and -0 tie as well.
    weights = rng.choice(np.array([-1.5, -1, -0.0, 0.0, 0.25, 1, 3], dtype), (offsets[-1], top_k))
    selection = Selection(ids, count, weights)
    stream = build_stream(selection, offsets, 0, 20)
    in_any_order = build_stream(selection, offsets, 0, 20, ordered=False)
    assert in_any_order.offsets.tolist() == stream.offsets.tolist()
    for f in range(len(rows)):
        first, counts, last = naive_cell([naive_touches(selection, t) for t in range(offsets[f], offsets[f + 1])])
        cell = slice(stream.offsets[f], stream.offsets[f + 1])
        assert stream.experts[cell].tolist() == first
        assert stream.tokens[cell].tolist() == [counts[e] for e in first]
        assert stream.last_touch[cell].tolist() == [last.index(e) for e in first]
        assert dict(zip(in_any_order.experts[cell].tolist(), in_any_order.tokens[cell].tolist())) == counts
        assert in_any_order.last_touch[cell].tolist() == list(range(len(first)))


@pytest.mark.parametrize(
    "spec",
    [
        "all_resident",
        "none_resident",
        "static:budget=3",
        "belady:budget=3",
        "fiddler:budget=3,cpu_tokens_max=1",
        "tide:budget=3",
        "random_interval:budget=3",
    ],
)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_policies_that_need_no_order_place_each_expert_the_same_in_any(spec, seed):
    policy = load_policy("residency", spec)
    assert policy.ordered is False
    piece = random_trace(seed, segments=1, calls=8).pieces[0]
    layer = piece.layer(1)
    selection = Selection(layer.expert_ids, layer.count, layer.gate_weights)
    found = []
    for ordered in (True, False):
        stream = build_stream(selection, piece.forwards.row_offsets, 0, 7, layer.present, ordered=ordered)
        state = policy.fit([stream], geometry(7), 0) if policy.passes == 2 else policy.start(geometry(7), 0)
        placed, _ = policy.place(stream, piece.forwards, geometry(7), state)
        of_entry = (np.repeat(stream.cell_forward, np.diff(stream.offsets)), stream.experts, placed.hit, placed.on_gpu)
        moved = (placed.promotions, placed.demotions, placed.copied_back, placed.resident)
        found.append((sorted(zip(*(a.tolist() for a in of_entry))), [a.tolist() for a in moved]))
    assert found[0] == found[1]


@pytest.mark.parametrize("width", range(1, 13))
def test_the_sorting_network_sorts_all_zeros_and_ones(width):
    # By the 0-1 principle it then sorts any numbers.
    numbers = (np.arange(1 << width)[:, None] >> np.arange(width)) & 1
    for upper, lower in sorting_network(width):
        assert upper < lower
        numbers[:, [upper, lower]] = np.sort(numbers[:, [upper, lower]], axis=1)
    assert (np.diff(numbers, axis=1) >= 0).all()


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
def test_rows_of_eight_are_sorted_whatever_they_hold(dtype):
    numbers = ((np.arange(256)[:, None] >> np.arange(8)) & 1).astype(dtype)
    keys = numbers.reshape(-1).copy()
    touches._sort_rows_of_eight(keys, np.uint64(256))
    assert keys.reshape(-1, 8).tolist() == np.sort(numbers, axis=1).tolist()


def test_one_row_of_many_experts_is_ordered_by_weight_then_id():
    ids = np.array([[5, 2, 9, 4]], np.uint8)
    weights = np.array([[0.25, 0.5, 0.25, 0.75]], np.float16)
    stream = build_stream(Selection(ids, np.array([4], np.uint8), weights), np.array([0, 1]), 0, 10)
    assert stream.experts.tolist() == [4, 2, 5, 9]
    assert stream.last_touch.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("ids", "count", "reason"),
    [
        ([[1, 1]], [2], "twice in row 0"),
        ([[0, 9]], [2], "below the layer's number of experts"),
        ([[0, 1]], [3], "more than 2 a row"),
        ([[0, 1], [0, 1]], [2, 2], "one row each"),
    ],
)
def test_selections_a_kernel_could_not_index_with_are_refused(ids, count, reason):
    selection = Selection(np.array(ids, np.uint8), np.array(count, np.uint8), None)
    for ordered in (True, False):
        with pytest.raises(UserError, match=reason):
            build_stream(selection, np.array([0, 1]), 0, 8, ordered=ordered)


def test_selections_of_the_wrong_type_are_refused():
    selection = Selection(np.array([[0, 1]]), np.array([2], np.uint8), None)
    with pytest.raises(UserError, match="uint8 or uint16"):
        build_stream(selection, np.array([0, 1]), 0, 8)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_unique_experts_of_the_current_block_equal_sets(seed):
    piece = random_trace(seed, segments=1).pieces[0]
    forwards, layer = piece.forwards, piece.layer(1)
    inside = np.random.default_rng(seed).random(forwards.num_rows) < 0.6
    selection = Selection(layer.expert_ids, layer.count, None)
    cells, parts = block_unique(selection, inside, forwards.part_rows, forwards.part_offsets, 7)
    start, stop = forwards.part_rows
    sets = [
        {int(e) for t in range(start[n], stop[n]) if inside[t] for e in layer.expert_ids[t, : layer.count[t]]}
        for n in range(len(start))
    ]
    assert parts.tolist() == [len(s) for s in sets]
    bounds = forwards.part_offsets
    assert cells.tolist() == [len(set().union(*sets[bounds[f] : bounds[f + 1]])) for f in range(len(bounds) - 1)]


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_merged_streams_go_forward_by_forward_through_the_layers_that_ran(seed):
    piece = random_trace(seed, segments=1, num_layers=3).pieces[0]
    streams, expected = [], []
    for at, number in enumerate(piece.layers):
        layer = piece.layer(number)
        selection = Selection(layer.expert_ids, layer.count, layer.gate_weights)
        streams.append(build_stream(selection, piece.forwards.row_offsets, at, 7, layer.present))
        assert streams[at].cell_forward.tolist() == np.flatnonzero(layer.present).tolist()
        expected += [(f, at) for f in np.flatnonzero(layer.present).tolist()]
    merged = merge_streams(streams)
    cells = list(zip(merged.cell_forward.tolist(), merged.cell_layer.tolist(), strict=True))
    assert cells == sorted(expected)
    for c, (f, at) in enumerate(cells):
        own = streams[at].cell_forward.tolist().index(f)
        for name in ("experts", "tokens", "last_touch"):
            one = getattr(streams[at], name)[streams[at].offsets[own] : streams[at].offsets[own + 1]]
            assert getattr(merged, name)[merged.offsets[c] : merged.offsets[c + 1]].tolist() == one.tolist()
