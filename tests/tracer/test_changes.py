"""Encoding "changes": cells are what the naive encoder says, readers get what plain cells hold, bad cells are refused."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.handmade import LAYERS, Handmade
from tests.tracer.recorded import record
from tracer.check import check
from tracer.errors import TraceError
from tracer.parquet import TraceWriter, open_trace
from tracer.schema import COMPACT_ENCODINGS
from tracer.summary import describe


def naive_links(calls, groups):
    """For every row of every call, the (call, row) it is linked with or None. ``groups``: row group of each call."""
    last, links = {}, []
    for number, parts in enumerate(calls):
        own = []
        for part in parts:
            size = part["num_tokens"] // part["branches"]
            for r in range(part["num_tokens"]):
                branch, place = divmod(r, size)
                link = None
                if part["request_id"] in last:
                    call, before = last[part["request_id"]]
                    earlier = before["num_tokens"] // before["branches"]
                    index = part["kv_tokens"] + place - before["kv_tokens"]
                    if groups[call] == groups[number] and 0 <= index < earlier:
                        copy = branch if branch < before["branches"] else 0
                        link = call, before["row_start"] + copy * earlier + index
                own.append(link)
        for part in parts:
            last[part["request_id"]] = number, part
        links.append(own)
    return links


def naive_cells(rows, links, modulus):
    """Bits and ids of each call's cell; ``rows[call][r]`` is a list of K ids, or None where the row was not routed."""
    view, cells = {}, []
    for call, own in enumerate(rows):
        bits, kept = [], []
        for r, ids in enumerate(own):
            link = links[call][r]
            base = None if link is None else view[link]
            ids = ids or base or [0] * top_k_of(rows)
            view[call, r] = ids
            for k, expert in enumerate(ids):
                differs = any(ids) if base is None else expert != base[k]
                bits.append(differs)
                if differs:
                    kept.append((expert - (ids[k - 1] if k and base is None else 0)) % modulus)
        cells.append((bits, kept))
    return cells


def naive_weights(rows, links):
    """Coded differences of each call's cell; ``rows[call][r]`` is a list of K float16 bit patterns, None where not routed."""
    view, cells = {}, []
    for call, own in enumerate(rows):
        coded = []
        for r, bits in enumerate(own):
            base = None if links[call][r] is None else view[links[call][r]]
            bits = bits or base or [0] * top_k_of(rows)
            view[call, r] = bits
            for k, pattern in enumerate(bits):
                step = (pattern - (base[k] if base else 0)) % 65536
                coded.append(2 * step if step < 32768 else -2 * (step - 65536) - 1)
        cells.append(coded)
    return cells


def top_k_of(rows):
    return next((len(ids) for own in rows for ids in own if ids), 1)


def packed(bits):
    return np.packbits(np.array(bits, bool), bitorder="little").tobytes()


def planes(coded):
    return bytes(value & 255 for value in coded), bytes(value >> 8 for value in coded)


def layers_of(path):
    """expert_ids, gate_weights and count of every layer over the whole trace."""
    trace = open_trace(path)
    found = {}
    for layer in trace.meta.model.moe_layers:
        own = [segment.layer(layer) for segment in trace.segments()]
        found[layer] = (
            np.concatenate([x.expert_ids for x in own]),
            None if own[0].gate_weights is None else np.concatenate([x.gate_weights for x in own]),
            np.concatenate([x.count for x in own]),
        )
    return found


def assert_same(one, other):
    for layer, arrays in one.items():
        for a, b in zip(arrays, other[layer], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)


def stored_groups(path):
    """Row group of each forward, numbered over the trace."""
    groups, number = [], 0
    for part in sorted((path / "routing").iterdir()):
        file = pq.ParquetFile(part)
        for group in range(file.metadata.num_row_groups):
            forwards = file.read_row_group(group, ["forward_id"])["forward_id"].to_pylist()
            groups += [number] * len(set(forwards))
            number += 1
    return groups


