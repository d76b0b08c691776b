"""Traces that other writers made from the format's page: every layout the page allows is read alike."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.made_up.by_hand import BLOCK, COUNTS, EXPERTS, LAYERS, TOP_K, Handmade, write_counts
from tracer.checking import check
from tracer.errors import TraceError, UserError
from tracer.files.loads import read_loads, write_loads
from tracer.meta import checksum
from tracer.parquet import open_trace
from tracer.schema import KINDS, NOISE, PADDING
from tracer.summary import describe


def naive_padding(hand):
    """(padding rows, unique experts without and with padding): means over the layers of the calls that hold padding."""
    keys = zip(hand.column("tokens", "forward_id"), hand.column("tokens", "row"), strict=True)
    padding = {key for key, state in zip(keys, hand.column("tokens", "state"), strict=True) if state == PADDING}
    without, everything = {}, {}
    columns = ("forward_id", "layer", "row", "expert_ids", "count")
    for forward, layer, row, ids, count in zip(*(hand.column("routing", name) for name in columns), strict=True):
        if forward in {call for call, _ in padding}:
            real = ids[: TOP_K if count is None else count].tolist()
            everything.setdefault((forward, layer), set()).update(real)
            without.setdefault((forward, layer), set()).update([] if (forward, row) in padding else real)
    return (
        len(padding),
        sum(map(len, without.values())) / len(without),
        sum(map(len, everything.values())) / len(everything),
    )


FORWARD_COLUMNS = (
    "request_id", "kind", "block", "step", "row_start", "num_tokens", "kv_tokens", "num_masked", "num_accepted",
    "num_edited", "branches", "chosen_branch", "duration_ns",
)  # fmt: skip
TOKEN_COLUMNS = (
    "position", "token_id", "state", "predicted_id", "confidence", "argmax_id", "argmax_confidence", "accepted", "edited",
)  # fmt: skip


def read_whole(trace, **how):
    """Everything a trace yields, joined over segments."""
    segments = list(trace.segments())
    found = {"forward_id": np.concatenate([s.forwards.forward_id for s in segments])}
    for name in FORWARD_COLUMNS:
        found[name] = np.concatenate([getattr(s.forwards, name) for s in segments])
    if segments[0].tokens is not None:
        for name in TOKEN_COLUMNS:
            found[name] = np.concatenate([getattr(s.tokens, name) for s in segments])
    for layer in trace.meta.model.moe_layers:
        layers = [s.layer(layer, with_scores=True, **how) for s in segments]
        for name in ("expert_ids", "count", "gate_weights", "router_scores", "present"):
            arrays = [getattr(own, name) for own in layers]
            found[f"{name}{layer}"] = None if arrays[0] is None else np.concatenate(arrays)
    return found


def assert_same(left, right):
    """Two of what :func:`read_whole` gives are equal, types too."""
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def assert_same_tables(left, right):
    """The plain views of two traces are equal; the order of routing rows is the writer's own."""
    for table in (*left.meta.tables, "rows"):
        frames = [trace.scan(table).collect() for trace in (left, right)]
        if table == "rows":
            frames = [frame.sort("forward_id", "layer", "row") for frame in frames]
        assert frames[0].schema == frames[1].schema and frames[0].equals(frames[1]), table


def assert_is(hand, trace):
    """The trace holds what the hand-made lists say."""
    found = read_whole(trace)
    assert found["forward_id"].tolist() == hand.column("forwards", "forward_id")
    assert [KINDS[k] for k in found["kind"]] == hand.column("forwards", "kind")
    for name in FORWARD_COLUMNS:
        if name != "kind":
            wanted = hand.column("forwards", name)
            assert found[name].tolist() == [-1 if value is None else value for value in wanted], name
    for name in ("position", "token_id", "state", "predicted_id", "accepted", "edited"):
        assert found[name].tolist() == hand.column("tokens", name), name
    np.testing.assert_array_equal(found["confidence"], np.array(hand.column("tokens", "confidence"), np.float32))
    for name, like in (("argmax_id", "predicted_id"), ("argmax_confidence", "confidence")):
        pairs = zip(hand.column("tokens", name), hand.column("tokens", like), strict=True)
        wanted = [like if value is None else value for value, like in pairs]
        np.testing.assert_array_equal(found[name], np.array(wanted, found[name].dtype))
    for layer in LAYERS:
        for name in ("expert_ids", "gate_weights", "router_scores"):
            wanted = np.stack(hand.rows(layer, name))
            assert found[f"{name}{layer}"].dtype == wanted.dtype
            np.testing.assert_array_equal(found[f"{name}{layer}"], wanted)
        assert found[f"count{layer}"].tolist() == [TOP_K] * len(hand.rows(layer, "row"))


