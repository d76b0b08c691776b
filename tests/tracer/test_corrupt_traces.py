"""Every way a trace can break its format gives one sentence that names table, part and row, before a kernel sees it."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.handmade import Handmade
from tracer.check import check
from tracer.errors import TraceError
from tracer.parquet import open_trace


def read_everything(path):
    trace = open_trace(path)
    _ = trace.requests
    for segment in trace.segments():
        _ = segment.tokens
        for layer in segment.layers:
            segment.layer(layer, with_scores=True)


def refused(path):
    """The one sentence that reading stops with; check must report it too."""
    with pytest.raises(TraceError) as caught:
        read_everything(path)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    assert sentence in check(path)
    return sentence


def second(hand, table):
    """Columns of the table's second part; its calls are 4 to 7, its cells 0 to 7 alternate between layers 1 and 3."""
    return hand.segments[1][table]


def edit(table, column, row, value):
    def apply(hand):
        second(hand, table)[column][row] = value

    return apply


def cell(column, row, change):
    def apply(hand):
        cells = second(hand, "routing")[column]
        cells[row] = change(cells[row].copy())

    return apply


def put(index, value):
    def change(array):
        array[index] = value
        return array

    return change


def swap_rows(table, one, two):
    def apply(hand):
        for values in second(hand, table).values():
            values[one], values[two] = values[two], values[one]

    return apply


def drop_row(table, row):
    def apply(hand):
        for values in second(hand, table).values():
            del values[row]

    return apply


def drop_column(table, column):
    def apply(hand):
        del second(hand, table)[column]

    return apply


