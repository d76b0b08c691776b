"""What TraceWriter is given is what open_trace gives back, segment by segment, slots apart."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.made_up.calls import assert_unfinished, naive_active, record
from tracer.checking import check
from tracer.errors import UserError
from tracer.parquet import TraceWriter, open_trace
from tracer.schema import KINDS
from tracer.trace import CallRouting


def real_ids(routing, n):
    """The real ids of every row of a call's ``n``-th layer."""
    ids = np.asarray(routing.expert_ids[n]).tolist()
    return ids if routing.count is None else [row[:count] for row, count in zip(ids, routing.count[n])]


def naive_rows(recorded):
    """The rows of all calls as the format means them: per layer and row a dict of expert -> weight, and scores by expert.

    Weights are None in layers that have none, scores in rows that have none.
    """
    meta = recorded.meta
    rows = {layer: [] for layer in meta["model"]["moe_layers"]}
    for _, _, routing in recorded.calls:
        for n, layer in enumerate(routing.layers):
            ids = real_ids(routing, n)
            weights = None if routing.gate_weights is None else np.asarray(routing.gate_weights[n], np.float16)
            scores = None if routing.router_scores is None else routing.router_scores[n]
            if scores is not None and meta["capture_level"] == "active":
                bias = np.array(meta["router"]["expert_bias"][str(layer)], np.float32)
                kept = naive_active(ids, scores, bias, meta["model"]["top_k"])
            else:
                kept = range(meta["model"]["num_experts"])
            for r, own in enumerate(ids):
                chosen = {
                    e: None if weights is None or np.isnan(weights[r][k]) else weights[r][k] for k, e in enumerate(own)
                }
                recorded_scores = scores is not None and own and not np.isnan(scores[r]).all()
                rows[layer].append((chosen, {e: scores[r][e] for e in kept} if recorded_scores else None))
    return rows


