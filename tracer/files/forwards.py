"""The whole ``forwards`` table of a trace: read, held to the format's requirements, cut into segments.

It is the one table kept in memory whole, about 70 bytes per (model call, request); everything bigger is read by segment.
Shapes: P = parts, N = rows of the table, F = model calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tracer.errors import TraceError
from tracer.files.columns import kind_codes, numbers
from tracer.files.parts import open_part, part_names
from tracer.schema import DENOISE, KINDS, TABLES, Column
from tracer.trace import ForwardTable, TraceMeta


def _held(column: Column) -> type[np.generic]:
    """dtype in :class:`tracer.trace.ForwardTable`: codes of kinds, room for -1 where a value may be null, counts to add up."""
    if column.name == "kind":
        return np.uint8
    if column.type == "uint8":
        return np.int16 if column.optional else np.uint8
    if column.optional or (column.type == "uint32" and not column.name.endswith("_id")):
        return np.int64
    return np.dtype(column.type).type


DTYPES = {column.name: _held(column) for column in TABLES["forwards"]}


@dataclass(frozen=True, slots=True)
class StoredForwards:
    """Columns of the table, [N] each, with the bounds of parts and calls.

    ``part_rows`` int64 [P + 1] bounds the parts' rows, ``call_parts`` int64 [F + 1] the rows of each call, ``part_calls`` int64
    [P + 1] the calls of each part, ``row_offsets`` int64 [F + 1] the token rows of each call, counted over the trace.
    """

    path: Path
    meta: TraceMeta
    names: tuple[str, ...]  # of the parts
    columns: dict[str, np.ndarray]
    part_rows: np.ndarray
    call_parts: np.ndarray
    part_calls: np.ndarray
    row_offsets: np.ndarray

    @property
    def num_parts(self) -> int:
        return len(self.part_rows) - 1

    @property
    def num_calls(self) -> int:
        return len(self.call_parts) - 1

    @property
    def call_ids(self) -> np.ndarray:
        """uint32 [F]"""
        return self.columns["forward_id"][self.call_parts[:-1]]

    @property
    def call_kinds(self) -> np.ndarray:
        """uint8 [F]"""
        return self.columns["kind"][self.call_parts[:-1]]

    def name(self, row: int) -> str:
        """How a message speaks of a row."""
        part = int(np.searchsorted(self.part_rows, row, "right")) - 1
        forward = self.columns["forward_id"][row]
        name = self.names[part].removesuffix(".parquet")
        return f"{self.path}: forwards {name} row {row - self.part_rows[part]} (forward {forward})"

    def table(self, first: int, last: int) -> ForwardTable:
        """Calls ``first`` to ``last - 1`` as a ForwardTable."""
        parts = slice(self.call_parts[first], self.call_parts[last])
        columns = {name: values[parts] for name, values in self.columns.items()}
        columns["forward_id"] = self.call_ids[first:last]
        return ForwardTable(
            row_offsets=self.row_offsets[first : last + 1] - self.row_offsets[first],
            part_offsets=self.call_parts[first : last + 1] - self.call_parts[first],
            **columns,
        )


def read_forwards(path: Path, meta: TraceMeta) -> StoredForwards:
    """Read every ``forwards`` part. Types and nulls are checked; requirements by the two functions below.

    Raises
    ------
    TraceError
        Naming part and row; also when the trace has another number of segments than its meta.json counts.
    """
    pieces: dict[str, list[np.ndarray]] = {name: [np.empty(0, dtype)] for name, dtype in DTYPES.items()}
    part_rows, names = [0], part_names(path, "forwards")
    if meta.complete and meta.segments is not None:
        for table in meta.tables:
            found = len(part_names(path, table))
            if found != meta.segments:
                raise TraceError(f"{path}: {table} has {found} parts where meta.json counts {meta.segments} segments.")
    for table in meta.tables if meta.complete and meta.segments != 0 else ():
        if not part_names(path, table):
            raise TraceError(f"{path}: {table} has no parts.")
    for file in names:
        part = open_part(path, "forwards", file, meta)
        table = part.read([name for name in DTYPES if name in part.present])
        for name, dtype in DTYPES.items():
            kind = name == "kind"
            values = kind_codes(part, table.column(name), name, KINDS) if kind else numbers(part, name, table)
            pieces[name].append(values.astype(dtype, copy=False))
        part_rows.append(part_rows[-1] + part.num_rows)
    joined = {name: np.concatenate(arrays) for name, arrays in pieces.items()}
    forward = joined["forward_id"]
    rows = len(forward)
    begins = np.flatnonzero(np.concatenate(([True], forward[1:] != forward[:-1]))) if rows else np.empty(0, np.int64)
    call_parts = np.append(begins, rows).astype(np.int64)
    ends = np.concatenate(([0], np.cumsum(joined["num_tokens"])))
    return StoredForwards(
        path=path,
        meta=meta,
        names=tuple(names),
        columns=joined,
        part_rows=np.array(part_rows, np.int64),
        call_parts=call_parts,
        part_calls=np.searchsorted(call_parts, np.array(part_rows)).astype(np.int64),
        row_offsets=ends[call_parts].astype(np.int64),
    )


def _faults(stored: StoredForwards, wrong: np.ndarray, message: Callable[[int], str]) -> Iterator[str]:
    """One fault, of the first row where ``wrong`` [N] holds."""
    if wrong.any():
        row = int(np.argmax(wrong))
        yield f"{stored.name(row)}: {message(row)}."


def structure_faults(stored: StoredForwards) -> Iterator[str]:
    """Faults that leave no way to tell which rows belong to which call: order, tiling, one kind a call.

    The parts of a call cover its rows in order and without gaps, so that ``num_tokens`` sums to the rows of the call.
    """
    c = stored.columns
    forward = c["forward_id"].astype(np.int64)
    rows = len(forward)
    if rows == 0:
        return
    previous = np.concatenate(([-1], forward[:-1]))
    decreasing = forward < previous
    yield from _faults(
        stored, decreasing, lambda i: f"forward_id {forward[i]} follows {previous[i]}, it must never decrease"
    )
    yield from _faults(stored, c["num_tokens"] < 1, lambda i: "num_tokens must be at least 1")
    ends = np.cumsum(c["num_tokens"])
    call = np.repeat(np.arange(stored.num_calls), np.diff(stored.call_parts))
    expected = ends - c["num_tokens"] - (ends - c["num_tokens"])[stored.call_parts[:-1]][call]
    yield from _faults(
        stored,
        c["row_start"] != expected,
        lambda i: f"row_start is {c['row_start'][i]} and must be {expected[i]}, where the request before it ends",
    )
    first_kind = stored.call_kinds[call]
    yield from _faults(
        stored,
        c["kind"] != first_kind,
        lambda i: (
            f"kind {KINDS[c['kind'][i]]} stands in a {KINDS[first_kind[i]]} call, all requests of a call share one"
        ),
    )
    order = np.lexsort((c["request_id"], call))
    twice = np.zeros(rows, bool)
    twice[order[1:]] = (np.diff(call[order]) == 0) & (np.diff(c["request_id"][order].astype(np.int64)) == 0)
    yield from _faults(stored, twice, lambda i: f"request {c['request_id'][i]} stands twice in one call")


def rule_faults(stored: StoredForwards) -> Iterator[str]:
    """Faults of single values: block, step, branches. ``step`` counts up from 0 over a block's denoise forwards."""
    c = stored.columns
    yield from _faults(stored, c["block"] < -1, lambda i: f"block {c['block'][i]} must be -1 or more")
    yield from _faults(stored, c["step"] < -1, lambda i: f"step {c['step'][i]} must be -1 or more")
    denoise = c["kind"] == DENOISE
    stray = ~denoise & (c["step"] != -1)
    yield from _faults(stored, stray, lambda i: f"step is {c['step'][i]} and must be -1 outside denoise forwards")
    counted = np.flatnonzero(denoise & (c["block"] >= 0))
    order = counted[np.lexsort((counted, c["block"][counted], c["request_id"][counted]))]
    if len(order):
        request, block = c["request_id"][order], c["block"][order]
        new = np.concatenate(([True], (request[1:] != request[:-1]) | (block[1:] != block[:-1])))
        group = np.cumsum(new) - 1
        expected = np.full(len(denoise), -1)
        expected[order] = np.arange(len(order)) - np.flatnonzero(new)[group]
        wrong = np.zeros(len(denoise), bool)
        wrong[order] = c["step"][order] != expected[order]
        yield from _faults(
            stored,
            wrong,
            lambda i: (
                f"step is {c['step'][i]} and must be {expected[i]}, it counts up from 0 in block {c['block'][i]} of "
                f"request {c['request_id'][i]}"
            ),
        )
    branches = np.maximum(c["branches"], 1)
    yield from _faults(stored, c["branches"] < 1, lambda i: "branches must be at least 1")
    yield from _faults(
        stored,
        c["num_tokens"] % branches != 0,
        lambda i: f"num_tokens {c['num_tokens'][i]} does not divide into {c['branches'][i]} branches",
    )
    yield from _faults(
        stored,
        c["chosen_branch"] >= branches,
        lambda i: f"chosen_branch {c['chosen_branch'][i]} is not below branches ({c['branches'][i]})",
    )
    yield from _faults(
        stored,
        c["num_masked"] > c["num_tokens"],
        lambda i: f"num_masked {c['num_masked'][i]} exceeds num_tokens ({c['num_tokens'][i]})",
    )


