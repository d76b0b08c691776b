"""Every way a trace can break its format gives one sentence that names table, part and row, before a kernel sees it."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.made_up.by_hand import COUNTS, EXPERTS, LAYERS, Handmade, write_counts
from tracer.checking import check
from tracer.errors import TraceError
from tracer.meta import checksum
from tracer.parquet import open_trace


def read_everything(path):
    trace = open_trace(path)
    if "loads" in trace.meta.tables:
        return trace.loads
    _ = trace.requests
    for segment in trace.segments():
        _ = segment.tokens
        for layer in segment.layers:
            segment.layer(layer, with_scores=True)
    return None


def refused(path):
    """The one sentence that reading stops with; check must report it too."""
    with pytest.raises(TraceError) as caught:
        read_everything(path)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    assert sentence in check(path)
    return sentence


def second(hand, table):
    """Columns of the table's second part, whose calls are 4 to 7."""
    return hand.segments[1][table]


def at(call, layer, row):
    """Row of the second routing part."""
    return (call - 4) * 8 + LAYERS.index(layer) * 4 + row


def edit(table, column, row, value):
    def apply(hand):
        second(hand, table)[column][row] = value

    return apply


def change(column, row, how, table="routing"):
    """Replace an array by what ``how`` makes of it."""

    def apply(hand):
        arrays = second(hand, table)[column]
        arrays[row] = how(arrays[row].copy())

    return apply


def put(index, value):
    def how(array):
        array[index] = value
        return array

    return how


def swap_rows(table, one, two):
    def apply(hand):
        for values in second(hand, table).values():
            values[one], values[two] = values[two], values[one]

    return apply


def drop_rows(table, *rows):
    def apply(hand):
        for column, values in second(hand, table).items():
            second(hand, table)[column] = [value for i, value in enumerate(values) if i not in rows]

    return apply


def drop_column(table, column):
    def apply(hand):
        del second(hand, table)[column]

    return apply


def add_column(table, column, kind, value):
    def apply(hand):
        hand.types[table][column] = kind
        hand.add(table, column, value)

    return apply


def of_type(table, column, kind, *changes):
    def apply(hand):
        hand.types[table][column] = kind
        for own in changes:
            own(hand)

    return apply


def active(*changes):
    """Changes of the handmade trace at level "active"."""

    def apply(hand):
        hand.make_active()
        for own in changes:
            own(hand)

    return apply


