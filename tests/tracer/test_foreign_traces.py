"""Traces that other writers made from the format's page: every layout the page allows is read alike."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.handmade import BLOCK, EXPERTS, LAYERS, Handmade
from tracer.check import check
from tracer.errors import TraceError
from tracer.parquet import open_trace
from tracer.schema import KINDS


def read_whole(trace):
    """Everything a trace yields, joined over segments."""
    segments = list(trace.segments())
    found = {
        "forward_id": np.concatenate([s.forwards.forward_id for s in segments]),
        "kind": np.concatenate([s.forwards.kind for s in segments]),
        "step": np.concatenate([s.forwards.step for s in segments]),
        "chosen_branch": np.concatenate([s.forwards.chosen_branch for s in segments]),
    }
    if segments[0].tokens is not None:
        for name in ("position", "state", "predicted_id", "confidence", "argmax_id", "argmax_confidence", "accepted"):
            found[name] = np.concatenate([getattr(s.tokens, name) for s in segments])
    for layer in trace.meta.model.moe_layers:
        layers = [s.layer(layer, with_scores=True) for s in segments]
        for name in ("expert_ids", "count", "gate_weights", "router_scores", "present"):
            arrays = [getattr(own, name) for own in layers]
            found[f"{name}{layer}"] = None if arrays[0] is None else np.concatenate(arrays)
    return found


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def assert_is(hand, trace):
    """The trace holds what the hand-made lists say."""
    found = read_whole(trace)
    assert found["forward_id"].tolist() == hand.column("forwards", "forward_id")
    assert [KINDS[k] for k in found["kind"]] == hand.column("forwards", "kind")
    assert found["step"].tolist() == hand.column("forwards", "step")
    assert found["position"].tolist() == hand.column("tokens", "position")
    assert found["state"].tolist() == hand.column("tokens", "state")
    assert found["accepted"].tolist() == hand.column("tokens", "accepted")
    assert found["argmax_id"].tolist() == hand.column("tokens", "predicted_id")
    for layer in LAYERS:
        np.testing.assert_array_equal(found[f"expert_ids{layer}"], np.concatenate(hand.cells(layer, "expert_ids")))
        np.testing.assert_array_equal(found[f"gate_weights{layer}"], np.concatenate(hand.cells(layer, "gate_weights")))
        np.testing.assert_array_equal(
            found[f"router_scores{layer}"], np.concatenate(hand.cells(layer, "router_scores"))
        )


def test_hand_written_trace_is_read_and_checked(tmp_path):
    hand = Handmade()
    path = hand.write(tmp_path / "hand.trace")
    assert check(path) == []
    trace = open_trace(path)
    assert_is(hand, trace)
    assert trace.first_block == {0: 1, 1: 1}
    assert trace.num_forwards == 8 and trace.num_segments == 2
    assert trace.num_decisions == 8 * 4 * len(LAYERS) * 2
    assert trace.meta.model.expert_bytes == {1: 384, 3: 400}
    assert trace.meta.routers[1].expert_bias is None
    assert trace.meta.routers[3].expert_bias.tolist() == np.linspace(0, 0.8, EXPERTS, dtype=np.float32).tolist()
    assert trace.meta.block_length == BLOCK and trace.meta.raw["a key of the future"] == [1, 2]
    assert {name: trace.has(name) for name in ("weights", "active", "scores", "confidence", "branches", "tokens")} == {
        "weights": True,
        "active": True,
        "scores": True,
        "confidence": True,
        "branches": False,
        "tokens": True,
    }


def test_arrow_types_of_other_writers(tmp_path):
    plain = read_whole(open_trace(Handmade().write(tmp_path / "plain.trace")))
    hand = Handmade()
    for column in ("expert_ids", "gate_weights", "router_scores", "score_experts", "routed"):
        hand.types["routing"][column] = pa.large_binary()
    hand.types["forwards"]["kind"] = pa.large_string()
    hand.types["requests"]["stop_reason"] = pa.dictionary(pa.int32(), pa.string())
    hand.types["forwards"]["request_id"] = pa.int64()
    path = hand.write(tmp_path / "large.trace")
    assert check(path) == []
    assert_same(read_whole(open_trace(path)), plain)
    hand.types["forwards"]["kind"] = pa.dictionary(pa.int8(), pa.string())
    assert_same(read_whole(open_trace(hand.write(tmp_path / "dictionary.trace"))), plain)


def test_a_trace_rewritten_by_polars(tmp_path):
    path = Handmade().write(tmp_path / "hand.trace")
    before = read_whole(open_trace(path))
    for part in path.glob("*/part-*.parquet"):
        pl.read_parquet(part).write_parquet(part, row_group_size=3)
    assert check(path) == []
    assert_same(read_whole(open_trace(path)), before)


@pytest.mark.parametrize(
    "options", [{"row_group_size": 1}, {"row_group_size": 5}, {"compression": "none"}, {"data_page_version": "2.0"}]
)
def test_row_groups_and_pages_of_other_writers(tmp_path, options):
    hand = Handmade()
    hand.write_options = options
    path = hand.write(tmp_path / "hand.trace")
    assert check(path) == []
    assert_is(hand, open_trace(path))


def test_optional_columns_may_be_missing(tmp_path):
    hand = Handmade()
    hand.meta["capture_level"] = "ids"
    del hand.meta["score_dtype"]
    for tables in hand.segments:
        for table, columns in (
            ("requests", ["dataset"]),
            ("forwards", ["chosen_branch", "duration_ns"]),
            ("tokens", ["argmax_id", "argmax_confidence"]),
            ("routing", ["router_scores", "score_experts", "routed"]),
        ):
            for column in columns:
                del tables[table][column]
        tables["routing"]["gate_weights"] = [None] * len(tables["routing"]["layer"])
    path = hand.write(tmp_path / "hand.trace")
    assert check(path) == []
    trace = open_trace(path)
    found = read_whole(trace)
    assert found["gate_weights1"] is None and found["router_scores1"] is None
    assert (found["chosen_branch"] == -1).all()
    assert found["argmax_id"].tolist() == hand.column("tokens", "predicted_id")
    assert not trace.has("weights") and not trace.has("scores") and not trace.has("active")
    assert trace.scan("cells").collect()["router_scores"].null_count() == 16
    assert trace.scan("routing").collect()["gate_weight"].null_count() == trace.num_decisions


def test_no_tokens_table(tmp_path):
    hand = Handmade()
    hand.meta["tables"].remove("tokens")
    for tables in hand.segments:
        del tables["tokens"]
    path = hand.write(tmp_path / "hand.trace")
    assert check(path) == []
    trace = open_trace(path)
    assert all(segment.tokens is None for segment in trace.segments())
    assert not trace.has("tokens") and not trace.has("confidence")


def test_active_columns_and_half_scores(tmp_path):
    hand = Handmade()
    hand.meta["capture_level"], hand.meta["score_dtype"] = "active", "float16"
    expected = {layer: [] for layer in LAYERS}
    for tables in hand.segments:
        routing = tables["routing"]
        for i, layer in enumerate(routing["layer"]):
            columns = np.union1d(routing["expert_ids"][i], [8]).astype("u1")
            scores = routing["router_scores"][i][:, columns].astype("<f2")
            routing["router_scores"][i], routing["score_experts"][i] = scores, columns
            wide = np.full((4, EXPERTS), np.nan, np.float32)
            wide[:, columns] = scores
            expected[layer].append(wide)
    path = hand.write(tmp_path / "hand.trace")
    assert check(path) == []
    found = read_whole(open_trace(path))
    for layer in LAYERS:
        np.testing.assert_array_equal(found[f"router_scores{layer}"], np.concatenate(expected[layer]))


@pytest.mark.parametrize("column", ["expert_ids", "gate_weights", "router_scores"])
def test_byte_planes(tmp_path, column):
    hand = Handmade()
    plain = read_whole(open_trace(hand.write(tmp_path / "plain.trace")))
    hand.meta["encodings"] = {column: "byte_planes"}
    for tables in hand.segments:
        cells = tables["routing"][column]
        for i, cell in enumerate(cells):
            cells[i] = cell.reshape(-1, 1).view("u1").T.tobytes()
    path = hand.write(tmp_path / "planes.trace")
    assert check(path) == []
    assert_same(read_whole(open_trace(path)), plain)


def test_routed_bitmap(tmp_path):
    hand = Handmade()
    mask = np.array([True, False, True, False])
    for tables in hand.segments:
        routing = tables["routing"]
        for i, layer in enumerate(routing["layer"]):
            if layer == 3:
                routing["routed"][i] = np.packbits(mask, bitorder="little")
                routing["expert_ids"][i][~mask] = 0
    path = hand.write(tmp_path / "hand.trace")
    assert check(path) == []
    trace = open_trace(path)
    found = read_whole(trace)
    assert found["count1"].tolist() == [2, 2, 2, 2] * 8
    assert found["count3"].tolist() == [2, 0, 2, 0] * 8
    assert (found["gate_weights3"][1::2] == 0).all() and np.isnan(found["router_scores3"][1::2]).all()
    assert trace.num_decisions == 8 * (4 + 2) * 2
    assert len(trace.scan("routing").collect()) == trace.num_decisions


def test_blocks_split_between_parts_are_joined(tmp_path):
    hand = Handmade()
    whole = read_whole(open_trace(hand.write(tmp_path / "whole.trace")))
    split = Handmade()
    split.segments = [piece for tables in hand.segments for piece in cut(tables, 2)]
    path = split.write(tmp_path / "split.trace")
    assert check(path) == []
    trace = open_trace(path)
    # calls 0, 1 | 2, 3 | 4, 5 | 6, 7: block 1 of each request lies across a cut
    assert len(list(path.glob("forwards/*"))) == 4
    assert [s.forwards.forward_id.tolist() for s in trace.segments()] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert_same(read_whole(trace), whole)


def cut(tables, calls):
    """A segment's lists in two: the first ``calls`` calls, and the rest with the requests."""
    first = tables["forwards"]["forward_id"][0] + calls
    low = {t: {c: [] for c in columns} for t, columns in tables.items()}
    high = {t: {c: [] for c in columns} for t, columns in tables.items()}
    for table, columns in tables.items():
        for row in range(len(next(iter(columns.values())))):
            late = table == "requests" or columns["forward_id"][row] >= first
            for column, values in columns.items():
                (high if late else low)[table][column].append(values[row])
    return low, high