def checked_forwards(path: Path, meta: TraceMeta) -> StoredForwards:
    """The table, or a TraceError with its first fault."""
    stored = read_forwards(path, meta)
    for faults in (structure_faults, rule_faults):
        for fault in faults(stored):
            raise TraceError(fault)
    return stored


def segment_bounds(stored: StoredForwards, max_rows: int) -> np.ndarray:
    """Where a trace is cut into segments: calls at which one begins, and F. int64 [segments + 1].

    A cut never falls inside a (request, block >= 0). Cuts are the ends of parts that allow one; what lies between two of them
    and exceeds ``max_rows`` token rows is cut further, at the last place that keeps to the limit or else the first there is.
    """
    calls = stored.num_calls
    if calls == 0:
        return np.zeros(1, np.int64)
    blocked = np.zeros(calls + 2, np.int64)
    call = np.repeat(np.arange(calls), np.diff(stored.call_parts))
    in_block = stored.columns["block"] >= 0
    request = stored.columns["request_id"][in_block].astype(np.int64)
    pair = (request << 32) | stored.columns["block"][in_block]
    own_call = call[in_block]
    _, first = np.unique(pair, return_index=True)
    _, last = np.unique(pair[::-1], return_index=True)
    np.add.at(blocked, own_call[first] + 1, 1)
    np.add.at(blocked, own_call[::-1][last] + 1, -1)
    allowed = np.cumsum(blocked[: calls + 1]) == 0
    coarse = np.unique(np.concatenate((stored.part_calls[allowed[stored.part_calls]], [0, calls])))
    places = np.flatnonzero(allowed)
    cuts = [0]
    for end in coarse[1:]:
        while stored.row_offsets[end] - stored.row_offsets[cuts[-1]] > max_rows:
            inside = places[(places > cuts[-1]) & (places < end)]
            if len(inside) == 0:
                break
            fitting = inside[stored.row_offsets[inside] - stored.row_offsets[cuts[-1]] <= max_rows]
            cuts.append(int(fitting[-1] if len(fitting) else inside[0]))
        cuts.append(int(end))
    return np.array(cuts, np.int64)