FAULTS = {
    "id out of range": (
        change("expert_ids", at(5, 3, 2), put(1, 9)),
        ["routing part-00001 row 14", "forward 5, layer 3, row 2", "must be below 9"],
    ),
    "ids not distinct": (
        change("expert_ids", at(5, 1, 1), lambda ids: put(1, ids[0])(ids)),
        ["routing part-00001 row 9", "forward 5, layer 1, row 1", "not distinct"],
    ),
    "ids too few": (
        of_type("routing", "expert_ids", pa.binary(), change("expert_ids", at(6, 1, 3), lambda ids: ids[:1])),
        ["routing part-00001 row 19", "expert_ids has 1 bytes and must have 2"],
    ),
    "weights too many": (
        of_type(
            "routing",
            "gate_weights",
            pa.large_binary(),
            change("gate_weights", at(7, 3, 0), lambda w: np.concatenate((w, w))),
        ),
        ["routing part-00001 row 28", "gate_weights has 8 bytes and must have 4"],
    ),
    "all ids of another width": (
        lambda hand: (
            of_type("routing", "expert_ids", pa.binary(3))(hand),
            [
                put(slice(None), [b"abc"] * len(tables["routing"]["row"]))(tables["routing"]["expert_ids"])
                for tables in hand.segments
            ],
        ),
        ["routing part-00000", "column expert_ids must be binary of 2 bytes, not fixed_size_binary[3]"],
    ),
    "null ids": (
        edit("routing", "expert_ids", at(6, 3, 1), None),
        ["routing part-00001 row 21", "forward 6, layer 3, row 1", "expert_ids is null"],
    ),
    "null ids of no fixed width": (
        of_type("routing", "expert_ids", pa.binary(), edit("routing", "expert_ids", at(6, 3, 1), None)),
        ["routing part-00001 row 21", "forward 6, layer 3, row 1", "expert_ids is null"],
    ),
    "null among weights": (
        edit("routing", "gate_weights", at(6, 3, 1), None),
        ["routing part-00001 row 21", "gate_weights is null where other rows have it"],
    ),
    "weight not a number": (
        change("gate_weights", at(7, 1, 3), put(0, np.nan)),
        ["routing part-00001 row 27", "forward 7, layer 1, row 3", "not finite"],
    ),
    "weight infinite": (
        change("gate_weights", at(7, 1, 3), put(0, -np.inf)),
        ["routing part-00001 row 27", "not finite"],
    ),
    "weight negative": (
        change("gate_weights", at(4, 1, 0), put(1, -0.5)),
        ["routing part-00001 row 0", "forward 4, layer 1, row 0", "must not be negative"],
    ),
    "half of the scores not recorded": (
        change("router_scores", at(4, 3, 2), put(8, np.nan)),
        ["routing part-00001 row 6", "forward 4, layer 3, row 2", "router_scores: a score is not finite"],
    ),
    "all scores but one not recorded": (
        change("router_scores", at(4, 3, 2), put(slice(1, None), np.nan)),
        ["routing part-00001 row 6", "forward 4, layer 3, row 2", "router_scores: a score is not finite"],
    ),
    "score infinite": (
        change("router_scores", at(4, 3, 2), put(slice(None), np.inf)),
        ["routing part-00001 row 6", "router_scores: a score is not finite"],
    ),
    "scores too few": (
        of_type("routing", "router_scores", pa.binary(), change("router_scores", at(4, 3, 2), lambda s: s[:8])),
        ["routing part-00001 row 6", "router_scores has 32 bytes and must have 36"],
    ),
    "scores missing": (
        edit("routing", "router_scores", at(4, 3, 2), None),
        ["routing part-00001 row 6", "router_scores is null"],
    ),
    "scores column missing": (
        drop_column("routing", "router_scores"),
        ["routing part-00001 row 0", "router_scores is null although capture_level is scores"],
    ),
    "count above top_k": (
        lambda hand: (
            hand.add("routing", "count", None),
            edit("routing", "count", at(5, 1, 2), 3)(hand),
        ),
        ["routing part-00001 row 10", "forward 5, layer 1, row 2", "count is 3 and must be at most 2"],
    ),
    "count below zero": (
        add_column("routing", "count", pa.int8(), -1),
        ["routing part-00000", "count does not fit uint8"],
    ),
    "ids of a part of a row not distinct": (
        lambda hand: (
            hand.add("routing", "count", 1),
            edit("routing", "count", at(5, 1, 2), 2)(hand),
            change("expert_ids", at(5, 1, 2), put(slice(None), 4))(hand),
            change("expert_ids", at(5, 1, 1), put(slice(None), 4))(hand),
        ),
        ["routing part-00001 row 10", "expert_ids [4, 4] are not distinct"],
    ),
    "routing unsorted": (
        swap_rows("routing", at(5, 1, 0), at(6, 1, 0)),
        ["routing part-00001 row 8", "forward_id is 6 and must be 5 in layer 1"],
    ),
    "rows of a call unsorted": (
        swap_rows("routing", at(5, 3, 1), at(5, 3, 2)),
        ["routing part-00001 row 13", "row is 2 and must be 1 in layer 3"],
    ),
    "a row twice": (
        lambda hand: edit("routing", "row", at(5, 3, 2), 1)(hand),
        ["routing part-00001 row 14", "row is 1 and must be 2 in layer 3"],
    ),
    "routing of an unknown call": (
        edit("routing", "forward_id", at(7, 3, 3), 9),
        ["routing part-00001 row 31", "forward_id is 9 and must be 7 in layer 3"],
    ),
    "routing of an unknown layer": (
        edit("routing", "layer", at(7, 3, 3), 4),
        ["routing part-00001 row 31", "layer 4 is not among model.moe_layers"],
    ),
    "layer is null": (edit("routing", "layer", at(7, 3, 3), None), ["routing part-00001 row 31", "layer is null"]),
    "row is null": (edit("routing", "row", at(7, 3, 3), None), ["routing part-00001 row 31", "row is null"]),
    "routing row missing": (
        drop_rows("routing", at(6, 3, 1)),
        ["routing part-00001 row 21", "row is 2 and must be 1 in layer 3"],
    ),
    "last routing row missing": (
        drop_rows("routing", at(7, 3, 3)),
        ["routing: layer 3 has 31 rows where forwards counts 32"],
    ),
    "layer of a call missing": (
        drop_rows("routing", *(at(6, 3, row) for row in range(4))),
        ["routing part-00001 row 24", "forward_id is 7 and must be 6 in layer 3"],
    ),
    "routing of a call missing": (
        drop_rows("routing", *(at(6, layer, row) for layer in LAYERS for row in range(4))),
        ["routing part-00001 row 16", "forward_id is 7 and must be 6 in layer 1"],
    ),
    "a row too many": (
        lambda hand: [
            values.append(value)
            for values, value in zip(
                second(hand, "routing").values(),
                [7, 3, 4, b"\0\1", np.zeros(2, "<f2"), np.zeros(EXPERTS, "<f4")],
                strict=True,
            )
        ],
        ["routing: layer 3 has 33 rows where forwards counts 32"],
    ),
    "no routing of a kind": (
        lambda hand: [
            tables["routing"].update(
                {c: [v for v, f in zip(values, tables["routing"]["forward_id"], strict=True) if f % 4 != 3]}
            )
            for tables in hand.segments
            for c, values in sorted(tables["routing"].items(), key=lambda item: item[0] == "forward_id")
        ],
        ["routing: forward 3 has no rows"],
    ),
    "active ids unsorted": (
        active(
            change("experts", 3, lambda ids: ids[::-1], "scores"),
        ),
        ["scores part-00001 row 3", "forward 5, layer 3", "experts must ascend and stay below 9"],
    ),
    "active ids twice": (
        active(change("experts", 3, put(1, 0), "scores"), change("experts", 3, put(0, 0), "scores")),
        ["scores part-00001 row 3", "forward 5, layer 3", "experts must ascend and stay below 9"],
    ),
    "active ids out of range": (
        active(change("experts", 3, put(-1, 9), "scores")),
        ["scores part-00001 row 3", "experts must ascend and stay below 9"],
    ),
    "active values too few": (
        active(change("values", 3, lambda values: values[:3], "scores")),
        ["scores part-00001 row 3", "values has 60 bytes and must have 80"],
    ),
    "active scores half recorded": (
        active(change("values", 3, put((1, 1), np.nan), "scores")),
        ["scores part-00001 row 3", "forward 5, layer 3", "values: a score is not finite"],
    ),
    "active experts null": (
        active(edit("scores", "experts", 3, None)),
        ["scores part-00001 row 3", "experts is null"],
    ),
    "active scores of a call missing": (
        active(drop_rows("scores", 3)),
        ["scores part-00001 row 4", "forward_id is 6 and must be 5 in layer 3"],
    ),
    "active scores of the last call missing": (
        active(drop_rows("scores", 7)),
        ["scores: layer 3 has 7 rows where forwards counts 8"],
    ),
    "active scores of a kind and layer missing": (
        lambda hand: (
            hand.make_active(),
            [[values.pop(1) for values in tables["scores"].values()] for tables in hand.segments],
        ),
        ["scores: forward 0 has layer 3 in one of routing and scores alone"],
    ),
    "forwards unsorted": (
        swap_rows("forwards", 1, 2),
        ["forwards part-00001 row 2", "forward_id 5 follows 6, it must never decrease"],
    ),
    "two requests of a call tiled as one": (
        edit("forwards", "forward_id", 0, 3),
        ["forwards part-00001 row 0", "row_start is 0 and must be 4"],
    ),
    "unknown kind": (
        edit("forwards", "kind", 1, "guess"),
        ["forwards part-00001 row 1", "'guess'", "prefill, denoise"],
    ),
    "null in forwards": (edit("forwards", "block", 2, None), ["forwards part-00001 row 2", "block is null"]),
    "edits unknown": (edit("forwards", "num_edited", 2, None), ["forwards part-00001 row 2", "num_edited is null"]),
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
    "more undecided than rows": (
        edit("forwards", "num_masked", 1, 5),
        ["forwards part-00001 row 1", "num_masked 5 exceeds num_tokens (4)"],
    ),
    "block below -1": (edit("forwards", "block", 0, -2), ["forwards part-00001 row 0", "block -2"]),
    "cached prefix below zero": (
        of_type("forwards", "kv_tokens", pa.int64(), edit("forwards", "kv_tokens", 1, -4)),
        ["forwards part-00001", "kv_tokens does not fit uint32"],
    ),
    "cached prefix too wide": (
        of_type("forwards", "kv_tokens", pa.int64(), edit("forwards", "kv_tokens", 1, 1 << 32)),
        ["forwards part-00001", "kv_tokens does not fit uint32"],
    ),
    "token row missing": (
        drop_rows("tokens", 6),
        ["tokens up to part-00001 has 31 rows where forwards counts 32"],
    ),
    "token row misplaced": (swap_rows("tokens", 4, 5), ["tokens part-00001 row 4", "row is 1 and must be 0"]),
    "token of another call": (edit("tokens", "forward_id", 4, 4), ["tokens part-00001 row 4", "forward_id is 4"]),
    "unknown state": (edit("tokens", "state", 9, 5), ["tokens part-00001 row 9", "state 5 must be 0 to 4"]),
    "padding with a position": (edit("tokens", "state", 9, 3), ["tokens part-00001 row 9", "in state 3"]),
    "a position of padding": (edit("tokens", "position", 9, -1), ["tokens part-00001 row 9", "position is -1"]),
    "position twice": (edit("tokens", "position", 10, 5), ["tokens part-00001 row 10", "position 5 stands twice"]),
    "argmax too wide": (
        of_type("tokens", "argmax_id", pa.int64(), edit("tokens", "argmax_id", 5, 1 << 32)),
        ["tokens part-00001", "argmax_id does not fit int32"],
    ),
    "edited is null": (edit("tokens", "edited", 5, None), ["tokens part-00001 row 5", "edited is null"]),
    "request twice": (edit("requests", "request_id", 0, 0), ["requests part-00001", "request 0 stands twice"]),
    "unknown stop reason": (
        edit("requests", "stop_reason", 0, "bored"),
        ["requests part-00001 row 0", "'bored'", "eos, length, error"],
    ),
    "prompt shorter than nothing": (
        of_type("requests", "prompt_tokens", pa.int64(), edit("requests", "prompt_tokens", 0, -5)),
        ["requests part-00001", "prompt_tokens does not fit uint32"],
    ),
    "column missing in forwards": (drop_column("forwards", "step"), ["forwards part-00001", "column step is missing"]),
    "column missing in tokens": (drop_column("tokens", "edited"), ["tokens part-00001", "column edited is missing"]),
    "column missing in routing": (
        drop_column("routing", "expert_ids"),
        ["routing part-00001", "column expert_ids is missing"],
    ),
    "column missing in scores": (
        active(drop_column("scores", "values")),
        ["scores part-00001", "column values is missing"],
    ),
    **{
        f"unknown column in {table}": (
            add_column(table, "temperature", pa.float32(), 1.0),
            [f"{table} part-00000", "column temperature is none of the format's"],
        )
        for table in ("requests", "forwards", "tokens", "routing")
    },
    "unknown column in scores": (
        active(add_column("scores", "temperature", pa.float32(), 1.0)),
        ["scores part-00000", "column temperature is none of the format's"],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_names_table_part_and_row(tmp_path, name):
    apply, words = FAULTS[name]
    hand = Handmade()
    apply(hand)
    sentence = refused(hand.write(tmp_path / "hand.trace"))
    for word in words:
        assert word in sentence, sentence


CHECK_ONLY = {
    "accepted but decided": (
        edit("tokens", "accepted", 4, True),
        ["tokens part-00001 row 4", "accepted is set where the token was decided"],
    ),
    "edited but undecided": (
        edit("tokens", "edited", 5, True),
        ["tokens part-00001 row 5", "edited is set where the token was not decided"],
    ),
    "token below -1": (edit("tokens", "token_id", 6, -2), ["tokens part-00001 row 6", "token_id must be -1 or more"]),
    "masked count": (
        edit("forwards", "num_masked", 1, 2),
        ["forwards part-00001 row 1", "num_masked is 2 where tokens has 3"],
    ),
    "masked count of noise": (
        lambda hand: (
            edit("tokens", "state", 5, 4)(hand),
            edit("forwards", "num_masked", 1, 2)(hand),
        ),
        ["forwards part-00001 row 1", "num_masked is 2 where tokens has 3"],
    ),
    "accepted count": (edit("forwards", "num_accepted", 2, 1), ["forwards part-00001 row 2", "num_accepted is 1"]),
    "edited count": (
        edit("tokens", "edited", 12, True),
        ["forwards part-00001 row 3", "num_edited is 0 where tokens has 1"],
    ),
    "no chosen branch": (
        lambda hand: (
            edit("forwards", "branches", 3, 2)(hand),
            [edit("tokens", "position", 14 + row, 4 + row)(hand) for row in range(2)],
        ),
        ["forwards part-00001 row 3", "chosen_branch is null in a call with 2 branches"],
    ),
    "confidence without prediction": (edit("tokens", "confidence", 0, 0.5), ["tokens part-00001 row 0", "confidence"]),
    "confidence above one": (edit("tokens", "confidence", 5, 1.5), ["tokens part-00001 row 5", "must lie in 0..1"]),
    "first block": (edit("requests", "first_block", 0, 2), ["first_block of request 1 is 2 and must be 1"]),
    "active scores lack a recorded id": (
        lambda hand: (
            hand.make_active(),
            edit("routing", "expert_ids", at(6, 3, 2), np.array([0, 1], "u1"))(hand),
            edit("scores", "experts", 5, np.array([1, 2], "u1"))(hand),
            change("values", 5, lambda values: values[:, :2], "scores")(hand),
            [change("expert_ids", at(6, 3, row), put(slice(None), [1, 2]))(hand) for row in (0, 1, 3)],
        ),
        ["scores part-00001 row 5", "forward 6, layer 3", "experts lacks some of the ids [0, 1] of token row 2"],
    ),
    "scores at level ids": (
        lambda hand: hand.meta.update(capture_level="ids"),
        ["routing part-00000", "it holds router_scores although capture_level is ids"],
    ),
}


@pytest.mark.parametrize("name", CHECK_ONLY)
def test_check_finds_what_readers_take_on_trust(tmp_path, name):
    apply, words = CHECK_ONLY[name]
    hand = Handmade()
    apply(hand)
    path = hand.write(tmp_path / "hand.trace")
    read_everything(path)
    fault = check(path)[0]
    for word in words:
        assert word in fault, fault
    # no figure is made from what the smaller tables are found to break
    if not fault.startswith((f"{path}: routing", f"{path}: scores")):
        with pytest.raises(TraceError) as caught:
            _ = open_trace(path).notes
        assert str(caught.value) == fault


def test_check_goes_on_and_stops_at_the_most(tmp_path):
    hand = Handmade()
    for name in ("id out of range", "steps leave a gap", "unknown state", "request twice", "weight negative"):
        FAULTS[name][0](hand)
    hand.segments[0]["routing"]["gate_weights"][0][0] = np.nan
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
    # that it was not finished is a fault like others, and the last
    hand.meta["complete"] = False
    unfinished = check(hand.write(tmp_path / "unfinished.trace"))
    assert len(unfinished) == 7 and unfinished[-1].endswith("this trace was not finished.")


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
    layers = table["layer"].to_pylist()
    pq.write_table(table.set_column(1, "layer", pa.array(list(map(str, layers)))), routing_part(path))
    assert "routing part-00001: column layer must be uint16, not string" in refused(path)
    pq.write_table(table.set_column(1, "layer", pa.array([*layers[:-1], 70000])), routing_part(path))
    assert "routing part-00001: layer does not fit uint16" in refused(path)
    pq.write_table(table.set_column(3, "expert_ids", pa.array([1] * 32)), routing_part(path))
    assert "routing part-00001: column expert_ids must be binary of 2 bytes, not int64" in refused(path)


@pytest.mark.parametrize("table", ["requests", "forwards", "tokens", "routing", "scores"])
def test_damaged_pages(tmp_path, table):
    hand = Handmade()
    hand.make_active()
    path = hand.write(tmp_path / "hand.trace")
    part = path / table / "part-00001.parquet"
    pq.write_table(pq.read_table(part), part, write_page_checksum=True, compression="zstd")
    content = bytearray(part.read_bytes())
    place = content.find(b"\x28\xb5\x2f\xfd") + 12
    content[place] ^= 0xFF
    part.write_bytes(bytes(content))
    assert f"{table} part-00001: column" in refused(path)


def test_damaged_pages_without_compression(tmp_path):
    # nothing but the checksum of the page tells
    path = Handmade().write(tmp_path / "hand.trace")
    table = pq.read_table(routing_part(path))
    options = {"write_page_checksum": True, "compression": "none", "use_dictionary": False}
    pq.write_table(table, routing_part(path), **options)
    content = bytearray(routing_part(path).read_bytes())
    weights = b"".join(table["gate_weights"].to_pylist())
    content[content.find(weights) + 7] ^= 1
    routing_part(path).write_bytes(bytes(content))
    sentence = refused(path)
    assert "routing part-00001: column" in sentence and "cannot be read, the file is damaged" in sentence
    for view in ("rows", "routing"):
        with pytest.raises((TraceError, pl.exceptions.ComputeError), match="routing part-00001: column"):
            open_trace(path).scan(view).collect()


@pytest.mark.parametrize(("table", "column"), [("requests", "dataset"), ("forwards", "kind")])
def test_texts_that_are_none(tmp_path, table, column):
    path = Handmade().write(tmp_path / "hand.trace")
    part = path / table / "part-00001.parquet"
    stored = pq.read_table(part)
    offsets = pa.py_buffer(np.arange(stored.num_rows + 1, dtype=np.int32))
    texts = pa.StringArray.from_buffers(stored.num_rows, offsets, pa.py_buffer(b"\xff" * stored.num_rows))
    pq.write_table(stored.set_column(stored.column_names.index(column), column, texts), part)
    assert f"{table} part-00001: column" in refused(path)


@pytest.mark.parametrize("table", ["requests", "tokens", "routing", "forwards", "scores"])
def test_number_of_parts_and_of_segments(tmp_path, table):
    hand = Handmade()
    hand.make_active()
    hand.meta["segments"] = 2
    path = hand.write(tmp_path / "hand.trace")
    assert check(path) == []
    (path / table / "part-00001.parquet").rename(path / table / "part-00001")
    assert f"{table} has 1 parts where meta.json counts 2 segments" in refused(path)
    (path / table / "part-00001").rename(path / table / "part-00002.parquet")
    pq.write_table(pq.read_table(path / table / "part-00002.parquet").slice(0, 0), path / table / "a.parquet")
    assert f"{table} has 3 parts where meta.json counts 2 segments" in refused(path)


@pytest.mark.parametrize("table", ["requests", "tokens", "routing", "forwards", "scores"])
def test_empty_and_missing_table_folders(tmp_path, table):
    hand = Handmade()
    hand.make_active()
    path = hand.write(tmp_path / "hand.trace")
    for part in (path / table).iterdir():
        part.unlink()
    (path / table / ".part-00000.parquet").write_bytes(b"hidden")
    assert f"hand.trace: {table} has no parts" in refused(path)
    (path / table / ".part-00000.parquet").unlink()
    (path / table).rmdir()
    assert f"hand.trace: {table} has no parts" in refused(path)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("requests", "requests has 2 parts where meta.json counts 1 segments"),
        ("tokens", "tokens up to part-00001 has 32 rows where forwards counts 16"),
        ("routing", "routing: layer 1 has 32 rows where forwards counts 16"),
        ("scores", "scores: layer 1 has 8 rows where forwards counts 4"),
    ],
)
def test_left_overs_of_a_finished_trace(tmp_path, table, words):
    hand = Handmade()
    hand.make_active()
    if table == "requests":
        # nothing but their number tells: a request may end before its first call
        hand.meta["segments"] = 1
    path = hand.write(tmp_path / "hand.trace")
    for part in path.glob("*/part-00001.parquet"):
        if part.parent.name != table:
            part.unlink()
    assert words in refused(path)


