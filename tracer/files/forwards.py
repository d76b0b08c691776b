"""The whole ``forwards`` table of a trace: read, held to the format's requirements, cut into segments.

It is the one table kept in memory whole, about 70 bytes per (model call, request); everything bigger is read by segment.
Shapes: P = parts, N = rows of the table, F = model calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tracer.errors import TraceError
from tracer.files.columns import number_type
from tracer.files.parts import PartFile, check_part_count, part_names
from tracer.schema import DENOISE, KINDS, TABLES
from tracer.trace import ForwardTable, TraceMeta

# dtypes in :class:`tracer.trace.ForwardTable`: as they are read, kinds as codes, and numbers that are added up wider
DTYPES = {c.name: np.dtype(np.uint8) if c.name == "kind" else number_type(c) for c in TABLES["forwards"]}
DTYPES |= dict.fromkeys(("row_start", "num_tokens", "num_edited"), np.dtype(np.int64))


def _branches(c: Mapping[str, Any]) -> Any:
    return c["branches"] + (c["branches"] < 1)


# What is wrong with rows of the table, one or whole columns of them, and the words for it. Null is -1, a kind its code.
ROW_RULES: tuple[tuple[Callable[[Mapping[str, Any]], Any], str], ...] = (
    (lambda c: c["block"] < -1, "block {block} must be -1 or more"),
    (lambda c: c["step"] < -1, "step {step} must be -1 or more"),
    (
        lambda c: (c["kind"] != DENOISE) & (c["step"] != -1),
        "step is {step} and must be -1 outside denoise forwards",
    ),
    (lambda c: c["branches"] < 1, "branches must be at least 1"),
    (lambda c: c["num_tokens"] % _branches(c) != 0, "num_tokens {num_tokens} does not divide into {branches} branches"),
    (lambda c: c["chosen_branch"] >= _branches(c), "chosen_branch {chosen_branch} is not below branches ({branches})"),
    (lambda c: c["num_masked"] > c["num_tokens"], "num_masked {num_masked} exceeds num_tokens ({num_tokens})"),
)
WRONG_STEP = "step is {step} and must be {expected}, it counts up from 0 in block {block} of request {request_id}"
WRONG_START = "row_start is {row_start} and must be {expected}, where the request before it ends"


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
        return len(self.names)

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

    def faults(self, wrong: np.ndarray, words: str, **more: np.ndarray) -> Iterator[str]:
        """One fault, of the first row where ``wrong`` [N] holds; ``words`` may name columns and what is given ``more``."""
        if wrong.any():
            row = int(np.argmax(wrong))
            values = {name: column[row] for name, column in (self.columns | more).items()}
            yield f"{self.name(row)}: {words.format(**values)}."

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

    A TraceError names part and row; also when the trace has another number of segments than its meta.json counts.
    """
    check_part_count(path, meta)
    names = part_names(path, "forwards")
    pieces = [PartFile(path, "forwards", name, meta).arrays(list(DTYPES)) for name in names]
    columns = {
        name: np.concatenate([np.empty(0, dtype), *(piece[name] for piece in pieces)], dtype=dtype)
        for name, dtype in DTYPES.items()
    }
    forward = columns["forward_id"]
    call_parts = np.append(np.flatnonzero(np.diff(forward, prepend=-1) != 0), len(forward))
    part_rows = np.cumsum([0, *(len(piece["forward_id"]) for piece in pieces)])
    return StoredForwards(
        path=path,
        meta=meta,
        names=tuple(names),
        columns=columns,
        part_rows=part_rows,
        call_parts=call_parts,
        part_calls=np.searchsorted(call_parts, part_rows),
        row_offsets=np.concatenate(([0], np.cumsum(columns["num_tokens"])))[call_parts],
    )


def structure_faults(stored: StoredForwards) -> Iterator[str]:
    """Faults that leave no way to tell which rows belong to which call: order, tiling, one kind a call.

    The parts of a call cover its rows in order and without gaps, so that ``num_tokens`` sums to the rows of the call.
    """
    c = stored.columns
    forward = c["forward_id"].astype(np.int64)
    if not len(forward):
        return
    previous = np.concatenate(([-1], forward[:-1]))
    words = "forward_id {forward_id} follows {previous}, it must never decrease"
    yield from stored.faults(forward < previous, words, previous=previous)
    yield from stored.faults(c["num_tokens"] < 1, "num_tokens must be at least 1")
    begins = np.cumsum(c["num_tokens"]) - c["num_tokens"]
    call = np.repeat(np.arange(stored.num_calls), np.diff(stored.call_parts))
    expected = begins - begins[stored.call_parts[:-1]][call]
    yield from stored.faults(c["row_start"] != expected, WRONG_START, expected=expected)
    yield from stored.faults(
        c["kind"] != stored.call_kinds[call],
        "kind {own} stands in a {first} call, all requests of a call share one",
        own=np.array(KINDS)[c["kind"]],
        first=np.array(KINDS)[stored.call_kinds[call]],
    )
    order = np.lexsort((c["request_id"], call))
    twice = np.zeros(len(forward), bool)
    twice[order[1:]] = (np.diff(call[order]) == 0) & (np.diff(c["request_id"][order].astype(np.int64)) == 0)
    yield from stored.faults(twice, "request {request_id} stands twice in one call")


def rule_faults(stored: StoredForwards) -> Iterator[str]:
    """Faults of single values: block, step, branches. ``step`` counts up from 0 over a block's denoise forwards."""
    c = stored.columns
    for wrong, words in ROW_RULES:
        yield from stored.faults(wrong(c), words)
    counted = np.flatnonzero((c["kind"] == DENOISE) & (c["block"] >= 0))
    order = counted[np.lexsort((counted, c["block"][counted], c["request_id"][counted]))]
    request, block = c["request_id"][order].astype(np.int64), c["block"][order]
    new = np.flatnonzero((np.diff(request, prepend=-1) != 0) | (np.diff(block, prepend=-1) != 0))
    expected = c["step"].copy()
    expected[order] = np.arange(len(order)) - np.repeat(new, np.diff(new, append=len(order)))
    yield from stored.faults(c["step"] != expected, WRONG_STEP, expected=expected)


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
    in_block = stored.columns["block"] >= 0
    call = np.repeat(np.arange(calls), np.diff(stored.call_parts))[in_block]
    pair = (stored.columns["request_id"][in_block].astype(np.int64) << 32) | stored.columns["block"][in_block]
    _, first, number = np.unique(pair, return_index=True, return_inverse=True)
    last = np.zeros(len(first), np.int64)
    np.maximum.at(last, number, call)
    open_blocks = np.cumsum(
        np.bincount(call[first] + 1, minlength=calls + 2) - np.bincount(last + 1, minlength=calls + 2)
    )
    allowed = open_blocks[: calls + 1] == 0
    places = np.flatnonzero(allowed)
    cuts = [0]
    for end in np.unique([*stored.part_calls[allowed[stored.part_calls]], 0, calls])[1:]:
        while stored.row_offsets[end] - stored.row_offsets[cuts[-1]] > max_rows:
            inside = places[(places > cuts[-1]) & (places < end)]
            if len(inside) == 0:
                break
            fitting = inside[stored.row_offsets[inside] - stored.row_offsets[cuts[-1]] <= max_rows]
            cuts.append(int(fitting[-1] if len(fitting) else inside[0]))
        cuts.append(int(end))
    return np.array(cuts, np.int64)
