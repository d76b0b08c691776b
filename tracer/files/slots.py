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
    """Token rows of the (call, request) parts of a segment: N parts, T rows."""

    request_id: np.ndarray  # int64 [N]
    branches: np.ndarray  # int64 [N], copies that a part's rows are made of
    starts: np.ndarray  # int64 [N + 1], first row of each part, and T
    positions: np.ndarray  # int [T]


class _Seen(NamedTuple):
    """Where the rows of a request's last call stand in the memory, and how many a branch has."""

    start: int
    own: int
    branches: int


@dataclass(slots=True)
class SlotMemory:
    """Slots of the last call of every request that is still under way; bounded by the rows of one segment.

    ``_sets`` holds, per layer, ids [M, K] and whether they are known, bool [M], with the segment's rows after them until
    :meth:`carry` is called; ``_positions`` the rows' positions, ``_seen`` where a request's rows stand.
    """

    _seen: dict[int, _Seen] = field(default_factory=dict)
    _sets: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    _positions: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    _size: int = 0

    def references(self, parts: PartRows) -> np.ndarray:
        """Memory row each of a segment's T token rows is aligned with, -1 for none; int64 [T].

        The first M memory rows are those carried over, row M + t is token row t of the segment. A branch follows itself, or the
        first branch where the request's last call had fewer.
        """
        own = np.diff(parts.starts) // parts.branches
        self._positions = np.concatenate((self._positions, parts.positions.astype(np.int64)))
        requests, number = np.unique(parts.request_id, return_inverse=True)
        seen = np.array([self._seen.get(int(request), (-1, 0, 0)) for request in requests], np.int64).reshape(-1, 3)
        found = np.full(int(parts.starts[-1]), -1, np.int64)
        _refer(number, own, parts.branches, parts.starts + self._size, self._positions, seen, self._size, found)
        self._seen |= {int(request): _Seen(*row) for request, row in zip(requests, seen.tolist(), strict=True)}
        return found

    def align(
        self,
        layers: list[int],
        expert_ids: np.ndarray,
        gate_weights: np.ndarray,
        routed: np.ndarray,
        cell_rows: np.ndarray,
        row_offsets: np.ndarray,
        reference: np.ndarray,
    ) -> None:
        """Give the rows of all cells stable slots, in place; ``layers`` [L], the others as in :func:`stable_slots`."""
        rows, top_k = self._size + int(row_offsets[-1]), expert_ids.shape[1]
        memory = np.empty((len(layers), rows, top_k), expert_ids.dtype)
        known = np.zeros((len(layers), rows), np.bool_)
        for own_memory, own_known, layer in zip(memory, known, layers, strict=True):
            if layer in self._sets:
                own_memory[: self._size], own_known[: self._size] = self._sets[layer]
        others = routed, cell_rows, row_offsets, reference
        if top_k == 8 and expert_ids.dtype == np.uint8:
            words = [array.reshape(-1).view(np.uint64) for array in (expert_ids, memory)]
            stable_slots_of_eight(words[0], gate_weights.reshape(-1), *others, words[1].reshape(known.shape), known)
        else:
            stable_slots(expert_ids, gate_weights, *others, memory, known)
        self._sets = dict(zip(layers, zip(memory, known, strict=True), strict=True))

    def carry(self, ended: Iterable[int]) -> None:
        """Keep the rows of each request's last call in the segment; forget requests that ended or were not in it."""
        for request in ended:
            self._seen.pop(request, None)
        self._seen = {request: seen for request, seen in self._seen.items() if seen.start >= self._size}
        kept, moved, size = [], {}, 0
        for request, seen in self._seen.items():
            rows = seen.own * seen.branches
            kept.append(np.arange(seen.start, seen.start + rows))
            moved[request] = seen._replace(start=size)
            size += rows
        index = np.concatenate(kept) if kept else np.empty(0, np.int64)
        self._seen, self._size, self._positions = moved, size, self._positions[index]
        self._sets = {layer: (memory[index], known[index]) for layer, (memory, known) in self._sets.items()}