def test_one_large_part_is_cut_between_blocks(tmp_path, monkeypatch):
    hand = Handmade()
    whole = read_whole(open_trace(hand.write(tmp_path / "whole.trace")))
    hand.segments = [
        {t: {c: hand.column(t, c) for c in columns} for t, columns in hand.segments[0].items()},
    ]
    hand.write_options = {"row_group_size": 3}
    path = hand.write(tmp_path / "one.trace")
    monkeypatch.setattr("tracer.files.segments.SEGMENT_DECISIONS", 4 * len(LAYERS) * 2)
    trace = open_trace(path)
    # a cut falls wherever no block is open: around each prefill
    assert [s.forwards.forward_id.tolist() for s in trace.segments()] == [[0], [1, 2, 3], [4], [5, 6, 7]]
    assert_same(read_whole(trace), whole)
    monkeypatch.setattr("tracer.files.columns.CACHE_BYTES", 0)
    monkeypatch.setattr("tracer.files.columns.STREAM_BYTES", 64)
    assert_same(read_whole(open_trace(path)), whole)


@pytest.mark.parametrize("cache", [0, 1 << 20])
def test_layers_are_read_from_several_threads(tmp_path, monkeypatch, cache):
    monkeypatch.setattr("tracer.files.columns.CACHE_BYTES", cache)
    hand = Handmade()
    hand.write_options = {"row_group_size": 3}
    trace = open_trace(hand.write(tmp_path / "hand.trace"))
    segments = list(trace.segments())
    jobs = [(segment, layer) for _ in range(20) for segment in segments for layer in LAYERS]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: job[0].layer(job[1], with_scores=True), jobs))
    for (segment, layer), own in zip(jobs, found):
        alone = segment.layer(layer, with_scores=True)
        np.testing.assert_array_equal(own.expert_ids, alone.expert_ids)
        np.testing.assert_array_equal(own.router_scores, alone.router_scores)