def by_call(values, offsets, count):
    return [
        [values[r].tolist() if count[r] else None for r in range(low, high)]
        for low, high in itertools.pairwise(offsets)
    ]


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    geometry=st.sampled_from([(1, 1), (4, 3), (5, 2), (9, 8), (12, 8), (256, 8), (300, 4), (300, 8)]),
    batch=st.integers(1, 3),
    weights=st.booleans(),
    some_unrouted=st.booleans(),
    branches=st.integers(1, 3),
    segment_forwards=st.integers(1, 20),
    group_bytes=st.sampled_from([1, 200, 1000, 1 << 20]),
    segment_decisions=st.sampled_from([1, 40, 200, 1 << 26]),
    stream=st.booleans(),
)
def test_stored_cells_equal_naive(seed, geometry, segment_forwards, group_bytes, segment_decisions, stream, **options):
    rng = np.random.default_rng(seed)
    recorded = record(rng, num_experts=geometry[0], top_k=geometry[1], **options)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr("tracer.files.encode.ROW_GROUP_BYTES", group_bytes)
        paths = {}
        for name, encodings in (("plain", {}), ("changes", COMPACT_ENCODINGS)):
            paths[name] = path = Path(folder) / f"{name}.trace"
            meta = {**recorded.meta, "encodings": encodings}
            with TraceWriter(path, meta, segment_forwards=segment_forwards) as writer:
                recorded.write(writer)
        # segments that begin inside a part, and columns that are read anew for every layer
        patch.setattr("tracer.files.segments.SEGMENT_DECISIONS", segment_decisions)
        if stream:
            patch.setattr("tracer.files.columns.CACHE_BYTES", 0)
            patch.setattr("tracer.files.columns.STREAM_BYTES", 64)
        assert check(paths["changes"]) == []
        plain = layers_of(paths["plain"])
        assert_same(layers_of(paths["changes"]), plain)
        calls = [parts for parts, _, _ in recorded.calls]
        links = naive_links(calls, stored_groups(paths["changes"]))
        offsets = np.cumsum([0] + [sum(part["num_tokens"] for part in parts) for parts in calls])
        cells = open_trace(paths["changes"]).scan("cells").collect()
        for layer, (ids, own_weights, count) in plain.items():
            stored = cells.filter(layer=layer)
            expected = naive_cells(by_call(ids, offsets, count), links, 1 << (8 * ids.itemsize))
            assert stored["changed"].to_list() == [packed(bits) for bits, _ in expected]
            assert stored["expert_ids"].to_list() == [np.array(kept, ids.dtype).tobytes() for _, kept in expected]
            if own_weights is None:
                assert stored["gate_weights"].null_count() == stored["gate_weights_high"].null_count() == len(stored)
                continue
            coded = naive_weights(by_call(own_weights.view(np.uint16), offsets, count), links)
            assert stored["gate_weights"].to_list() == [planes(values)[0] for values in coded]
            assert stored["gate_weights_high"].to_list() == [planes(values)[1] for values in coded]


def changed_hand():
    """The handmade trace with its ids and weights encoded by the naive encoder; one row group a part."""
    hand = Handmade()
    hand.meta["encodings"] = COMPACT_ENCODINGS
    for table in ("changed", "gate_weights_high"):
        hand.types["routing"][table] = hand.types["routing"]["expert_ids"]
    for tables in hand.segments:
        forwards, routing = tables["forwards"], tables["routing"]
        calls = [[dict(zip(forwards, values, strict=True))] for values in zip(*forwards.values(), strict=True)]
        links = naive_links(calls, [0] * len(calls))
        size = len(routing["layer"])
        routing["changed"], routing["gate_weights_high"] = [None] * size, [None] * size
        for layer in LAYERS:
            own = [i for i in range(size) if routing["layer"][i] == layer]
            cells = naive_cells([routing["expert_ids"][i].tolist() for i in own], links, 256)
            coded = naive_weights([routing["gate_weights"][i].view(np.uint16).tolist() for i in own], links)
            for i, (bits, kept), values in zip(own, cells, coded, strict=True):
                routing["changed"][i], routing["expert_ids"][i] = packed(bits), bytes(kept)
                routing["gate_weights"][i], routing["gate_weights_high"][i] = planes(values)
    return hand


def test_what_others_encode_is_read(tmp_path):
    plain = Handmade().write(tmp_path / "plain.trace")
    path = changed_hand().write(tmp_path / "changes.trace")
    assert check(path) == []
    assert_same(layers_of(path), layers_of(plain))


def test_sizes_count_the_columns_that_the_encoding_adds(tmp_path):
    path = changed_hand().write(tmp_path / "hand.trace")
    sizes = {"expert_ids": 0, "changed": 0, "gate_weights": 0, "gate_weights_high": 0}
    for part in (path / "routing").iterdir():
        group = pq.ParquetFile(part).metadata.row_group(0)
        for i in range(group.num_columns):
            if group.column(i).path_in_schema in sizes:
                sizes[group.column(i).path_in_schema] += group.column(i).total_compressed_size
    trace = open_trace(path)
    found = describe(trace)["bytes_per_decision"]
    assert found["ids"] == (sizes["expert_ids"] + sizes["changed"]) / trace.num_decisions
    assert found["ids_and_weights"] == sum(sizes.values()) / trace.num_decisions


def cell(column, row, change):
    def apply(hand):
        cells = hand.segments[1]["routing"][column]
        cells[row] = change(cells[row])

    return apply


def drop(column):
    def apply(hand):
        for tables in hand.segments:
            del tables["routing"][column]

    return apply