@njit
def stable_slots(expert_ids, gate_weights, routed, cell_rows, row_offsets, reference, memory, known):
    """Reorder each row's experts so that those it shares with its reference row keep their slots.

    Newcomers take the free slots in their own order, so unstable experts gather in the slots that change anyway; a row without
    a reference comes out by ascending id. Weights move along. The sets never change. Rows that were not routed hand their
    reference's slots on and stay as they are.

    Parameters
    ----------
    expert_ids : uint8 or uint16 [S, K]
        Rows of all cells, changed in place.
    gate_weights : uint16 [S, K] or [0, K]
        Bits of the float16 weights, likewise; no rows when there are none.
    routed : bool [S] or [0]
        Empty when every row was routed.
    cell_rows : int64 [L, F]
        First row of the cell of each layer and call, -1 for calls without the layer.
    row_offsets : int64 [F + 1]
        First token row of each call, and T.
    reference : int64 [T]
        The row each one is aligned with, an index into ``memory``; -1 for none.
    memory : like expert_ids [L, M + T, K]
        The first M rows of a layer are the slots remembered from earlier; row M + t is filled for row t.
    known : bool [L, M + T]
        Whether a row of ``memory`` holds a set; the first M are given.
    """
    top_k = expert_ids.shape[1]
    carried = known.shape[1] - len(reference)
    weighted = len(gate_weights) > 0
    # 1 + the slot an expert had in the reference row; cleared after each row by walking the same ids again
    slot_of = np.zeros(1 << (8 * expert_ids.itemsize), np.int16)
    slot = np.empty(top_k, np.int64)
    free = np.zeros(top_k, np.bool_)
    bits = np.empty(top_k, np.uint16)
    for cell in range(cell_rows.size):
        call, layer = divmod(cell, len(cell_rows))
        base = cell_rows[layer, call] - row_offsets[call]
        for t in range(row_offsets[call], row_offsets[call + 1]):
            before, now = reference[t], carried + t
            linked = before >= 0 and known[layer, before]
            own = cell_rows[layer, call] >= 0 and (len(routed) == 0 or routed[base + t])
            known[layer, now] = linked or own
            if not own:
                for k in range(top_k if linked else 0):
                    memory[layer, now, k] = memory[layer, before, k]
                continue
            for k in range(top_k):
                slot[k] = 0
                for other in range(0 if linked else top_k):
                    slot[k] += expert_ids[base + t, other] < expert_ids[base + t, k]
            if linked:
                for k in range(top_k):
                    slot_of[memory[layer, before, k]] = k + 1
                    free[k] = True
                for k in range(top_k):
                    slot[k] = slot_of[expert_ids[base + t, k]] - 1
                    if slot[k] >= 0:
                        free[slot[k]] = False
                place = 0
                for k in range(top_k):
                    slot_of[memory[layer, before, k]] = 0
                    if slot[k] < 0:
                        while not free[place]:
                            place += 1
                        slot[k] = place
                        place += 1
            for k in range(top_k):
                memory[layer, now, slot[k]] = expert_ids[base + t, k]
                if weighted:
                    bits[slot[k]] = gate_weights[base + t, k]
            for k in range(top_k):
                expert_ids[base + t, k] = memory[layer, now, k]
                if weighted:
                    gate_weights[base + t, k] = bits[k]