def test_forwards_without_rows_in_an_unfinished_trace(tmp_path):
    hand = Handmade()
    hand.make_active()
    hand.meta["complete"] = False
    for table, words in (
        ("tokens", "tokens up to part-00000 has 16 rows where forwards counts 32"),
        ("routing", "routing: layer 1 has 16 rows where forwards counts 32"),
        ("scores", "scores: layer 1 has 4 rows where forwards counts 8"),
    ):
        path = hand.write(tmp_path / f"{table}.trace")
        (path / table / "part-00001.parquet").unlink()
        assert words in refused(path)


LOADS_FAULTS = {
    "steps descend": ({"steps": (3, 9, 4, 10), "sizes": (1, 3)}, ["loads 1 row 2", "step is 4", "must ascend"]),
    "a step twice": ({"steps": (3, 4, 4, 10), "sizes": (2, 2)}, ["loads 1 row 0", "step is 4", "must ascend"]),
    "layers in another order": ({"layers": (3, 1)}, ["loads 0 row 0", "layer is 3 and must be 1"]),
    "an unknown layer": ({"layers": (1, 2)}, ["loads 0 row 1", "layer is 2 and must be 3"]),
    "counts null": (
        {"counts": [*([bytes(36)] * 6), None, bytes(36)], "sizes": (2, 2)},
        ["loads 1 row 2", "counts is null"],
    ),
    "counts short": (
        {"counts": [*([bytes(36)] * 5), bytes(32), bytes(36), bytes(36)], "sizes": (2, 2)},
        ["loads 1 row 1", "counts has 32 bytes and must have 36"],
    ),
    "parts missing": ({"meta": {"segments": 2}}, ["loads has 1 parts where meta.json counts 2 segments"]),
    "no parts": ({"sizes": ()}, ["loads has no parts"]),
}