# cells 0 to 7 of the second part alternate between layers 1 and 3; 0 and 1 are a prefill, 2 and 3 the first of block 1
FAULTS = {
    "an id too few": (cell("expert_ids", 4, lambda c: c[:-1]), ["row 4", "forward 6 has fewer ids than changed"]),
    "an id too many": (cell("expert_ids", 5, lambda c: c + b"\1"), ["row 5", "forward 6 has more ids than changed"]),
    "no ids at all": (cell("expert_ids", 0, lambda c: b""), ["row 0", "forward 4 has fewer ids than changed"]),
    "null ids": (cell("expert_ids", 3, lambda c: None), ["row 3", "expert_ids is null"]),
    "a bitmap too long": (cell("changed", 6, lambda c: c + b"\0"), ["row 6", "changed has 2 bytes and must have 1"]),
    "a bitmap too short": (cell("changed", 6, lambda c: b""), ["row 6", "changed has 0 bytes and must have 1"]),
    "null bitmap": (cell("changed", 1, lambda c: None), ["row 1", "changed is null"]),
    "some bits of a row without a link": (
        cell("changed", 3, lambda c: bytes([c[0] ^ 1])),
        ["row 3", "changed of forward 5 has some bits, but not all"],
    ),
    "a row of zeros": (
        lambda hand: (
            cell("changed", 2, lambda c: bytes([c[0] & 0xFC]))(hand),
            cell("expert_ids", 2, lambda c: c[2:])(hand),
        ),
        ["row 2", "forward 5, token row 0", "ids [0, 0] are not distinct"],
    ),
    "id out of range": (cell("expert_ids", 2, lambda c: b"\x09\x01" + c[2:]), ["row 2", "must be below 9"]),
    "ids not distinct": (cell("expert_ids", 2, lambda c: b"\x03\x00" + c[2:]), ["row 2", "are not distinct"]),
    "low bytes short": (
        cell("gate_weights", 7, lambda c: c[:-1]),
        ["row 7", "gate_weights has 7 bytes and must have 8"],
    ),
    "high bytes long": (
        cell("gate_weights_high", 7, lambda c: c + c),
        ["row 7", "gate_weights_high has 16 bytes and must have 8"],
    ),
    "null high bytes": (cell("gate_weights_high", 7, lambda c: None), ["row 7", "gate_weights_high is null"]),
    "weight not finite": (
        lambda hand: (
            cell("gate_weights", 0, lambda c: bytes([0x00]) + c[1:])(hand),
            cell("gate_weights_high", 0, lambda c: bytes([0xF8]) + c[1:])(hand),
        ),
        ["row 0", "forward 4, token row 0", "not finite"],
    ),
    "weight negative": (
        cell("gate_weights", 0, lambda c: bytes([c[0] | 1]) + c[1:]),
        ["row 0", "must not be negative"],
    ),
    "no bitmaps": (drop("changed"), ["column changed is missing"]),
    "no high bytes": (drop("gate_weights_high"), ["column gate_weights_high is missing"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_names_part_and_row(tmp_path, name):
    change, words = FAULTS[name]
    hand = changed_hand()
    change(hand)
    path = hand.write(tmp_path / "hand.trace")
    with pytest.raises(TraceError) as caught:
        layers_of(path)
    sentence = str(caught.value)
    assert "\n" not in sentence and "routing part-0000" in sentence and sentence in check(path)
    for word in words:
        assert word in sentence, sentence


def test_eight_ids_short_of_a_cell(tmp_path):
    # the kernel for rows of eight reads ahead: the last cell of all lacks ids
    recorded = record(np.random.default_rng(0), num_experts=12, top_k=8, batches=1, batch=1, layers=(1,))
    with TraceWriter(tmp_path / "a.trace", {**recorded.meta, "encodings": COMPACT_ENCODINGS}) as writer:
        recorded.write(writer)
    part = tmp_path / "a.trace" / "routing" / "part-00000.parquet"
    table = pq.read_table(part)
    for keep, words in ((0, "has fewer ids"), (-1, "has fewer ids"), (None, "has more ids")):
        cells = table["expert_ids"].to_pylist()
        cells[-1] = cells[-1] + b"\0" if keep is None else cells[-1][:keep]
        place = table.column_names.index("expert_ids")
        field = table.schema.field(place)
        pq.write_table(table.set_column(place, field, [cells]), part)
        with pytest.raises(TraceError, match=f"routing part-00000 row 6: expert_ids of forward 6 {words}"):
            layers_of(tmp_path / "a.trace")


def test_a_row_group_must_not_begin_inside_a_forward(tmp_path):
    hand = changed_hand()
    hand.write_options["row_group_size"] = 3
    path = hand.write(tmp_path / "hand.trace")
    with pytest.raises(TraceError, match="routing part-00000 row 3: a row group begins inside a forward"):
        layers_of(path)


def test_changes_of_other_columns_are_refused(tmp_path):
    hand = Handmade()
    hand.meta["encodings"] = {"router_scores": "changes"}
    path = hand.write(tmp_path / "hand.trace")
    with pytest.raises(TraceError, match=r"encodings\.router_scores must be plain or byte_planes"):
        open_trace(path)