@njit
def stable_slots_of_eight(expert_ids, gate_weights, routed, cell_rows, row_offsets, reference, memory, known):
    """:func:`stable_slots` for rows of eight uint8 ids, each row one uint64: the same result many times as fast.

    ``expert_ids`` uint64 [S], ``memory`` uint64 [L, M + T] and ``gate_weights`` uint16 [S * 8] or [0] are the arrays there, in
    other views. A call's rows are compared with their references first, all pairs of slots by eight rotations and without a
    branch, which becomes vector code; what depends on a row's newcomers comes after.
    """
    low, high = np.uint64(0x7F7F7F7F7F7F7F7F), np.uint64(0x8080808080808080)
    # times a flag at byte i, the top byte is i
    number = np.uint64(0x0001020304050607)
    # byte j is j
    places = np.uint64(0x0706050403020100)
    byte, one, seven, top = np.uint64(255), np.uint64(1), np.uint64(7), np.uint64(56)
    carried = known.shape[1] - len(reference)
    weighted = len(gate_weights) > 0
    most = 0
    for call in range(cell_rows.shape[1]):
        most = max(most, row_offsets[call + 1] - row_offsets[call])
    # flags, in bit 7, of the reference's slots that stay and of the ids that stay; byte j of order: which id goes into slot j
    kept, taken, orders = np.empty(most, np.uint64), np.empty(most, np.uint64), np.empty(most, np.uint64)
    bits = np.empty(8 * most if weighted else 0, np.uint16)
    # calls before layers, so that ids and weights are walked through as they stand
    for cell in range(cell_rows.size):
        call, layer = divmod(cell, len(cell_rows))
        first, rows = row_offsets[call], row_offsets[call + 1] - row_offsets[call]
        # loops over slices from 0 on become vector code, indices with an offset do not
        held, sets = known[layer], memory[layer]
        linked, now = held[carried + first : carried + first + rows], sets[carried + first : carried + first + rows]
        for t in range(rows):
            source = reference[first + t]
            linked[t] = source >= 0 and held[source]
            now[t] = sets[source] if linked[t] else np.uint64(0)
        base = cell_rows[layer, call]
        if base < 0:
            continue
        given = expert_ids[base : base + rows]
        for t in range(rows):
            earlier, ids = now[t], given[t]
            mine, theirs, order = np.uint64(0), np.uint64(0), np.uint64(0)
            for r in range(8):
                left, right = np.uint64(8 * r), np.uint64((64 - 8 * r) & 63)
                other = earlier ^ ((ids << left) | (ids >> right))
                # exactly the bytes that are zero
                flags = ~(((other & low) + low) | other) & high
                mine |= flags
                theirs |= (flags >> left) | (flags << right)
                order |= (flags - (flags >> seven)) & ((places << left) | (places >> right))
            kept[t], taken[t], orders[t] = mine, theirs, order
        own_bits = gate_weights[8 * base : 8 * (base + rows)]
        for i in range(len(own_bits)):
            bits[i] = own_bits[i]
        for t in range(rows):
            if len(routed) > 0 and not routed[base + t]:
                continue
            ids, row, order = given[t], np.uint64(0), np.uint64(0)
            if linked[t]:
                row = now[t] & (kept[t] | (kept[t] - (kept[t] >> seven)))
                order = orders[t]
                newcomers, holes, rounds = taken[t] ^ high, kept[t] ^ high, 0
                # few rows have more than two newcomers, so two go without a branch
                while newcomers != 0 or rounds < 2:
                    flag, hole = newcomers & (~newcomers + one), holes & (~holes + one)
                    newcomers ^= flag
                    holes ^= hole
                    i = ((flag >> seven) * number) >> top
                    row |= ((ids >> (i * np.uint64(8))) & byte) * (hole >> seven)
                    order |= i * (hole >> seven)
                    rounds += 1
            else:
                for n in range(8):
                    expert = (ids >> np.uint64(8 * n)) & byte
                    shift = np.uint64(0)
                    for j in range(8):
                        shift += np.uint64(((ids >> np.uint64(8 * j)) & byte) < expert) << np.uint64(3)
                    row |= expert << shift
                    order |= np.uint64(n) << shift
                linked[t] = True
            now[t] = given[t] = row
            if weighted:
                for j in range(8):
                    own_bits[8 * t + j] = bits[8 * t + np.int64((order >> np.uint64(8 * j)) & byte)]


@njit
def _refer(number, own, branches, starts, positions, seen, carried, found):
    """Fill ``found`` (:meth:`SlotMemory.references`) for N parts in order.

    number, own, branches int64 [N]: each part's request, rows of a branch and branches; starts int64 [N + 1] and ``seen`` int64
    [requests, 3], a :class:`_Seen` each (-1 first for none), count memory rows; ``seen`` is brought up to date.
    """
    place = np.full((positions.max() if len(positions) else -1) + 2, -1, np.int64)
    for n in range(len(number)):
        start, earlier, copies = seen[number[n]]
        for j in range(earlier if start >= 0 else 0):
            if positions[start + j] >= 0:
                place[positions[start + j]] = j
        for j in range(own[n] if start >= 0 else 0):
            position = positions[starts[n] + j]
            if position >= 0 and place[position] >= 0:
                for branch in range(branches[n]):
                    source = start + (branch if branch < copies else 0) * earlier
                    found[starts[n] - carried + branch * own[n] + j] = source + place[position]
        for j in range(earlier if start >= 0 else 0):
            place[positions[start + j]] = -1
        seen[number[n]] = starts[n], own[n], branches[n]