@pytest.mark.parametrize("experts", [EXPERTS, 256, 257])
def test_hand_written_trace_is_read_and_checked(tmp_path, experts):
    hand = Handmade(experts=experts)
    path = hand.write(tmp_path / "hand.trace")
    assert check(path) == []
    trace = open_trace(path)
    assert_is(hand, trace)
    assert trace.notes == []
    assert trace.first_block == {0: 1, 1: 1}
    assert trace.num_forwards == 8 and trace.num_segments == 2
    assert trace.num_decisions == 8 * 4 * len(LAYERS) * 2
    assert trace.meta.model.expert_bytes == {1: 384, 3: 400}
    assert trace.meta.routers[1].expert_bias is None
    if experts == EXPERTS:
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


def test_checksum_and_segments_of_meta_are_held(tmp_path):
    hand = Handmade()
    hand.meta["segments"] = 2
    hand.meta["checksum"] = checksum(hand.meta)
    path = hand.write(tmp_path / "hand.trace")
    assert check(path) == []
    assert_is(hand, open_trace(path))
    # the order of keys and the spaces between them are none of its business
    document = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(document, sort_keys=True, indent=3))
    assert check(path) == []


WIDER = {
    pa.uint8(): pa.int16(),
    pa.uint16(): pa.uint64(),
    pa.uint32(): pa.int64(),
    pa.int32(): pa.int64(),
    pa.float32(): pa.float64(),
}


def test_wider_numbers(tmp_path):
    plain = open_trace(Handmade().write(tmp_path / "plain.trace"))
    hand = Handmade()
    for columns in hand.types.values():
        columns.update({name: WIDER.get(kind, kind) for name, kind in columns.items()})
    path = hand.write(tmp_path / "wide.trace")
    assert check(path) == []
    assert_same(read_whole(open_trace(path)), read_whole(plain))
    assert_same_tables(open_trace(path), plain)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()], ids=str)
@pytest.mark.parametrize("nullable", [True, False])
def test_binaries_of_other_writers(tmp_path, kind, nullable):
    plain, active = Handmade(), Handmade()
    active.make_active()
    for number, hand in enumerate((plain, active)):
        before = open_trace(hand.write(tmp_path / f"{number}.trace"))
        hand.nullable = nullable
        for table, columns in (("routing", ("expert_ids", "gate_weights", "router_scores")),
                               ("scores", ("experts", "values"))):  # fmt: skip
            hand.types[table].update(dict.fromkeys(columns, kind))
        path = hand.write(tmp_path / f"{number}-other.trace")
        assert check(path) == []
        assert_same(read_whole(open_trace(path)), read_whole(before))
        assert_same_tables(open_trace(path), before)
        assert open_trace(path).has("weights")


def test_texts_and_dictionaries_of_other_writers(tmp_path):
    plain = open_trace(Handmade().write(tmp_path / "plain.trace"))
    hand = Handmade()
    hand.types["forwards"]["kind"] = pa.large_string()
    hand.types["requests"]["stop_reason"] = pa.dictionary(pa.int32(), pa.string())
    hand.types["routing"]["layer"] = pa.dictionary(pa.int32(), pa.uint16())
    path = hand.write(tmp_path / "large.trace")
    assert check(path) == []
    assert_same(read_whole(open_trace(path)), read_whole(plain))
    assert_same_tables(open_trace(path), plain)
    hand.types["forwards"]["kind"] = pa.dictionary(pa.int8(), pa.string())
    hand.types["routing"]["expert_ids"] = pa.dictionary(pa.int32(), pa.binary())
    path = hand.write(tmp_path / "dictionary.trace")
    assert check(path) == []
    assert_same(read_whole(open_trace(path)), read_whole(plain))
    assert_same_tables(open_trace(path), plain)