def read_rows(path):
    """The same from a trace on disk."""
    trace = open_trace(path)
    rows = {layer: [] for layer in trace.meta.model.moe_layers}
    for segment in trace.segments():
        for layer in segment.layers:
            own = segment.layer(layer, with_scores=True)
            bare = segment.layer(layer, with_weights=False)
            assert bare.gate_weights is None and (bare.expert_ids == own.expert_ids).all()
            assert (bare.count == own.count).all()
            beyond = np.arange(own.expert_ids.shape[1]) >= own.count[:, None]
            assert not own.expert_ids[beyond].any()
            assert own.gate_weights is None or not own.gate_weights[beyond].any()
            for r in range(len(own.count)):
                chosen = {
                    int(own.expert_ids[r, k]): None if own.gate_weights is None else own.gate_weights[r, k]
                    for k in range(own.count[r])
                }
                assert len(chosen) == own.count[r]
                score = {}
                if own.router_scores is not None:
                    score = {e: s for e, s in enumerate(own.router_scores[r]) if not np.isnan(s)}
                rows[layer].append((chosen, score or None))
    return rows


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    geometry=st.sampled_from([(1, 1), (2, 1), (3, 3), (9, 2), (9, 8), (300, 3)]),
    level=st.sampled_from(["ids", "active", "scores"]),
    batch=st.integers(1, 3),
    weights=st.booleans(),
    unweighted=st.sampled_from([(), (1,), (1, 2)]),
    tokens=st.booleans(),
    count=st.booleans(),
    nan_scores=st.booleans(),
    branches=st.integers(1, 2),
    segment_forwards=st.integers(1, 20),
    compact=st.booleans(),
    whole=st.booleans(),
    id_dtype=st.sampled_from([np.int64, np.uint16, np.int32]),
)
def test_round_trip(seed, geometry, segment_forwards, compact, whole, **options):
    recorded = record(np.random.default_rng(seed), num_experts=geometry[0], top_k=geometry[1], **options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.trace"
        with TraceWriter(
            path, recorded.meta, segment_forwards=segment_forwards, compact=compact, whole=whole
        ) as writer:
            recorded.write(writer)
        assert [entry.name for entry in Path(folder).iterdir()] == ["a.trace"] and writer.folder == path
        assert writer.bytes_written == sum(p.stat().st_size for p in path.glob("*/*"))
        assert check(path) == []
        assert read_rows(path) == naive_rows(recorded)
        assert_tables(path, recorded)


def assert_tables(path, recorded):
    trace = open_trace(path)
    parts = [part for parts, _, _ in recorded.calls for part in parts]
    segments = list(trace.segments())
    assert len(segments) == trace.num_segments
    for column in ("request_id", "block", "step", "row_start", "num_tokens", "kv_tokens", "num_masked", "num_accepted",
                   "branches", "duration_ns"):  # fmt: skip
        found = np.concatenate([getattr(s.forwards, column) for s in segments])
        assert found.tolist() == [part[column] for part in parts], column
    kinds = np.concatenate([s.forwards.kind for s in segments])
    assert [KINDS[k] for k in kinds] == [part["kind"] for part in parts]
    chosen = np.concatenate([s.forwards.chosen_branch for s in segments])
    assert chosen.tolist() == [-1 if p["chosen_branch"] is None else p["chosen_branch"] for p in parts]
    assert np.concatenate([s.forwards.forward_id for s in segments]).tolist() == list(range(len(recorded.calls)))
    if "tokens" in trace.meta.tables:
        for column in ("position", "token_id", "state", "predicted_id", "confidence", "accepted"):
            found = np.concatenate([getattr(s.tokens, column) for s in segments])
            given_columns = [np.asarray(tokens[column]) for _, tokens, _ in recorded.calls]
            np.testing.assert_array_equal(found, np.concatenate(given_columns), err_msg=column)
    pairs = [{(int(r), int(b)) for r, b in zip(s.forwards.request_id, s.forwards.block) if b >= 0} for s in segments]
    assert all(not a & b for i, a in enumerate(pairs) for b in pairs[:i])
    ended = [row for rows in recorded.ended.values() for row in rows]
    assert trace.requests.select(list(ended[0])).to_dicts() == ended
    rows = naive_rows(recorded)
    assert trace.num_decisions == sum(len(chosen) for own in rows.values() for chosen, _ in own)


def test_argmax_is_kept_where_it_differs(tmp_path):
    recorded = record(np.random.default_rng(0), batches=1, batch=1)
    for _, tokens, _ in recorded.calls:
        tokens["argmax_id"] = tokens["predicted_id"].copy()
        tokens["argmax_confidence"] = tokens["confidence"].copy()
    changed = recorded.calls[1][1]
    changed["argmax_id"][1], changed["argmax_confidence"][1] = 7777, 0.875
    with TraceWriter(tmp_path / "a.trace", recorded.meta) as writer:
        recorded.write(writer)
    trace = open_trace(tmp_path / "a.trace")
    (segment,) = trace.segments()
    expected = np.concatenate([tokens["argmax_id"] for _, tokens, _ in recorded.calls])
    assert segment.tokens.argmax_id.tolist() == expected.tolist()
    confidence = np.concatenate([tokens["argmax_confidence"] for _, tokens, _ in recorded.calls])
    np.testing.assert_array_equal(segment.tokens.argmax_confidence, confidence)
    stored = trace.scan("tokens").collect()["argmax_id"]
    assert stored.null_count() == len(stored) - 1


def test_calls_of_any_number_types_and_strides(tmp_path):
    recorded = record(np.random.default_rng(6), top_k=3, layers=(1, 2, 4), unweighted=(1,))
    kinds = [(np.uint8, np.float16), (np.int16, np.float32), (np.uint8, np.float64), (np.uint64, np.float16)]
    for number, (parts, tokens, routing) in enumerate(recorded.calls):
        # layer 1 has no weights, and prefills, which come first, no other layer
        if parts[0]["kind"] == "prefill":
            routing = CallRouting((1,), routing.expert_ids[:1])
        else:
            ids, weights = kinds[number % 4]
            routing = replace(
                routing, expert_ids=routing.expert_ids.astype(ids), gate_weights=routing.gate_weights.astype(weights)
            )
        if number in (4, 5):
            routing = replace(routing, expert_ids=np.asfortranarray(routing.expert_ids))
        if number == 6:
            twice = np.repeat(routing.gate_weights, 2, axis=1)[:, ::2]
            routing = replace(routing, gate_weights=twice)
        if number == 8:
            routing = replace(
                routing, expert_ids=routing.expert_ids.tolist(), gate_weights=routing.gate_weights.tolist()
            )
        recorded.calls[number] = parts, tokens, routing
        for column, values in tokens.items():
            narrow = values.astype(np.int16) if values.dtype.kind == "i" else values
            tokens[column] = [narrow, np.repeat(values, 2)[::2], values.tolist(), values][number % 4]
    with TraceWriter(tmp_path / "a.trace", recorded.meta) as writer:
        recorded.write(writer)
    assert check(tmp_path / "a.trace") == []
    assert_tables(tmp_path / "a.trace", recorded)
    rows = tidy_rows(recorded)
    found = open_trace(tmp_path / "a.trace").scan("routing").collect()
    found = found.select("forward_id", "layer", "row", "expert_id", "gate_weight").rows()
    assert sorted(found, key=str) == sorted(rows, key=str)
    assert any(weight is None for *_, weight in rows) and any(weight for *_, weight in rows)


def tidy_rows(recorded):
    """(forward_id, layer, row, expert_id, gate_weight) of every real id; the weight None where it is not known."""
    return [
        (number, layer, r, e, None if weight is None or np.isnan(weight) else float(np.float16(weight)))
        for number, (_, _, routing) in enumerate(recorded.calls)
        for n, layer in enumerate(routing.layers)
        for r, ids in enumerate(real_ids(routing, n))
        for k, e in enumerate(ids)
        for weight in [None if routing.gate_weights is None else routing.gate_weights[n][r][k]]
    ]


@pytest.mark.parametrize("compact", [False, True])
def test_compact_changes_the_encodings_of_weights_and_scores_alone(tmp_path, compact):
    recorded = record(np.random.default_rng(1), level="scores", batches=1)
    with TraceWriter(tmp_path / "a.trace", recorded.meta, compact=compact) as writer:
        recorded.write(writer)
    (part,) = (tmp_path / "a.trace" / "routing").iterdir()
    metadata = pq.ParquetFile(part).metadata
    found = set()
    for group in range(metadata.num_row_groups):
        columns = [metadata.row_group(group).column(n) for n in range(metadata.num_columns)]
        found |= {column.path_in_schema for column in columns if "BYTE_STREAM_SPLIT" in column.encodings}
    assert found == ({"gate_weights", "router_scores"} if compact else set())
    assert read_rows(tmp_path / "a.trace") == naive_rows(recorded)


def test_what_stands_behind_the_real_ids_is_never_looked_at(tmp_path):
    recorded = record(np.random.default_rng(2), top_k=3, batches=1, count=True)
    with TraceWriter(tmp_path / "a.trace", recorded.meta) as writer:
        recorded.write(writer)
    clean = [
        (parts, tokens, replace(routing, expert_ids=np.where(behind, 0, routing.expert_ids), gate_weights=weights))
        for parts, tokens, routing in recorded.calls
        for behind in [np.arange(3) >= routing.count[..., None]]
        for weights in [np.where(behind, 0, routing.gate_weights)]
    ]
    with TraceWriter(tmp_path / "b.trace", recorded.meta) as writer:
        replace(recorded, calls=clean).write(writer)
    for part in sorted((tmp_path / "a.trace").glob("*/*")):
        assert part.read_bytes() == (tmp_path / "b.trace" / part.relative_to(tmp_path / "a.trace")).read_bytes()


@pytest.mark.parametrize("unweighted", [(), (1,)])
def test_a_segment_without_rows_of_a_layer_says_nothing_of_its_weights(tmp_path, unweighted):
    recorded = record(np.random.default_rng(3), batches=1, count=True, unweighted=unweighted)
    for number in (0, 2, 4, 6):
        recorded.calls[number][2].count[0] = 0
    # cut inside blocks, so that a segment of the reader holds parts of both sorts
    with TraceWriter(tmp_path / "a.trace", recorded.meta, max_buffer_bytes=2) as writer:
        recorded.write(writer)
    assert len(list((tmp_path / "a.trace" / "routing").iterdir())) == len(recorded.calls)
    assert check(tmp_path / "a.trace") == []
    assert open_trace(tmp_path / "a.trace").has("weights") == (not unweighted)
    assert read_rows(tmp_path / "a.trace") == naive_rows(recorded)


def test_layers_by_kind(tmp_path):
    recorded = record(np.random.default_rng(2), layers=(1, 2, 5), level="active", count=True)
    for number, (parts, tokens, routing) in enumerate(recorded.calls):
        own = [2] if parts[0]["kind"] == "prefill" else [0, 1]
        recorded.calls[number] = parts, tokens, some_layers(routing, own)
    with TraceWriter(tmp_path / "a.trace", recorded.meta, segment_forwards=3) as writer:
        recorded.write(writer)
    assert check(tmp_path / "a.trace") == []
    tidy = open_trace(tmp_path / "a.trace").scan("routing").collect()
    found = tidy.select("forward_id", "layer", "row", "expert_id", "gate_weight").rows()
    assert sorted(found) == sorted(tidy_rows(recorded))
    rows = [(chosen, score) for own in read_rows(tmp_path / "a.trace").values() for chosen, score in own if chosen]
    naive = [(chosen, score) for own in naive_rows(recorded).values() for chosen, score in own if chosen]
    assert rows == naive


def some_layers(routing, own):
    """A call's routing with its ``own``-th layers alone."""
    arrays = {
        name: None if (whole := getattr(routing, name)) is None else whole[own]
        for name in ("expert_ids", "gate_weights", "router_scores", "count")
    }
    return CallRouting(tuple(routing.layers[n] for n in own), **arrays)


def test_a_huge_block_is_cut_and_put_together(tmp_path):
    recorded = record(np.random.default_rng(3), batches=1, batch=1, layers=(1,))
    # bytes of ids, weights and token columns of a call
    size = 3 * 2 * (1 + 2) + 3 * 27
    with TraceWriter(tmp_path / "a.trace", recorded.meta, max_buffer_bytes=2 * size) as writer:
        recorded.write(writer)
    path = tmp_path / "a.trace"
    parts = len(list(path.glob("forwards/part-*")))
    trace = open_trace(path)
    assert check(path) == [] and parts == len(recorded.calls) == 7
    assert [s.forwards.forward_id.tolist() for s in trace.segments()] == [[0], [1, 2, 3], [4, 5, 6]]
    assert read_rows(path) == naive_rows(recorded)


def test_a_layer_is_one_row_group(tmp_path):
    recorded = record(np.random.default_rng(4), level="scores", layers=(1, 2, 5), count=True)
    with TraceWriter(tmp_path / "a.trace", recorded.meta) as writer:
        recorded.write(writer)
    (part,) = open_trace(tmp_path / "a.trace").parts("routing")
    assert [part.constant("layer", group) for group in range(part.metadata.num_row_groups)] == [1, 2, 5]
    assert read_rows(tmp_path / "a.trace") == naive_rows(recorded)


def changed_part(**values):
    return lambda parts, tokens, routing: ([{**parts[0], **values}, *parts[1:]], tokens, routing)


def changed_tokens(**values):
    return lambda parts, tokens, routing: (parts, {**tokens, **values}, routing)


def changed_routing(**values):
    return lambda parts, tokens, routing: (parts, tokens, replace(routing, **values))


def changed_rows(column, rows, first=0):
    """Other values of layer 2 from row ``first`` on."""

    def change(parts, tokens, routing):
        values = np.array(getattr(routing, column))
        values[1, first : first + len(rows)] = rows
        return parts, tokens, replace(routing, **{column: values})

    return change


def without(column):
    return lambda parts, tokens, routing: (
        [{k: v for k, v in parts[0].items() if k != column}, *parts[1:]], tokens, routing,
    )  # fmt: skip


BAD_CALLS = {
    "call 1: block is missing: it must be a whole number from -1 to 2147483647.": without("block"),
    "call 1: forwards has no column forward_id.": changed_part(forward_id=3),
    "call 1: kind must be one of prefill, denoise, commit, decode, not 'x'.": changed_part(kind="x"),
    "call 1: all requests of a call must share one kind.": changed_part(kind="commit", step=-1),
    "call 1: a request stands twice in it.": changed_part(request_id=1),
    "call 1: num_tokens must be a whole number from 1 to 4294967295, not 0.": changed_part(num_tokens=0),
    "call 1: num_tokens must be a whole number from 1 to 4294967295, not 3.0.": changed_part(num_tokens=3.0),
    "call 1: row_start is 2 and must be 0, where the request before it ends.": changed_part(row_start=2),
    "call 1: step is 1 and must be 0, it counts up from 0 in block 1 of request 0.": changed_part(step=1),
    "call 1: num_tokens 3 does not divide into 2 branches.": changed_part(branches=2),
    "call 1: chosen_branch 1 is not below branches (1).": changed_part(chosen_branch=1),
    "call 1: num_masked 4 exceeds num_tokens (3).": changed_part(num_masked=4),
    "call 1: tokens must be given exactly when meta.tables lists them.": lambda p, t, r: (p, None, r),
    "call 1: tokens position is missing.": changed_tokens(position=None),
    "call 1: tokens state must have shape (6,), not (5,).": changed_tokens(state=np.zeros(5)),
    "call 1: it has no layer.": lambda p, t, r: (p, t, some_layers(r, [])),
    "call 1: layer 3 is not among model.moe_layers.": changed_routing(layers=(1, 3)),
    "call 1: layers must ascend, not [2, 1].": changed_routing(layers=(2, 1)),
    "call 1: layers must ascend, not [2, 2].": changed_routing(layers=(2, 2)),
    "call 1: parts must hold one entry a request.": lambda p, t, r: ([], t, r),
    "call 1: expert_ids must be whole numbers of shape (2, 6, 2), not float64 of shape (2, 6, 2).": changed_routing(
        expert_ids=np.zeros((2, 6, 2))
    ),
    "call 1: expert_ids must be whole numbers of shape (2, 6, 2), not int64 of shape (2, 6, 3).": changed_routing(
        expert_ids=np.zeros((2, 6, 3), np.int64)
    ),
    "call 1: expert_ids must be whole numbers of shape (1, 6, 2), not int64 of shape (2, 6, 2).": changed_routing(
        layers=(1,)
    ),
    "call 1: expert_ids must be whole numbers of shape (2, 6, 2), not int64 of shape (12, 2).": changed_routing(
        expert_ids=np.zeros((12, 2), np.int64)
    ),
    "call 1: gate_weights must be floats of shape (2, 6, 2), not int64 of shape (2, 6, 2).": changed_routing(
        gate_weights=np.zeros((2, 6, 2), np.int64)
    ),
    "call 1: count must be whole numbers of shape (2, 6), not bool of shape (2, 6).": changed_routing(
        count=np.ones((2, 6), bool)
    ),
    "call 1: count must be whole numbers of shape (2, 6), not int64 of shape (6,).": changed_routing(
        count=np.ones(6, np.int64)
    ),
    "call 1: count must lie in 0..2.": changed_routing(count=np.full((2, 6), 3)),
    "call 1: capture level ids keeps no router_scores.": changed_routing(router_scores=np.zeros((2, 6, 9))),
    "call 1, layer 2, row 3: expert ids [0, 9] must lie in 0..8.": changed_rows("expert_ids", [[0, 9]], 3),
    "call 1, layer 2, row 0: expert ids [-1, 1] must lie in 0..8.": changed_rows("expert_ids", [[-1, 1]] * 6),
}


@pytest.mark.parametrize("sentence", BAD_CALLS)
def test_a_bad_call_is_refused_and_the_writer_goes_on(tmp_path, sentence):
    recorded = record(np.random.default_rng(5), batches=1)
    path = tmp_path / "a.trace"
    with TraceWriter(path, recorded.meta) as writer:
        recorded.write(writer, 0, 1)
        with pytest.raises(UserError) as caught:
            writer.add_call(*BAD_CALLS[sentence](*recorded.calls[1]))
        assert str(caught.value) == sentence
        recorded.write(writer, 1)
    assert check(path) == []
    assert read_rows(path) == naive_rows(recorded)


BAD_VALUES = {
    "call 1, layer 2, row 5: expert ids [4, 4] are not distinct.": changed_rows("expert_ids", [[4, 4]], 5),
    "call 1, layer 2, row 0: float16 weights [inf, 1.0] are not finite.": changed_rows(
        "gate_weights", [[1e6, 1.0]] * 6
    ),
    "call 1, layer 2, row 4: float16 weights [nan, 1.0] are not finite.": changed_rows(
        "gate_weights", [[np.nan, 1.0]], 4
    ),
    "call 1, layer 1, row 0: float16 weights [nan, nan] are not finite.": changed_routing(gate_weights=None),
    "call 1, layer 2, row 1: float16 weights [-1.0, 1.0] must not be negative.": changed_rows(
        "gate_weights", [[-1.0, 1.0]] * 5, 1
    ),
    "call 1, row 4: position 3 stands twice in one request and branch.": changed_tokens(position=[3, 4, 5, 3, 3, 5]),
    "call 1, row 2: padding rows, and no others, must have position -1.": changed_tokens(position=[3, 4, -1, 3, 4, 5]),
    "call 1, row 0: state 5 or position 3 is out of range.": changed_tokens(state=[5] * 6),
}


@pytest.mark.parametrize("sentence", BAD_VALUES)
def test_bad_values_surface_when_the_segment_is_encoded(tmp_path, sentence):
    recorded = record(np.random.default_rng(5), batches=1)
    writer = TraceWriter(tmp_path / "a.trace", recorded.meta)
    recorded.write(writer, 0, 1)
    writer.add_call(*BAD_VALUES[sentence](*recorded.calls[1]))
    with pytest.raises(UserError) as caught:
        writer.close()
    assert str(caught.value) == f"{tmp_path / 'a.trace'}: recording stopped, {sentence}"
    assert_unfinished(tmp_path / "a.trace", 0)


@pytest.mark.parametrize("level", ["active", "scores"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_has_all_its_scores_or_none(tmp_path, level, value):
    recorded = record(np.random.default_rng(5), batches=1, level=level)
    writer = TraceWriter(tmp_path / "a.trace", recorded.meta)
    recorded.write(writer, 0, 1)
    parts, tokens, routing = recorded.calls[1]
    scores = routing.router_scores.copy()
    scores[1, 3, routing.expert_ids[1, 3, 0]] = value
    writer.add_call(parts, tokens, replace(routing, router_scores=scores))
    with pytest.raises(UserError) as caught:
        writer.close()
    where = f"{tmp_path / 'a.trace'}: recording stopped, call 1, layer 2, row 3"
    assert str(caught.value) == f"{where}: a router score is not finite."


@pytest.mark.parametrize(
    ("level", "change", "words"),
    [
        ("scores", {"router_scores": np.zeros((2, 6, 8))}, "router_scores must be floats of shape (2, 6, 9)"),
        ("scores", {"router_scores": None}, "capture level scores needs router_scores of all experts"),
        ("active", {"router_scores": np.zeros((2, 6, 3))}, "router_scores must be floats of shape (2, 6, 9)"),
        ("active", {"router_scores": None}, "capture level active needs router_scores of all experts"),
    ],
)
def test_scores_must_fit_the_level(tmp_path, level, change, words):
    recorded = record(np.random.default_rng(6), level=level, batches=1)
    with TraceWriter(tmp_path / "a.trace", recorded.meta) as writer:
        recorded.write(writer, 0, 1)
        with pytest.raises(UserError) as caught:
            writer.add_call(*changed_routing(**change)(*recorded.calls[1]))
        assert words in str(caught.value)


def test_requests_are_checked(tmp_path):
    recorded = record(np.random.default_rng(7), batches=1, batch=1)
    (row,) = recorded.ended[6]
    with TraceWriter(tmp_path / "a.trace", recorded.meta) as writer:
        recorded.write(writer)
        for change, words in (
            ({}, "request 0 is already in the trace"),
            ({"request_id": 1, "stop_reason": "bored"}, "stop_reason must be one of eos, length, error"),
            ({"request_id": 1, "prompt_tokens": -1}, "prompt_tokens must be a whole number from 0"),
            ({"request_id": 1, "colour": 1}, "requests has no column colour"),
        ):
            with pytest.raises(UserError) as caught:
                writer.add_request({**row, **change})
            assert words in str(caught.value)
        with pytest.raises(UserError) as caught:
            writer.add_call(*recorded.calls[0])
        assert "request 0 has ended" in str(caught.value)
    assert check(tmp_path / "a.trace") == []