FAULTS = {
    "id out of range": (
        cell("expert_ids", 3, put((2, 1), 9)),
        ["routing part-00001 row 3", "forward 5, token row 2", "must be below 9"],
    ),
    "ids not distinct": (
        cell("expert_ids", 2, lambda ids: put((1, 1), ids[1, 0])(ids)),
        ["routing part-00001 row 2", "forward 5, token row 1", "not distinct"],
    ),
    "cell too short": (
        cell("expert_ids", 4, lambda ids: ids[:3]),
        ["routing part-00001 row 4", "expert_ids has 6 bytes and must have 8"],
    ),
    "cell too long": (
        cell("gate_weights", 7, lambda w: np.concatenate((w, w))),
        ["routing part-00001 row 7", "gate_weights has 32 bytes and must have 16"],
    ),
    "null cell": (edit("routing", "expert_ids", 5, None), ["routing part-00001 row 5", "expert_ids is null"]),
    "null among weights": (
        edit("routing", "gate_weights", 5, None),
        ["routing part-00001 row 5", "gate_weights is null"],
    ),
    "weight not a number": (
        cell("gate_weights", 6, put((3, 0), np.nan)),
        ["routing part-00001 row 6", "forward 7, token row 3", "not finite"],
    ),
    "weight infinite": (cell("gate_weights", 6, put((3, 0), -np.inf)), ["routing part-00001 row 6", "not finite"]),
    "weight negative": (
        cell("gate_weights", 0, put((0, 1), -0.5)),
        ["routing part-00001 row 0", "forward 4, token row 0", "must not be negative"],
    ),
    "score not finite": (
        cell("router_scores", 1, put((2, 8), np.nan)),
        ["routing part-00001 row 1", "forward 4, token row 2", "not finite"],
    ),
    "score cell short": (
        cell("router_scores", 1, lambda s: s[:, :8]),
        ["routing part-00001 row 1", "router_scores has 128 bytes and must have 144"],
    ),
    "scores missing": (
        edit("routing", "router_scores", 1, None),
        ["routing part-00001 row 1", "router_scores is null"],
    ),
    "score columns unsorted": (
        lambda hand: (
            edit("routing", "score_experts", 1, np.array([3, 2, 5], "u1"))(hand),
            cell("router_scores", 1, lambda s: s[:, :3])(hand),
        ),
        ["routing part-00001 row 1", "score_experts", "ids must ascend and stay below 9"],
    ),
    "score columns out of range": (
        lambda hand: (
            edit("routing", "score_experts", 1, np.array([3, 9], "u1"))(hand),
            cell("router_scores", 1, lambda s: s[:, :2])(hand),
        ),
        ["routing part-00001 row 1", "score_experts", "ids must ascend and stay below 9"],
    ),
    "bitmap of a wrong length": (
        edit("routing", "routed", 2, b"\x01\x02"),
        ["routing part-00001 row 2", "routed has 2 bytes and must have 1"],
    ),
    "routing unsorted": (swap_rows("routing", 2, 3), ["routing part-00001 row 3", "out of order"]),
    "routing of an unknown call": (
        edit("routing", "forward_id", 7, 9),
        ["routing part-00001 row 7", "forward 9 is not in the forwards part"],
    ),
    "routing of an unknown layer": (
        edit("routing", "layer", 7, 4),
        ["routing part-00001 row 7", "layer 4 is not among"],
    ),
    "routing row missing": (
        drop_row("routing", 5),
        ["routing part-00001 row 4", "forward 6 has not the layers that denoise forwards have elsewhere"],
    ),
    "routing of a call missing": (
        lambda hand: (drop_row("routing", 5)(hand), drop_row("routing", 4)(hand)),
        ["routing part-00001", "forward 6 has no rows"],
    ),
    "routing num_tokens": (
        edit("routing", "num_tokens", 6, 5),
        ["routing part-00001 row 6", "num_tokens is 5 where forwards has 4 rows"],
    ),
    "forwards unsorted": (
        swap_rows("forwards", 1, 2),
        ["forwards part-00001 row 2", "forward_id 5 follows 6, it must never decrease"],
    ),
    "forward split between parts": (
        edit("forwards", "forward_id", 0, 3),
        ["forwards part-00001 row 0", "split between"],
    ),
    "unknown kind": (
        edit("forwards", "kind", 1, "guess"),
        ["forwards part-00001 row 1", "'guess'", "prefill, denoise"],
    ),
    "null in forwards": (edit("forwards", "block", 2, None), ["forwards part-00001 row 2", "block is null"]),
    "steps leave a gap": (edit("forwards", "step", 2, 2), ["forwards part-00001 row 2", "step is 2 and must be 1"]),
    "step outside denoise": (
        edit("forwards", "step", 3, 0),
        ["forwards part-00001 row 3", "must be -1 outside denoise"],
    ),
    "rows do not tile": (
        edit("forwards", "row_start", 3, 1),
        ["forwards part-00001 row 3", "row_start is 1 and must be 0"],
    ),
    "no rows": (edit("forwards", "num_tokens", 3, 0), ["forwards part-00001 row 3", "num_tokens must be at least 1"]),
    "no branch": (edit("forwards", "branches", 1, 0), ["forwards part-00001 row 1", "branches must be at least 1"]),
    "odd branches": (
        edit("forwards", "branches", 1, 3),
        ["forwards part-00001 row 1", "does not divide into 3 branches"],
    ),
    "unknown branch": (edit("forwards", "chosen_branch", 1, 1), ["forwards part-00001 row 1", "chosen_branch 1"]),
    "block below -1": (edit("forwards", "block", 0, -2), ["forwards part-00001 row 0", "block -2"]),
    "token row missing": (
        drop_row("tokens", 6),
        ["tokens part-00001", "the part has 15 rows where forwards counts 16"],
    ),
    "token row misplaced": (swap_rows("tokens", 4, 5), ["tokens part-00001 row 4", "row is 1 and must be 0"]),
    "token of another call": (edit("tokens", "forward_id", 4, 4), ["tokens part-00001 row 4", "forward_id is 4"]),
    "unknown state": (edit("tokens", "state", 9, 4), ["tokens part-00001 row 9", "state 4 must be 0 to 3"]),
    "padding with a position": (edit("tokens", "state", 9, 3), ["tokens part-00001 row 9", "in state 3"]),
    "position twice": (edit("tokens", "position", 10, 5), ["tokens part-00001 row 10", "position 5 stands twice"]),
    "request twice": (edit("requests", "request_id", 0, 0), ["requests part-00001", "request 0 stands twice"]),
    "unknown stop reason": (
        edit("requests", "stop_reason", 0, "bored"),
        ["requests part-00001 row 0", "'bored'", "eos, length, error"],
    ),
    "column missing in forwards": (drop_column("forwards", "step"), ["forwards part-00001", "column step is missing"]),
    "column missing in routing": (
        drop_column("routing", "expert_ids"),
        ["routing part-00001", "expert_ids is missing"],
    ),
    "scores column missing": (
        drop_column("routing", "router_scores"),
        ["routing part-00001", "router_scores is missing"],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_names_table_part_and_row(tmp_path, name):
    change, words = FAULTS[name]
    hand = Handmade()
    change(hand)
    sentence = refused(hand.write(tmp_path / "hand.trace"))
    for word in words:
        assert word in sentence, sentence


CHECK_ONLY = {
    "accepted but not masked": (
        edit("tokens", "accepted", 4, True),
        ["tokens part-00001 row 4", "accepted is set where the token was not masked"],
    ),
    "masked count": (
        edit("forwards", "num_masked", 1, 2),
        ["forwards part-00001 row 1", "num_masked is 2 where tokens has 3"],
    ),
    "accepted count": (edit("forwards", "num_accepted", 2, 1), ["forwards part-00001 row 2", "num_accepted is 1"]),
    "confidence without prediction": (edit("tokens", "confidence", 0, 0.5), ["tokens part-00001 row 0", "confidence"]),
    "confidence above one": (edit("tokens", "confidence", 5, 1.5), ["tokens part-00001 row 5", "must lie in 0..1"]),
    "first block": (edit("requests", "first_block", 0, 2), ["first_block of request 1 is 2 and must be 1"]),
    "active columns lack a recorded id": (
        lambda hand: (
            hand.meta.update(capture_level="active"),
            edit("routing", "expert_ids", 5, np.array([[0, 1]] * 4, "u1"))(hand),
            edit("routing", "score_experts", 5, np.array([1, 2], "u1"))(hand),
            cell("router_scores", 5, lambda s: s[:, :2])(hand),
        ),
        ["routing part-00001 row 5", "score_experts of layer 3 lacks some of the ids [0, 1] of token row 0"],
    ),
    "scores at level ids": (
        lambda hand: hand.meta.update(capture_level="ids"),
        ["routing part-00000", "it holds router_scores although capture_level is ids"],
    ),
}


@pytest.mark.parametrize("name", CHECK_ONLY)
def test_check_finds_what_readers_take_on_trust(tmp_path, name):
    change, words = CHECK_ONLY[name]
    hand = Handmade()
    change(hand)
    path = hand.write(tmp_path / "hand.trace")
    read_everything(path)
    fault = check(path)[0]
    for word in words:
        assert word in fault, fault


def test_check_goes_on_and_stops_at_the_most(tmp_path):
    hand = Handmade()
    for name in ("id out of range", "steps leave a gap", "unknown state", "request twice", "weight negative"):
        FAULTS[name][0](hand)
    hand.segments[0]["routing"]["gate_weights"][0][0, 0] = np.nan
    path = hand.write(tmp_path / "hand.trace")
    faults = check(path)
    assert len(faults) == len(set(faults)) == 6
    places = [
        "forwards part-00001",
        "requests part-00001",
        "routing part-00000",
        "tokens part-00001",
        "routing part-00001",
    ]
    assert [next(p for p in places if p in fault) for fault in faults] == [*places, "routing part-00001"]
    assert check(path, most=2) == faults[:2]


def routing_part(path):
    return path / "routing" / "part-00001.parquet"


def test_truncated_part(tmp_path):
    path = Handmade().write(tmp_path / "hand.trace")
    content = routing_part(path).read_bytes()
    for size in (0, 3, len(content) // 2, len(content) - 1):
        routing_part(path).write_bytes(content[:size])
        sentence = refused(path)
        assert "routing part-00001 is truncated or no Parquet file" in sentence


def test_foreign_parquet_and_no_parquet(tmp_path):
    path = Handmade().write(tmp_path / "hand.trace")
    pq.write_table(pa.table({"x": [1, 2]}), routing_part(path))
    assert "routing part-00001: column forward_id is missing" in refused(path)
    routing_part(path).write_text("not Parquet")
    assert "routing part-00001 is truncated or no Parquet file" in refused(path)
    table = Handmade().arrow("routing", Handmade().segments[1]["routing"])
    pq.write_table(table.set_column(1, "layer", pa.array(["1", "3"] * 4)), routing_part(path))
    assert "routing part-00001: column layer must be uint16, not string" in refused(path)
    pq.write_table(table.set_column(1, "layer", pa.array([1, 3] * 3 + [1, 70000])), routing_part(path))
    assert "routing part-00001: layer does not fit uint16" in refused(path)


def test_damaged_pages(tmp_path):
    path = Handmade().write(tmp_path / "hand.trace")
    part = path / "routing" / "part-00001.parquet"
    table = pq.read_table(part)
    pq.write_table(table, part, write_page_checksum=True, compression="zstd")
    content = bytearray(part.read_bytes())
    place = content.find(b"\x28\xb5\x2f\xfd") + 12
    content[place] ^= 0xFF
    part.write_bytes(bytes(content))
    assert "routing part-00001: column" in refused(path)


@pytest.mark.parametrize("table", ["requests", "tokens", "routing"])
def test_missing_part(tmp_path, table):
    path = Handmade().write(tmp_path / "hand.trace")
    (path / table / "part-00001.parquet").unlink()
    assert f"{table} part-00001 is missing" in refused(path)


def test_gap_in_the_forwards_parts(tmp_path):
    path = Handmade().write(tmp_path / "hand.trace")
    (path / "forwards" / "part-00000.parquet").unlink()
    assert "forwards part-00000 is missing although part-00001 is there" in refused(path)


def test_not_a_trace(tmp_path):
    (tmp_path / "folder").mkdir()
    for path, words in ((tmp_path / "none", "there is no trace at"), (tmp_path / "folder", "it has no meta.json")):
        with pytest.raises(TraceError, match=words):
            open_trace(path)
    assert "it has no meta.json" in check(tmp_path / "folder")[0]


def wrong_meta(*keys, value):
    def change(meta):
        for key in keys[:-1]:
            meta = meta[key]
        if value is None:
            del meta[keys[-1]]
        else:
            meta[keys[-1]] = value

    return change


META_FAULTS = [
    (wrong_meta("schema_version", value=2), "schema_version is 2 and this package reads up to 1"),
    (wrong_meta("schema_version", value=None), "schema_version is missing"),
    (wrong_meta("complete", value="yes"), "complete must be true or false, not 'yes'"),
    (wrong_meta("capture_level", value="all"), "capture_level must be one of ids, active, scores, not 'all'"),
    (wrong_meta("tables", value=["forwards"]), "tables must be a list of requests, forwards"),
    (
        wrong_meta("encodings", value={"expert_ids": "zip"}),
        "encodings must be an object of column -> plain or byte_planes or changes",
    ),
    (wrong_meta("score_dtype", value="float64"), "score_dtype must be one of float32, float16"),
    (wrong_meta("model", value=3), "model must be a JSON object, not 3"),
    (wrong_meta("model", "num_experts", value=0), "model.num_experts must be a whole number from 1 to 65536, not 0"),
    (wrong_meta("model", "top_k", value=10), "model.top_k must be a whole number from 1 to 9, not 10"),
    (wrong_meta("model", "top_k", value=True), "model.top_k must be a whole number"),
    (wrong_meta("model", "moe_layers", value=[3, 1]), "model.moe_layers must be an ascending list"),
    (wrong_meta("model", "moe_layers", value=[1, 4]), "below num_layers (4)"),
    (wrong_meta("model", "expert_bytes", value={"1": 5}), "model.expert_bytes must be the bytes of one expert"),
    (wrong_meta("model", "dtype", value=4), "model.dtype must be a text or null, not 4"),
    (wrong_meta("router", "score_function", value="relu"), "router.score_function must be one of softmax, sigmoid"),
    (wrong_meta("router", "n_group", value=2), "router.n_group must be a divisor of num_experts (9)"),
    (wrong_meta("router", "routed_scaling_factor", value=0), "router.routed_scaling_factor must be a number above 0"),
    (wrong_meta("router", "expert_bias", value={"3": [0.0]}), "router.expert_bias must be null or an object"),
    (wrong_meta("router", "expert_scale", value={"2": [0.0] * 9}), "which layer '2' is not"),
    (wrong_meta("router", "bias_in_weights", value=1), "router.bias_in_weights must be true or false, not 1"),
    (wrong_meta("decoding", "block_length", value=-4), "decoding.block_length must be a whole number of at least 0"),
]


@pytest.mark.parametrize(("change", "words"), META_FAULTS, ids=[words for _, words in META_FAULTS])
def test_meta_is_checked_key_by_key(tmp_path, change, words):
    hand = Handmade()
    change(hand.meta)
    sentence = refused(hand.write(tmp_path / "hand.trace"))
    assert words in sentence and str(tmp_path / "hand.trace") in sentence


def test_meta_that_is_no_json(tmp_path):
    path = Handmade().write(tmp_path / "hand.trace")
    for content in ('{"schema_version": 1', "", "[1]", json.dumps(7)):
        (path / "meta.json").write_text(content)
        assert "meta.json" in refused(path)
    (path / "meta.json").write_bytes(b"\xff\xfe{")
    assert "meta.json is not valid JSON" in refused(path)


def test_weights_may_be_negative_where_the_bias_is_in_them(tmp_path):
    hand = Handmade()
    hand.meta["router"]["bias_in_weights"] = True
    FAULTS["weight negative"][0](hand)
    path = hand.write(tmp_path / "hand.trace")
    read_everything(path)
    assert check(path) == []


def test_all_requests_of_a_call_share_one_kind_and_stand_once(tmp_path):
    def joined():
        # calls 5 and 6 become one call of two requests
        hand = Handmade()
        forwards = second(hand, "forwards")
        forwards["forward_id"][2], forwards["row_start"][2], forwards["request_id"][2] = 5, 4, 0
        return hand, forwards

    hand, forwards = joined()
    forwards["kind"][2] = "commit"
    assert "row 2 (forward 5): kind commit stands in a denoise call" in refused(hand.write(tmp_path / "kind.trace"))
    hand, forwards = joined()
    forwards["request_id"][2] = 1
    assert "row 2 (forward 5): request 1 stands twice" in refused(hand.write(tmp_path / "twice.trace"))