def test_a_trace_rewritten_by_polars(tmp_path):
    path = Handmade().write(tmp_path / "hand.trace")
    before = read_whole(open_trace(path))
    for part in path.glob("*/part-*.parquet"):
        pl.read_parquet(part).write_parquet(part, row_group_size=3)
    assert check(path) == []
    assert_same(read_whole(open_trace(path)), before)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"row_group_size": 1},
        {"row_group_size": 5},
        {"row_group_size": 16},
        {"compression": "none"},
        {"data_page_version": "2.0", "data_page_size": 1, "write_batch_size": 1},
        {"use_dictionary": False, "write_statistics": False, "write_page_checksum": True},
        {
            "use_dictionary": False,
            "column_encoding": {
                "forward_id": "DELTA_BINARY_PACKED",
                "row": "DELTA_BINARY_PACKED",
                "gate_weights": "BYTE_STREAM_SPLIT",
            },
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("layer_first", [False, True])
@pytest.mark.parametrize("active", [False, True])
def test_row_order_groups_and_encodings_of_other_writers(tmp_path, options, layer_first, active):
    hand, plain = Handmade(), Handmade()
    if active:
        hand.make_active()
        plain.make_active()
    if layer_first:
        hand.layer_first()
    path = hand.write(tmp_path / "hand.trace")
    for table in ["routing"] if "column_encoding" in options else hand.types:
        for part in path.glob(f"{table}/*"):
            pq.write_table(pq.read_table(part), part, **options)
    assert check(path) == []
    if not active:
        assert_is(hand, open_trace(path))
    assert_same(read_whole(open_trace(path)), read_whole(open_trace(plain.write(tmp_path / "plain.trace"))))


def rename(path, *names):
    """Call the parts of every table so, in order."""
    for folder in path.iterdir():
        if folder.is_dir():
            for part, name in zip(sorted(folder.iterdir()), names, strict=True):
                part.rename(folder / name)


def test_parts_go_by_the_numbers_in_their_names(tmp_path):
    hand = Handmade()
    path = hand.write(tmp_path / "hand.trace")
    rename(path, "data_2.parquet", "data_10.parquet")
    for content, name in ((b"half", ".data_1.parquet"), (b"", "data_3.parquet.tmp"), (b"words", "README.md")):
        (path / "routing" / name).write_bytes(content)
    assert check(path) == []
    trace = open_trace(path)
    assert_is(hand, trace)
    assert [part.name for part in trace.parts("routing")] == ["data_2.parquet", "data_10.parquet"]
    other = hand.write(tmp_path / "other.trace")
    rename(other, "data_10.parquet", "data_2.parquet")
    (fault,) = check(other)
    assert "forwards data_10 row 0 (forward 0): forward_id 0 follows 7, it must never decrease" in fault


@pytest.mark.parametrize(
    "names",
    [
        ("1-a.parquet", "1-b.parquet"),
        ("part-00007-c000.snappy.parquet", "part-00010-c000.snappy.parquet"),
        ("a9b10.parquet", "a10b2.parquet"),
        ("9.parquet", "x.parquet"),
    ],
)
def test_parts_of_any_names(tmp_path, names):
    hand = Handmade()
    path = hand.write(tmp_path / "hand.trace")
    rename(path, *names)
    assert check(path) == []
    assert_is(hand, open_trace(path))


def test_tables_cut_into_parts_differently(tmp_path):
    hand, active = Handmade(), Handmade()
    active.make_active()
    plain = read_whole(open_trace(active.write(tmp_path / "plain.trace")))
    # parts that end inside calls, inside a layer, and parts without rows
    cuts = {"forwards": [3], "tokens": [1, 6, 6, 30], "routing": [5, 6, 33, 34, 60], "requests": [], "scores": [1, 12]}
    for number, (own, layer_first) in enumerate([(hand, False), (hand, True), (active, False)]):
        if layer_first:
            own.layer_first()
        own.cuts = cuts
        own.names["tokens"], own.names["routing"] = "t-{}.parquet", "{}.parquet"
        path = own.write(tmp_path / f"{number}.trace")
        assert check(path) == []
        if own is active:
            assert_same(read_whole(open_trace(path)), plain)
        else:
            assert_is(hand, open_trace(path))
        assert len(open_trace(path).scan("routing").collect()) == open_trace(path).num_decisions == 128


def test_requests_of_a_call_in_two_parts(tmp_path):
    hand = Handmade()
    forwards = hand.segments[1]["forwards"]
    # calls 5 and 6 become one call of two requests
    forwards["forward_id"][2], forwards["row_start"][2], forwards["request_id"][2], forwards["step"][2] = 5, 4, 0, 2
    for table in ("tokens", "routing"):
        columns = hand.segments[1][table]
        for i, forward in enumerate(columns["forward_id"]):
            if forward == 6:
                columns["forward_id"][i], columns["row"][i] = 5, columns["row"][i] + 4
    hand.layer_first()
    whole = read_whole(open_trace(hand.write(tmp_path / "whole.trace")))
    hand.cuts["forwards"] = [6]
    path = hand.write(tmp_path / "cut.trace")
    assert check(path) == []
    assert_same(read_whole(open_trace(path)), whole)
    assert whole["row_start"].tolist() == [0, 0, 0, 0, 0, 0, 4, 0]


def test_optional_columns_may_be_missing(tmp_path):
    hand = Handmade()
    hand.meta["capture_level"] = "ids"
    for tables in hand.segments:
        for table, columns in (
            ("requests", ["dataset", "prompt_tokens", "generated_tokens"]),
            ("forwards", ["chosen_branch", "duration_ns", "kv_tokens", "num_masked", "num_accepted"]),
            ("tokens", ["argmax_id", "argmax_confidence"]),
            ("routing", ["router_scores"]),
        ):
            for column in columns:
                del tables[table][column]
        tables["routing"]["gate_weights"] = [None] * len(tables["routing"]["layer"])
    path = hand.write(tmp_path / "hand.trace")
    assert check(path) == []
    trace = open_trace(path)
    found = read_whole(trace)
    assert found["gate_weights1"] is None and found["router_scores1"] is None
    for name in ("chosen_branch", "duration_ns", "kv_tokens", "num_masked", "num_accepted"):
        assert (found[name] == -1).all()
    assert found["argmax_id"].tolist() == hand.column("tokens", "predicted_id")
    assert not trace.has("weights") and not trace.has("scores") and not trace.has("active")
    assert trace.requests["prompt_tokens"].to_list() == trace.requests["dataset"].to_list() == [None, None]
    rows = trace.scan("rows").collect()
    assert rows["router_scores"].null_count() == rows["gate_weights"].null_count() == rows["count"].null_count() == 64
    assert trace.scan("routing").collect()["gate_weight"].null_count() == trace.num_decisions
    # a column that is not there at all is as good as one of nulls
    for tables in hand.segments:
        del tables["routing"]["gate_weights"]
    bare = hand.write(tmp_path / "bare.trace")
    assert check(bare) == []
    assert open_trace(bare).scan("routing").collect().equals(trace.scan("routing").collect())
    assert not open_trace(bare).has("weights")


def test_unknown_counts_are_null(tmp_path):
    hand = Handmade()
    forwards, requests = hand.segments[1]["forwards"], hand.segments[0]["requests"]
    for name, row in (("kv_tokens", 1), ("num_masked", 2), ("num_accepted", 2)):
        forwards[name][row] = None
    requests["prompt_tokens"][0], requests["generated_tokens"][0], requests["first_block"][0] = None, None, 7
    path = hand.write(tmp_path / "hand.trace")
    # what is not known is held against nothing
    assert check(path) == []
    trace = open_trace(path)
    assert_is(hand, trace)
    assert trace.requests["prompt_tokens"].to_list() == [None, 5]
    assert trace.requests["generated_tokens"].to_list() == [None, 3]
    assert trace.notes == [
        "This trace does not say how long the cached prefixes were: attention to them costs nothing here.",
        "This trace does not say how many tokens each call gained: no figure counts tokens.",
    ]
    assert trace.scan("forwards").collect()["kv_tokens"].null_count() == 1


def test_an_argmax_of_its_own(tmp_path):
    hand = Handmade()
    tokens = hand.segments[0]["tokens"]
    tokens["argmax_id"][5], tokens["argmax_confidence"][5] = 99, 0.75
    path = hand.write(tmp_path / "hand.trace")
    assert check(path) == []
    assert_is(hand, open_trace(path))


def test_no_tokens_table(tmp_path):
    hand = Handmade()
    hand.meta["tables"].remove("tokens")
    for tables in hand.segments:
        del tables["tokens"]
    path = hand.write(tmp_path / "hand.trace")
    assert check(path) == []
    trace = open_trace(path)
    assert all(segment.tokens is None and segment.padding is None for segment in trace.segments())
    assert not trace.has("tokens") and not trace.has("confidence")
    assert trace.padding_rows == 0 and trace.notes == [] and trace.num_decisions == 128


@pytest.mark.parametrize("experts", [EXPERTS, 300])
def test_active_scores(tmp_path, experts):
    hand = Handmade(experts=experts)
    expected = {layer: np.full((32, experts), np.nan, np.float32) for layer in LAYERS}
    for layer in LAYERS:
        ids, scores = np.stack(hand.rows(layer, "expert_ids")), np.stack(hand.rows(layer, "router_scores"))
        for call in range(8):
            own = slice(4 * call, 4 * call + 4)
            kept = sorted({8, *ids[own].ravel().tolist()})
            expected[layer][own, kept] = scores[own][:, kept]
    hand.make_active()
    # a row whose scores were not recorded
    values = hand.segments[0]["scores"]["values"][3]
    values[2] = np.nan
    expected[3][6] = np.nan
    path = hand.write(tmp_path / "hand.trace")
    assert check(path) == []
    trace = open_trace(path)
    found = read_whole(trace)
    for layer in LAYERS:
        np.testing.assert_array_equal(found[f"router_scores{layer}"], expected[layer])
    assert trace.has("active") and not trace.has("scores")
    assert len(trace.scan("scores").collect()) == 16


def test_count(tmp_path):
    hand = Handmade()
    hand.add("routing", "count", None)
    counts = [2, 0, None, 1]
    for tables in hand.segments:
        routing = tables["routing"]
        for i, (layer, row) in enumerate(zip(routing["layer"], routing["row"], strict=True)):
            if layer == 3:
                routing["count"][i] = counts[row]
                # what is not real may be anything
                routing["expert_ids"][i][2 if counts[row] is None else counts[row] :] = 250
                routing["gate_weights"][i][2 if counts[row] is None else counts[row] :] = np.nan
    path = hand.write(tmp_path / "hand.trace")
    assert check(path) == []
    trace = open_trace(path)
    found = read_whole(trace)
    assert found["count1"].tolist() == [2, 2, 2, 2] * 8
    assert found["count3"].tolist() == [2, 0, 2, 1] * 8
    ids, weights = np.stack(hand.rows(3, "expert_ids")), np.stack(hand.rows(3, "gate_weights"))
    real = np.arange(2) < found["count3"][:, None]
    np.testing.assert_array_equal(found["expert_ids3"], np.where(real, ids, 0))
    np.testing.assert_array_equal(found["gate_weights3"], np.where(real, weights, np.float16(0)))
    assert np.isnan(found["router_scores3"][1::4]).all()
    np.testing.assert_array_equal(found["router_scores3"][3::4], np.stack(hand.rows(3, "router_scores"))[3::4])
    assert trace.num_decisions == 8 * (8 + 5)
    assert len(trace.scan("routing").collect()) == trace.num_decisions


def test_rows_whose_scores_were_not_recorded(tmp_path):
    hand = Handmade()
    for i in (0, 1, 13):
        hand.segments[0]["routing"]["router_scores"][i][:] = np.nan
    path = hand.write(tmp_path / "hand.trace")
    assert check(path) == []
    assert_is(hand, open_trace(path))
    assert open_trace(path).has("scores")


def test_noise_is_undecided_and_edits_are_counted(tmp_path):
    hand = Handmade()
    for tables in hand.segments:
        tokens = tables["tokens"]
        tokens["state"] = [NOISE if state == 2 else state for state in tokens["state"]]
    # token 6 was decided in call 1 and is another one after call 2; 4 is prompt
    hand.segments[0]["tokens"]["edited"][10] = True
    hand.segments[0]["forwards"]["num_edited"][2] = 1
    path = hand.write(tmp_path / "hand.trace")
    assert check(path) == []
    trace = open_trace(path)
    assert_is(hand, trace)
    assert trace.notes == [] and trace.num_decisions == 128


PADDED = ((0, 3), (1, 1), (7, 2), (7, 3))  # call and row


def padded():
    """The handmade trace with some rows of padding, and some rows that have fewer experts or none."""
    hand = Handmade()
    hand.add("routing", "count", None)
    for tables in hand.segments:
        forwards, tokens, routing = tables["forwards"], tables["tokens"], tables["routing"]
        for i, key in enumerate(zip(tokens["forward_id"], tokens["row"], strict=True)):
            if key in PADDED:
                forwards["num_masked"][key[0] % 4] -= tokens["state"][i] == 2
                tokens["position"][i], tokens["state"][i], tokens["accepted"][i] = -1, PADDING, False
        for i, forward in enumerate(routing["forward_id"]):
            routing["count"][i] = [2, None, 1, 2, 0][(3 * forward + i) % 5]
    return hand


@pytest.mark.parametrize("layer_first", [False, True])
def test_padding_is_recorded_and_counted_by_nothing(tmp_path, layer_first):
    hand = padded()
    if layer_first:
        hand.layer_first()
    path = hand.write(tmp_path / "hand.trace")
    assert check(path) == []
    trace = open_trace(path)
    rows, without, with_it = naive_padding(hand)
    assert rows == trace.padding_rows == len(PADDED)
    assert trace.notes == [
        f"Padding is counted nowhere: 4 of 32 rows ({without:.1f} unique experts a layer there, {with_it:.1f} with it)."
    ]
    assert round(without, 1) < round(with_it, 1)
    padding = np.array([(row // 4, row % 4) in PADDED for row in range(32)])
    recorded, counted = read_whole(trace, with_padding=True), read_whole(trace)
    assert (recorded["state"] == PADDING).tolist() == padding.tolist()
    np.testing.assert_array_equal(np.concatenate([
        np.zeros(segment.forwards.num_rows, bool) if segment.padding is None else segment.padding
        for segment in trace.segments()
    ]), padding)  # fmt: skip
    decisions = {"recorded": 0, "counted": 0}
    for layer in LAYERS:
        count = np.array([2 if own is None else own for own in hand.rows(layer, "count")])
        decisions["recorded"] += count.sum()
        decisions["counted"] += count[~padding].sum()
        np.testing.assert_array_equal(recorded[f"count{layer}"], count)
        np.testing.assert_array_equal(counted[f"count{layer}"], np.where(padding, 0, count))
        real = np.arange(2) < count[:, None]
        for found, own in ((recorded, real), (counted, real & ~padding[:, None])):
            for name in ("expert_ids", "gate_weights"):
                values = np.stack(hand.rows(layer, name))
                np.testing.assert_array_equal(found[f"{name}{layer}"], np.where(own, values, values.dtype.type(0)))
            scores = np.stack(hand.rows(layer, "router_scores"))
            np.testing.assert_array_equal(
                found[f"router_scores{layer}"], np.where(own.any(axis=1)[:, None], scores, np.float32(np.nan))
            )
    assert 0 < decisions["counted"] == trace.num_decisions < decisions["recorded"]
    # the tables themselves are given as they are
    assert len(trace.scan("routing").collect()) == decisions["recorded"]
    assert len(trace.scan("rows").collect()) == 64
    assert describe(trace)["counts"]["padding_rows"] == len(PADDED)


def test_padding_without_counts(tmp_path):
    hand = padded()
    hand.add("routing", "count", TOP_K)
    rows, without, with_it = naive_padding(hand)
    for tables in hand.segments:
        del tables["routing"]["count"]
    path = hand.write(tmp_path / "hand.trace")
    assert check(path) == []
    trace = open_trace(path)
    assert trace.num_decisions == (32 - rows) * len(LAYERS) * TOP_K
    assert trace.notes == [
        f"Padding is counted nowhere: {rows} of 32 rows "
        f"({without:.1f} unique experts a layer there, {with_it:.1f} with it)."
    ]


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


@pytest.mark.parametrize("layer_first", [False, True])
@pytest.mark.parametrize("cache", [0, 1 << 20])
def test_one_large_part_is_cut_between_blocks(tmp_path, monkeypatch, layer_first, cache):
    monkeypatch.setattr("tracer.files.parts.CACHE_BYTES", cache)
    hand = Handmade()
    whole = read_whole(open_trace(hand.write(tmp_path / "whole.trace")))
    hand.segments = [
        {t: {c: hand.column(t, c) for c in columns} for t, columns in hand.segments[0].items()},
    ]
    if layer_first:
        hand.layer_first()
    hand.write_options = {"row_group_size": 3}
    path = hand.write(tmp_path / "one.trace")
    monkeypatch.setattr("tracer.files.reader.SEGMENT_DECISIONS", 4 * len(LAYERS) * 2)
    trace = open_trace(path)
    # a cut falls wherever no block is open: around each prefill
    assert [s.forwards.forward_id.tolist() for s in trace.segments()] == [[0], [1, 2, 3], [4], [5, 6, 7]]
    assert_same(read_whole(trace), whole)


@pytest.mark.parametrize("cache", [0, 1 << 20])
def test_layers_are_read_from_several_threads(tmp_path, monkeypatch, cache):
    monkeypatch.setattr("tracer.files.parts.CACHE_BYTES", cache)
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


@pytest.mark.parametrize("active", [False, True])
def test_layers_differ_by_kind(tmp_path, active):
    hand = Handmade()
    if active:
        hand.make_active()
    for tables in hand.segments:
        for table in ("routing", "scores") if active else ("routing",):
            columns = tables[table]
            drop = [i for i, f in enumerate(columns["forward_id"]) if f % 4 == 0 and columns["layer"][i] == 3]
            for column in columns:
                columns[column] = [v for i, v in enumerate(columns[column]) if i not in drop]
    path = hand.write(tmp_path / "hand.trace")
    assert check(path) == []
    found = read_whole(open_trace(path))
    assert found["present3"].tolist() == [False, True, True, True] * 2
    assert found["present1"].all()
    assert found["count3"].reshape(8, 4)[::4].sum() == 0
    assert np.isnan(found["router_scores3"].reshape(8, 4, EXPERTS)[::4]).all()
    assert not np.isnan(found["router_scores3"].reshape(8, 4, EXPERTS)[1::4]).all(axis=-1).any()
    ids = found["expert_ids3"].reshape(8, 4, TOP_K)[[1, 2, 3, 5, 6, 7]]
    np.testing.assert_array_equal(ids.reshape(-1, TOP_K), np.stack(hand.rows(3, "expert_ids")))


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
    assert trace.notes == []


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("layer_first", [False, True])
def test_left_overs_of_an_unfinished_trace_are_ignored(tmp_path, active, layer_first):
    def make(name, complete):
        hand = Handmade()
        if active:
            hand.make_active()
        # segments of calls 0 to 3, of 4 and 5, of 6 and 7 with the row of request 1
        hand.segments = [hand.segments[0], *cut(hand.segments[1], 2)]
        if layer_first:
            hand.layer_first()
        hand.meta["complete"] = complete
        return hand.write(tmp_path / name)

    path = make("hand.trace", False)
    sentence = f"{path}: this trace was not finished: 2 requests of 2 ended."
    assert check(path) == [sentence] and open_trace(path).notes == [sentence]
    (path / "forwards" / "part-00002.parquet").unlink()
    (path / "routing" / ".part-00003.parquet.tmp").write_bytes(b"half")
    sentence = f"{path}: this trace was not finished: 1 requests of 2 ended."
    assert check(path) == [sentence]
    trace = open_trace(path)
    assert trace.notes == [sentence]
    assert trace.num_forwards == 6 and trace.num_rows == 24
    assert trace.requests["stop_reason"].to_list() == ["eos", "interrupted"]
    assert trace.num_decisions == 6 * 4 * len(LAYERS) * TOP_K == len(trace.scan("routing").collect())
    whole = read_whole(open_trace(make("whole.trace", True)))
    found = read_whole(trace)
    for name, values in found.items():
        np.testing.assert_array_equal(values, whole[name][: len(values)], err_msg=name)
    assert len(found["forward_id"]) == 6 and len(found["expert_ids3"]) == 24


def test_only_left_overs(tmp_path):
    hand = Handmade()
    hand.meta["complete"] = False
    path = hand.write(tmp_path / "hand.trace")
    for part in path.glob("forwards/*"):
        part.unlink()
    assert check(path) == [f"{path}: this trace was not finished: 0 requests of 0 ended."]
    trace = open_trace(path)
    assert list(trace.segments()) == [] and trace.num_decisions == trace.num_forwards == 0
    assert trace.requests.is_empty()


def test_no_segments_yet(tmp_path):
    hand = Handmade()
    hand.segments = []
    hand.meta["complete"] = False
    path = hand.write(tmp_path / "hand.trace")
    trace = open_trace(path)
    assert check(path) == [f"{path}: this trace was not finished: 0 requests of 0 ended."]
    assert list(trace.segments()) == []
    assert trace.num_forwards == trace.num_decisions == trace.num_segments == 0
    assert trace.scan("routing").collect().is_empty() and trace.requests.is_empty()
    # a finished one says that it has none
    hand.meta.update(complete=True, segments=0)
    path = hand.write(tmp_path / "finished.trace")
    assert check(path) == [] and list(open_trace(path).segments()) == []


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
    assert len(routing["layer"]) == 32


def test_other_tools_read_the_rows(tmp_path):
    hand = Handmade()
    path = hand.write(tmp_path / "hand.trace")
    raw = pq.read_table(path / "routing" / "part-00000.parquet")["expert_ids"].to_pylist()
    assert open_trace(path).scan("rows").head(32).collect()["expert_ids"].to_list() == raw
    frame = pl.read_parquet(path / "routing" / "*.parquet")
    ids = frame.select(pl.col("expert_ids").bin.reinterpret(dtype=pl.Array(pl.UInt8, TOP_K))).to_series()
    np.testing.assert_array_equal(ids.to_numpy(), np.stack(hand.column("routing", "expert_ids")))
    scores = np.frombuffer(b"".join(frame["router_scores"]), "<f4").reshape(-1, EXPERTS)
    np.testing.assert_array_equal(scores, np.stack(hand.column("routing", "router_scores")))


def loads_meta():
    meta = Handmade().meta
    del meta["schema_version"], meta["created"], meta["complete"], meta["tables"]
    return {**meta, "capture_level": "ids"}


@pytest.mark.parametrize("options", [{}, {"row_group_size": 1}, {"row_group_size": 3}])
@pytest.mark.parametrize("sizes", [(4,), (1, 3), (2, 0, 2)])
def test_a_trace_of_counts_alone(tmp_path, options, sizes):
    path = write_counts(tmp_path / "hand.trace", sizes=sizes, **options)
    assert check(path) == []
    trace = open_trace(path)
    steps, counts = trace.loads
    assert steps.tolist() == [3, 4, 9, 10] and steps.dtype == counts.dtype == np.uint32
    np.testing.assert_array_equal(counts, COUNTS)
    assert len(trace.scan("loads").collect()) == 8
    with pytest.raises(UserError, match="holds counts only"):
        _ = trace.forwards
    with pytest.raises(TraceError, match="has no loads table: it holds calls"):
        _ = open_trace(Handmade().write(tmp_path / "calls.trace")).loads


def test_counts_written_and_read(tmp_path):
    write_loads(tmp_path / "a.trace", loads_meta(), COUNTS.astype(np.int64))
    assert check(tmp_path / "a.trace") == []
    trace = open_trace(tmp_path / "a.trace")
    steps, counts = read_loads(trace.path, trace.meta)
    assert steps.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(counts, COUNTS)
    assert trace.meta.complete and trace.meta.segments == 1 and trace.meta.tables == ("loads",)
    with pytest.raises(UserError, match=r"a\.trace"):
        write_loads(tmp_path / "a.trace", loads_meta(), COUNTS)
    write_loads(tmp_path / "a.trace", loads_meta(), COUNTS[:2], force=True)
    assert len(open_trace(tmp_path / "a.trace").loads[0]) == 2
    write_loads(tmp_path / "none.trace", loads_meta(), COUNTS[:0])
    assert check(tmp_path / "none.trace") == []
    assert open_trace(tmp_path / "none.trace").loads[1].shape == (0, 2, EXPERTS)
    for wrong in (COUNTS[:, :1], COUNTS.astype(float), COUNTS.astype(int) - 1):
        with pytest.raises(UserError, match="counts must be whole numbers of at least 0"):
            write_loads(tmp_path / "wrong.trace", loads_meta(), wrong)
    assert not (tmp_path / "wrong.trace").exists()
