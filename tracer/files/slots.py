"""Which earlier row each token row is aligned with, so that an expert keeps its slot from call to call.

The order of a row's ids is free in the format. Keeping an expert in the slot it had for that position in the request's
previous call makes zstd about three times as good on ids (trace-format.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tracer.jit import njit


class PartRows(NamedTuple):
    """Token rows of one (call, request): positions of all its rows and the branches they are copied in."""

    request_id: int
    positions: np.ndarray  # int [n]
    branches: int


class _Seen(NamedTuple):
    positions: np.ndarray  # of the first branch
    branches: int
    start: int  # row of the memory its first row has


@dataclass(slots=True)
class SlotMemory:
    """Slots of the last call of every request that is still under way; bounded by the rows of one segment.

    ``_sets`` holds, per layer, ids [S, K] and whether they are known, bool [S]; ``_filled`` the same with the segment's rows
    after them; ``_seen`` where a request's rows stand in it.
    """

    _seen: dict[int, _Seen] = field(default_factory=dict)
    _sets: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    _filled: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    _size: int = 0

    def references(self, parts: Iterable[PartRows]) -> np.ndarray:
        """Memory row each of a segment's T token rows is aligned with, -1 for none; int64 [T].

        The first S memory rows are those carried over, row S + t is token row t of the segment.
        """
        found = []
        at = self._size
        for part in parts:
            own = len(part.positions) // part.branches
            positions = part.positions[:own]
            previous = self._seen.get(part.request_id)
            if previous is None:
                found.append(np.full(len(part.positions), -1, np.int64))
            elif part.branches == previous.branches and np.array_equal(previous.positions, positions):
                found.append(np.arange(previous.start, previous.start + len(part.positions)))
            else:
                matched = _match(previous.positions, positions)
                for branch in range(part.branches):
                    # a branch follows itself, or the first branch where the last call had fewer
                    source = branch if branch < previous.branches else 0
                    start = previous.start + source * len(previous.positions)
                    found.append(np.where(matched >= 0, matched + start, -1))
            self._seen[part.request_id] = _Seen(positions, part.branches, at)
            at += len(part.positions)
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def align(
        self,
        layer: int,
        expert_ids: np.ndarray,
        gate_weights: np.ndarray,
        routed: np.ndarray,
        reference: np.ndarray,
        out_start: np.ndarray,
        out_ids: np.ndarray,
        out_weights: np.ndarray,
    ) -> None:
        """Write a layer's rows with stable slots; arguments as in :func:`stable_slots`."""
        rows, top_k = expert_ids.shape
        memory = np.empty((self._size + rows, top_k), expert_ids.dtype)
        known = np.zeros(self._size + rows, np.bool_)
        if layer in self._sets:
            memory[: self._size], known[: self._size] = self._sets[layer]
        if top_k == 8 and expert_ids.dtype == np.uint8:
            words = [np.ascontiguousarray(array).reshape(-1).view(np.uint64) for array in (expert_ids, memory, out_ids)]
            stable_slots_of_eight(
                words[0], gate_weights.reshape(-1), routed, reference, words[1], known, out_start, words[2], out_weights
            )
        else:
            stable_slots(expert_ids, gate_weights, routed, reference, memory, known, out_start, out_ids, out_weights)
        self._filled[layer] = memory, known

    def carry(self, ended: Iterable[int]) -> None:
        """Keep the rows of each request's last call in the segment; forget requests that ended or were not in it."""
        for request in ended:
            self._seen.pop(request, None)
        self._seen = {request: seen for request, seen in self._seen.items() if seen.start >= self._size}
        kept, moved, size = [], {}, 0
        for request, seen in self._seen.items():
            rows = len(seen.positions) * seen.branches
            kept.append(np.arange(seen.start, seen.start + rows))
            moved[request] = seen._replace(start=size)
            size += rows
        index = np.concatenate(kept) if kept else np.empty(0, np.int64)
        self._seen, self._size = moved, size
        self._sets = {layer: (memory[index], known[index]) for layer, (memory, known) in self._filled.items()}
        self._filled = {}