def test_a_layer_that_is_not_there(tmp_path):
    segment = next(open_trace(Handmade().write(tmp_path / "hand.trace")).segments())
    with pytest.raises(TraceError, match=r"layer 2 is not an MoE layer of the trace, which has 1, 3\."):
        segment.layer(2)


def test_layers_differ_by_kind(tmp_path):
    hand = Handmade()
    for tables in hand.segments:
        routing = tables["routing"]
        drop = [i for i, f in enumerate(routing["forward_id"]) if f % 4 == 0 and routing["layer"][i] == 3]
        for column in routing:
            routing[column] = [v for i, v in enumerate(routing[column]) if i not in drop]
    path = hand.write(tmp_path / "hand.trace")
    assert check(path) == []
    found = read_whole(open_trace(path))
    assert found["present3"].tolist() == [False, True, True, True] * 2
    assert found["present1"].all()
    assert found["count3"].reshape(8, 4)[::4].sum() == 0
    assert np.isnan(found["router_scores3"].reshape(8, 4, EXPERTS)[::4]).all()


def test_interrupted_request(tmp_path):
    hand = Handmade()
    for column in hand.segments[1]["requests"].values():
        column.clear()
    path = hand.write(tmp_path / "hand.trace")
    assert check(path) == []
    trace = open_trace(path)
    assert trace.requests["stop_reason"].to_list() == ["eos", "interrupted"]
    assert trace.requests["prompt_tokens"].to_list() == [5, None]
    assert trace.first_block == {0: 1, 1: 1}