@pytest.mark.parametrize("name", LOADS_FAULTS)
def test_faults_of_counts(tmp_path, name):
    options, words = LOADS_FAULTS[name]
    sentence = refused(write_counts(tmp_path / "hand.trace", **options))
    for word in words:
        assert word in sentence, sentence


def test_counts_end_inside_a_step(tmp_path):
    path = write_counts(tmp_path / "hand.trace")
    table = pq.read_table(path / "loads" / "0.parquet")
    pq.write_table(table.slice(0, 7), path / "loads" / "0.parquet")
    assert "loads has 7 rows, which is no whole number of steps of 2 layers" in refused(path)
    steps = pa.array([3, 4, 4, 4, 9, 9, 10, 10], pa.uint32())
    pq.write_table(table.set_column(0, "step", steps), path / "loads" / "0.parquet")
    assert "loads 0 row 1: step is 4: steps must ascend, one for all layers" in refused(path)


def test_counts_that_were_not_finished(tmp_path):
    path = write_counts(tmp_path / "hand.trace", meta={"complete": False})
    np.testing.assert_array_equal(open_trace(path).loads[1], COUNTS)
    assert check(path) == [f"{path}: this trace was not finished."]


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
    (wrong_meta("schema_version", value=3), "schema_version is 3 and this package reads 2: update moetrace"),
    (wrong_meta("schema_version", value=1), "schema_version is 1, which was never released: record the trace anew"),
    (wrong_meta("schema_version", value=0), "schema_version must be a whole number of at least 1, not 0"),
    (wrong_meta("schema_version", value="2"), "schema_version must be a whole number of at least 1, not '2'"),
    (wrong_meta("schema_version", value=None), "schema_version is missing"),
    (wrong_meta("complete", value="yes"), "complete must be true or false, not 'yes'"),
    (wrong_meta("capture_level", value="all"), "capture_level must be one of ids, active, scores, not 'all'"),
    (wrong_meta("tables", value=["forwards"]), "tables must be a list of requests, forwards"),
    (wrong_meta("tables", value=["requests", "forwards", "routing", "loads"]), "tables must be a list of requests"),
    (wrong_meta("tables", value=["requests", "forwards", "routing", "scores"]), "tables must be a list of requests"),
    (wrong_meta("capture_level", value="active"), "tables must be a list of requests, forwards, routing and"),
    (wrong_meta("segments", value=-1), "segments must be a whole number of at least 0, not -1"),
    (wrong_meta("checksum", value="0" * 32), "the document was changed after it was written, its checksum says"),
    (wrong_meta("checksum", value=5), "the document was changed after it was written, its checksum says"),
    (wrong_meta("model", value=3), "model must be a JSON object, not 3"),
    (wrong_meta("model", "num_experts", value=0), "model.num_experts must be a whole number from 1 to 65536, not 0"),
    (wrong_meta("model", "top_k", value=10), "model.top_k must be a whole number from 1 to num_experts, at most 255"),
    (wrong_meta("model", "top_k", value=True), "model.top_k must be a whole number"),
    (wrong_meta("model", "moe_layers", value=[3, 1]), "model.moe_layers must be an ascending list"),
    (wrong_meta("model", "moe_layers", value=[1, 4]), "below num_layers, not [1, 4]"),
    (wrong_meta("model", "moe_layers", value=[]), "model.moe_layers must be an ascending list"),
    (wrong_meta("model", "expert_bytes", value={"1": 5}), "model.expert_bytes must be the bytes of one expert"),
    (wrong_meta("model", "dtype", value=4), "model.dtype must be a text or null, not 4"),
    (wrong_meta("model", "class", value=4), "model.class must be a text or null, not 4"),
    (wrong_meta("router", "score_function", value="relu"), "router.score_function must be one of softmax, sigmoid"),
    (wrong_meta("router", "n_group", value=2), "router.n_group must be a divisor of num_experts (9)"),
    (wrong_meta("router", "topk_group", value=2), "router.topk_group must be at most n_group (1)"),
    (wrong_meta("router", "routed_scaling_factor", value=0), "router.routed_scaling_factor must be a number above 0"),
    (wrong_meta("router", "expert_bias", value={"3": [0.0]}), "router.expert_bias must be null or an object"),
    (wrong_meta("router", "expert_bias", value={"3": [np.nan] * 9}), "router.expert_bias must be null or an object"),
    (wrong_meta("router", "expert_scale", value={"2": [0.0] * 9}), "which layer 2 is not"),
    (wrong_meta("router", "bias_in_weights", value=1), "router.bias_in_weights must be true or false, not 1"),
    (wrong_meta("decoding", "block_length", value=-4), "decoding.block_length must be a whole number of at least 0"),
]