@njit
def stable_slots(expert_ids, gate_weights, routed, reference, memory, known, out_start, out_ids, out_weights):
    """Reorder each row's experts so that those it shares with its reference row keep their slots.

    Newcomers take the free slots in their own order, so unstable experts gather in the slots that change anyway. Weights
    move along. The sets never change. Rows that were not routed hand their reference's slots on and come out as zeros.

    Parameters
    ----------
    expert_ids : uint8 or uint16 [T, K]
    gate_weights : uint16 [T, K] or [0, K]
        Bits of the float16 weights; no rows when there are none.
    routed : bool [T]
    reference : int64 [T]
        The row this one is aligned with, an index into ``memory``; -1 for none.
    memory : like expert_ids [S + T, K]
        The first S rows are the slots remembered from earlier; row S + t is filled for row t.
    known : bool [S + T]
        Whether a row of ``memory`` holds a set; the first S are given.
    out_start : int64 [T]
        First element of row t in the flat outputs; -1 writes nothing, for calls without the layer.
    out_ids, out_weights : like the inputs, flat
    """
    rows, top_k = expert_ids.shape
    carried = len(memory) - rows
    weighted = len(gate_weights) > 0
    # 1 + the slot an expert had in the reference row; cleared after each row by walking the same ids again
    slot_of = np.zeros(1 << (8 * expert_ids.itemsize), np.int16)
    slot = np.empty(top_k, np.int64)
    free = np.zeros(top_k, np.bool_)
    for t in range(rows):
        before = reference[t]
        linked = before >= 0 and known[before]
        at = out_start[t]
        known[carried + t] = linked or routed[t]
        if not routed[t]:
            for k in range(top_k):
                if linked:
                    memory[carried + t, k] = memory[before, k]
                if at >= 0:
                    out_ids[at + k] = 0
                    if weighted:
                        out_weights[at + k] = 0
            continue
        for k in range(top_k):
            slot[k] = k
        if linked:
            for k in range(top_k):
                slot_of[memory[before, k]] = k + 1
                free[k] = True
            for k in range(top_k):
                slot[k] = slot_of[expert_ids[t, k]] - 1
                if slot[k] >= 0:
                    free[slot[k]] = False
            place = 0
            for k in range(top_k):
                slot_of[memory[before, k]] = 0
                if slot[k] < 0:
                    while not free[place]:
                        place += 1
                    slot[k] = place
                    place += 1
        for k in range(top_k):
            memory[carried + t, slot[k]] = expert_ids[t, k]
            out_ids[at + slot[k]] = expert_ids[t, k]
            if weighted:
                out_weights[at + slot[k]] = gate_weights[t, k]


@njit
def stable_slots_of_eight(ids, gate_weights, routed, reference, memory, known, out_start, out_ids, out_weights):
    """:func:`stable_slots` for rows of eight uint8 ids, each row one uint64: the same result three times as fast.

    ``ids`` uint64 [T], ``memory`` uint64 [S + T] and ``out_ids`` uint64 [any] are the arrays there, seen as uint64, and
    ``gate_weights`` is flat. Weights of rows that were not routed must be 0. A byte of ``ids`` that equals a byte of the
    reference row shows as a zero byte of an exclusive or; its lowest flag is exact.
    """
    ones, high = np.uint64(0x0101010101010101), np.uint64(0x8080808080808080)
    # times a flag at byte i, the top byte is i
    number = np.uint64(0x0001020304050607)
    byte, one, seven, top = np.uint64(255), np.uint64(1), np.uint64(7), np.uint64(56)
    carried = len(memory) - len(ids)
    weighted = len(gate_weights) > 0
    for t in range(len(ids)):
        before = reference[t]
        linked = before >= 0 and known[before]
        at = out_start[t]
        known[carried + t] = linked or routed[t]
        row = ids[t] if routed[t] else np.uint64(0)
        # byte j: which of the ids goes into slot j
        order = np.uint64(0x0706050403020100)
        if linked and routed[t]:
            earlier = memory[before]
            given, row, order = row, np.uint64(0), np.uint64(0)
            newcomers, holes = high, np.uint64(0)
            for j in range(8):
                shift = np.uint64(8 * j)
                expert = (earlier >> shift) & byte
                other = given ^ (expert * ones)
                flag = (other - ones) & ~other & high
                flag &= ~flag + one
                newcomers ^= flag
                kept = np.uint64(flag != 0)
                order |= (((flag >> seven) * number) >> top) << shift
                row |= (expert * kept) << shift
                holes |= (one - kept) << (shift + seven)
            while newcomers != 0:
                flag = newcomers & (~newcomers + one)
                hole = holes & (~holes + one)
                newcomers ^= flag
                holes ^= hole
                i = ((flag >> seven) * number) >> top
                row |= ((given >> (i * np.uint64(8))) & byte) * (hole >> seven)
                order |= i * (hole >> seven)
        memory[carried + t] = memory[before] if linked and not routed[t] else row
        if at >= 0:
            out_ids[at >> 3] = row
            if weighted:
                for j in range(8):
                    out_weights[at + j] = gate_weights[8 * t + np.int64((order >> np.uint64(8 * j)) & byte)]


def _match(previous: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Index in ``previous`` of each of ``positions``, -1 where it is not there or padding. int64 [n]."""
    if len(previous) == 0:
        return np.full(len(positions), -1, np.int64)
    order = np.argsort(previous, kind="stable")
    place = np.minimum(np.searchsorted(previous, positions, sorter=order), len(previous) - 1)
    found = order[place]
    return np.where((previous[found] == positions) & (positions >= 0), found, -1)