def test_uncommitted_segment_is_ignored(tmp_path):
    path = Handmade().write(tmp_path / "hand.trace")
    (path / "forwards" / "part-00001.parquet").unlink()
    (path / "routing" / ".part-00001.parquet.tmp").write_bytes(b"half")
    assert check(path) == []
    trace = open_trace(path)
    assert trace.num_forwards == 4 and trace.requests["request_id"].to_list() == [0]
    assert trace.bytes_on_disk()["routing"] == (path / "routing" / "part-00000.parquet").stat().st_size


def test_no_segments_yet(tmp_path):
    hand = Handmade()
    hand.segments = []
    path = hand.write(tmp_path / "hand.trace")
    trace = open_trace(path)
    assert check(path) == [] and list(trace.segments()) == []
    assert trace.num_forwards == trace.num_decisions == trace.num_segments == 0
    assert trace.scan("routing").collect().is_empty() and trace.requests.is_empty()


def test_speculative_call(tmp_path):
    hand = Handmade()
    forwards, tokens, routing = (hand.segments[0][t] for t in ("forwards", "tokens", "routing"))
    # call 2 becomes two branches of two positions: 5 and 7; branch 1 knows 5 already, and accepts 7
    forwards["branches"][2], forwards["chosen_branch"][2] = 2, 1
    rows = slice(8, 12)
    tokens["position"][rows] = [5, 7, 5, 7]
    tokens["state"][rows] = [2, 2, 1, 2]
    tokens["accepted"][rows] = [True, True, False, True]
    forwards["num_masked"][2], forwards["num_accepted"][2] = 3, 2
    path = hand.write(tmp_path / "hand.trace")
    assert check(path) == []
    trace = open_trace(path)
    assert trace.has("branches")
    assert next(trace.segments()).forwards.chosen_branch.tolist() == [-1, -1, 1, -1]
    forwards["num_accepted"][2] = 1
    (fault,) = check(hand.write(tmp_path / "wrong.trace"))
    assert "forwards part-00000 row 2" in fault and "num_accepted is 1 where tokens gains 2" in fault
    assert len(routing["layer"]) == 8


def test_other_tools_read_the_cells(tmp_path):
    hand = Handmade()
    path = hand.write(tmp_path / "hand.trace")
    raw = pq.read_table(path / "routing" / "part-00000.parquet")["expert_ids"].to_pylist()
    assert open_trace(path).scan("cells").head(8).collect()["expert_ids"].to_list() == raw
