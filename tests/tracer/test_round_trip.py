"""What TraceWriter is given is what open_trace gives back, segment by segment, slots apart."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tracer.recorded import record
from tracer.check import check
from tracer.errors import UserError
from tracer.parquet import TraceWriter, open_trace
from tracer.schema import KINDS


def naive_rows(recorded):
    """The rows of all calls as the format means them: per layer and row a dict of expert -> weight, and scores by expert."""
    meta = recorded.meta
    experts = meta["model"]["num_experts"]
    rows = {layer: [] for layer in meta["model"]["moe_layers"]}
    for _, _, routing in recorded.calls:
        for layer, cell in routing.items():
            for r in range(len(cell["expert_ids"])):
                if cell["routed"] is not None and not cell["routed"][r]:
                    rows[layer].append(({}, None))
                    continue
                weights = cell["gate_weights"]
                chosen = {
                    int(e): None if weights is None else np.float16(weights[r][k])
                    for k, e in enumerate(cell["expert_ids"][r])
                }
                score = None
                if cell["router_scores"] is not None:
                    columns = range(experts) if cell["score_experts"] is None else cell["score_experts"]
                    score = {int(e): cell["router_scores"][r][c] for c, e in enumerate(columns)}
                rows[layer].append((chosen, score))
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
            for r in range(len(own.count)):
                chosen = {
                    int(own.expert_ids[r, k]): None if own.gate_weights is None else own.gate_weights[r, k]
                    for k in range(own.count[r])
                }
                score = None
                if own.router_scores is not None and own.count[r]:
                    score = {e: s for e, s in enumerate(own.router_scores[r]) if not np.isnan(s)}
                rows[layer].append((chosen, score))
    return rows


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    geometry=st.sampled_from([(1, 1), (2, 1), (3, 3), (9, 2), (9, 8), (300, 3)]),
    level=st.sampled_from(["ids", "active", "scores"]),
    batch=st.integers(1, 3),
    weights=st.booleans(),
    tokens=st.booleans(),
    some_unrouted=st.booleans(),
    branches=st.integers(1, 2),
    segment_forwards=st.integers(1, 20),
    encoding=st.sampled_from(["plain", "byte_planes", "changes"]),
    id_dtype=st.sampled_from([np.int64, np.uint16, np.int32]),
)
def test_round_trip(seed, geometry, level, batch, segment_forwards, encoding, **options):
    rng = np.random.default_rng(seed)
    recorded = record(rng, num_experts=geometry[0], top_k=geometry[1], level=level, batch=batch, **options)
    recorded.meta["encodings"] = dict.fromkeys(("expert_ids", "gate_weights"), encoding)
    if encoding != "changes":
        recorded.meta["encodings"] |= dict.fromkeys(("router_scores", "score_experts"), encoding)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.trace"
        with TraceWriter(path, recorded.meta, segment_forwards=segment_forwards) as writer:
            recorded.write(writer)
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
    top_k = recorded.meta["model"]["top_k"]
    assert trace.num_decisions == top_k * sum(bool(chosen) for own in rows.values() for chosen, _ in own)


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


@pytest.mark.parametrize("encoding", ["plain", "byte_planes", "changes"])
def test_calls_of_any_number_types_and_strides(tmp_path, encoding):
    recorded = record(np.random.default_rng(6), top_k=3, layers=(1, 2, 4))
    recorded.meta["encodings"] = dict.fromkeys(("expert_ids", "gate_weights"), encoding)
    kinds = [(np.uint8, np.float16), (np.int16, np.float32), (np.uint8, np.float64), (np.uint64, np.float16)]
    for number, (parts, tokens, routing) in enumerate(recorded.calls):
        # layer 1 has no weights, and prefills, which come first, no other layer
        routing[1]["gate_weights"] = None
        if parts[0]["kind"] == "prefill":
            del routing[2], routing[4]
        for n, (layer, cell) in enumerate(routing.items()):
            # first all alike, then of types that differ from layer to layer
            ids, weights = kinds[n % (1 + number // 4)]
            cell["expert_ids"] = cell["expert_ids"].astype(ids)
            if layer > 1:
                cell["gate_weights"] = cell["gate_weights"].astype(weights)
            if number == 4 + layer:
                cell["expert_ids"] = np.asfortranarray(cell["expert_ids"])
            if number == 8:
                cell.update({k: v.tolist() for k, v in cell.items() if v is not None})
        for column, values in tokens.items():
            narrow = values.astype(np.int16) if values.dtype.kind == "i" else values
            tokens[column] = [narrow, np.repeat(values, 2)[::2], values.tolist(), values][number % 4]
    with TraceWriter(tmp_path / "a.trace", recorded.meta) as writer:
        recorded.write(writer)
    assert check(tmp_path / "a.trace") == []
    assert_tables(tmp_path / "a.trace", recorded)
    tidy = open_trace(tmp_path / "a.trace").scan("routing").collect()
    rows = [
        (number, layer, r, int(e), None if weights is None else float(np.float16(weights[r][k])))
        for number, (_, _, routing) in enumerate(recorded.calls)
        for layer, cell in routing.items()
        for weights in [cell["gate_weights"]]
        for r, ids in enumerate(cell["expert_ids"])
        for k, e in enumerate(ids)
    ]
    found = tidy.select("forward_id", "layer", "row", "expert_id", "gate_weight").rows()
    assert sorted(found, key=str) == sorted(rows, key=str)
    assert any(weight is None for *_, weight in rows) and any(weight for *_, weight in rows)


def test_half_scores(tmp_path):
    recorded = record(np.random.default_rng(1), level="scores", batches=1)
    recorded.meta["score_dtype"] = "float16"
    with TraceWriter(tmp_path / "a.trace", recorded.meta) as writer:
        recorded.write(writer)
    assert check(tmp_path / "a.trace") == []
    (segment,) = open_trace(tmp_path / "a.trace").segments()
    expected = np.concatenate([routing[2]["router_scores"] for _, _, routing in recorded.calls])
    np.testing.assert_array_equal(segment.layer(2, with_scores=True).router_scores, expected.astype(np.float16))


def test_layers_by_kind_and_weights_of_some_calls(tmp_path):
    recorded = record(np.random.default_rng(2), layers=(1, 2, 5), level="active", some_unrouted=True)
    for parts, _, routing in recorded.calls:
        if parts[0]["kind"] == "prefill":
            del routing[1], routing[2]
        else:
            del routing[5]
    with TraceWriter(tmp_path / "a.trace", recorded.meta, segment_forwards=3) as writer:
        recorded.write(writer)
    assert check(tmp_path / "a.trace") == []
    tidy = open_trace(tmp_path / "a.trace").scan("routing").collect()
    rows = [
        (number, layer, r, int(e), float(np.float16(cell["gate_weights"][r][k])))
        for number, (_, _, routing) in enumerate(recorded.calls)
        for layer, cell in routing.items()
        for r in range(len(cell["expert_ids"]))
        if cell["routed"][r]
        for k, e in enumerate(cell["expert_ids"][r])
    ]
    found = tidy.select("forward_id", "layer", "row", "expert_id", "gate_weight").rows()
    assert sorted(found) == sorted(rows)


def test_a_huge_block_is_cut_and_put_together(tmp_path):
    recorded = record(np.random.default_rng(3), batches=1, batch=1, layers=(1,))
    size = 3 * 2 * (8 + 2) + 3 * 26
    with TraceWriter(tmp_path / "a.trace", recorded.meta, max_buffer_bytes=2 * size) as writer:
        recorded.write(writer)
    path = tmp_path / "a.trace"
    parts = len(list(path.glob("forwards/part-*")))
    trace = open_trace(path)
    assert check(path) == [] and parts == len(recorded.calls) == 7
    assert [s.forwards.forward_id.tolist() for s in trace.segments()] == [[0], [1, 2, 3], [4, 5, 6]]
    assert read_rows(path) == naive_rows(recorded)


def test_cells_are_split_into_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr("tracer.files.encode.ROW_GROUP_BYTES", 500)
    recorded = record(np.random.default_rng(4), level="scores", some_unrouted=True)
    with TraceWriter(tmp_path / "a.trace", recorded.meta) as writer:
        recorded.write(writer)
    part = next(open_trace(tmp_path / "a.trace").parts("routing"))
    assert part.file.metadata.num_row_groups > 5
    assert check(tmp_path / "a.trace") == []
    assert read_rows(tmp_path / "a.trace") == naive_rows(recorded)


def changed_part(**values):
    return lambda parts, tokens, routing: ([{**parts[0], **values}, *parts[1:]], tokens, routing)


def changed_tokens(**values):
    return lambda parts, tokens, routing: (parts, {**tokens, **values}, routing)


def changed_cell(**values):
    return lambda parts, tokens, routing: (parts, tokens, {**routing, 2: {**routing[2], **values}})


def without(column):
    return lambda parts, tokens, routing: (
        [{k: v for k, v in parts[0].items() if k != column}, *parts[1:]], tokens, routing,
    )  # fmt: skip


BAD_CALLS = {
    "call 1: block is missing.": without("block"),
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
    "call 1: it has no layer.": lambda p, t, r: (p, t, {}),
    "call 1: layer 3 is not among model.moe_layers.": lambda p, t, r: (p, t, {**r, 3: r[2]}),
    "call 1: parts must hold one entry a request.": lambda p, t, r: ([], t, r),
    "call 1, layer 2: expert_ids must be whole numbers of shape (6, 2), not float64 of shape (6, 2).": changed_cell(
        expert_ids=np.zeros((6, 2))
    ),
    "call 1, layer 2: expert_ids must be whole numbers of shape (6, 2), not int64 of shape (6, 3).": changed_cell(
        expert_ids=np.zeros((6, 3), np.int64)
    ),
    "call 1, layer 1: expert_ids must be whole numbers of shape (6, 2), not int64 of shape (5, 2).": lambda p, t, r: (
        p,
        t,
        {1: {"expert_ids": np.zeros((5, 2), np.int64)}, 2: {"expert_ids": np.zeros((7, 2), np.int64)}},
    ),
    "call 1, layer 2: gate_weights must be floats of shape (6, 2), not int64 of shape (6, 2).": changed_cell(
        gate_weights=np.zeros((6, 2), np.int64)
    ),
    "call 1, layer 2: routed must be booleans of shape (6,), not bool of shape (5,).": changed_cell(
        routed=np.ones(5, bool)
    ),
    "call 1, layer 2: capture level ids keeps no router_scores.": changed_cell(router_scores=np.zeros((6, 9))),
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
    "call 1, layer 2, row 3: expert ids [0, 9] must lie in 0..8.": changed_cell(expert_ids=[[0, 1]] * 3 + [[0, 9]] * 3),
    "call 1, layer 2, row 0: expert ids [-1, 1] must lie in 0..8.": changed_cell(expert_ids=[[-1, 1]] * 6),
    "call 1, layer 2, row 5: expert ids [4, 4] are not distinct.": changed_cell(expert_ids=[[0, 1]] * 5 + [[4, 4]]),
    "call 1, layer 2, row 0: float16 weights [inf, 1.0] are not finite.": changed_cell(gate_weights=[[1e6, 1.0]] * 6),
    "call 1, layer 2, row 1: float16 weights [-1.0, 1.0] must not be negative.": changed_cell(
        gate_weights=[[1.0, 1.0]] + [[-1.0, 1.0]] * 5
    ),
    "call 1, row 4: position 3 stands twice in one request and branch.": changed_tokens(position=[3, 4, 5, 3, 3, 5]),
    "call 1, row 2: padding rows, and no others, must have position -1.": changed_tokens(position=[3, 4, -1, 3, 4, 5]),
    "call 1, row 0: state 4 or position 3 is out of range.": changed_tokens(state=[4] * 6),
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
    assert check(tmp_path / "a.trace") == [] and open_trace(tmp_path / "a.trace").num_forwards == 0
    assert not open_trace(tmp_path / "a.trace").meta.complete


@pytest.mark.parametrize(
    ("level", "change", "words"),
    [
        ("scores", {"router_scores": np.zeros((6, 8))}, "router_scores must be floats of shape (6, 9)"),
        ("scores", {"router_scores": None}, "capture level scores needs router_scores of all experts"),
        ("scores", {"score_experts": np.arange(9)}, "capture level scores needs router_scores of all experts"),
        ("active", {"score_experts": None}, "capture level active needs router_scores and score_experts"),
        ("active", {"score_experts": np.array([2, 1])}, "score_experts must be ascending expert ids below 9"),
        ("active", {"score_experts": np.array([8, 9])}, "score_experts must be ascending expert ids below 9"),
    ],
)
def test_scores_must_fit_the_level(tmp_path, level, change, words):
    recorded = record(np.random.default_rng(6), level=level, batches=1)
    with TraceWriter(tmp_path / "a.trace", recorded.meta) as writer:
        recorded.write(writer, 0, 1)
        with pytest.raises(UserError) as caught:
            writer.add_call(*changed_cell(**change)(*recorded.calls[1]))
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