@pytest.mark.parametrize(("apply", "words"), META_FAULTS, ids=[words for _, words in META_FAULTS])
def test_meta_is_checked_key_by_key(tmp_path, apply, words):
    hand = Handmade()
    apply(hand.meta)
    path = hand.write(tmp_path / "hand.trace")
    sentence = refused(path)
    assert words in sentence and str(path) in sentence
    assert check(path) == [sentence]


def test_a_document_changed_after_it_was_written(tmp_path):
    hand = Handmade()
    hand.meta["checksum"] = checksum(hand.meta)
    hand.meta["model"]["expert_bytes"]["3"] += 1
    assert "its checksum says: restore it, or take checksum out" in refused(hand.write(tmp_path / "hand.trace"))


def test_all_faults_of_meta_at_once(tmp_path):
    hand = Handmade()
    words = []
    for apply, own in (
        (wrong_meta("complete", value="yes"), "complete must be true or false, not 'yes'"),
        (wrong_meta("capture_level", value="all"), "capture_level must be one of ids, active, scores, not 'all'"),
        (wrong_meta("model", "num_layers", value=None), "model.num_layers is missing"),
        (wrong_meta("model", "top_k", value=-1), "model.top_k must be a whole number from 1 to num_experts"),
        (wrong_meta("router", "score_function", value="relu"), "router.score_function must be one of"),
        (wrong_meta("router", "expert_scale", value={"1": ["x"]}), "router.expert_scale must be null or an object"),
        (wrong_meta("decoding", "block_length", value="4"), "decoding.block_length must be a whole number"),
    ):
        apply(hand.meta)
        words.append(own)
    path = hand.write(tmp_path / "hand.trace")
    faults = check(path)
    assert len(faults) == len(words)
    for fault, own in zip(faults, words, strict=True):
        assert fault.startswith(f"{path}: meta.json: {own}") and fault.endswith(".") and "\n" not in fault
    with pytest.raises(TraceError) as caught:
        open_trace(path)
    assert str(caught.value) == faults[0][:-1] + " (6 more; moetrace check lists them)."
    assert check(path, most=3) == faults[:3]


def test_meta_that_is_no_json(tmp_path):
    path = Handmade().write(tmp_path / "hand.trace")
    for content in ('{"schema_version": 2', "", "[1]", json.dumps(7)):
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


def test_views_of_a_table_with_a_value_out_of_range(tmp_path):
    hand = Handmade()
    of_type("tokens", "row", pa.int64(), edit("tokens", "row", 5, -1))(hand)
    path = hand.write(tmp_path / "hand.trace")
    assert "tokens part-00001: row does not fit uint32" in refused(path)
    with pytest.raises((TraceError, pl.exceptions.ComputeError), match="tokens part-00001: row does not fit uint32"):
        open_trace(path).scan("tokens").collect()
