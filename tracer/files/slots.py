"""Which earlier row each token row is aligned with, so that an expert keeps its slot from call to call.

The order of a row's ids is free in the format. Keeping an expert in the slot it had for that position in the request's
previous call makes zstd about three times as good on ids (trace-format.md). All branches of a call follow the first branch of
the call before.

Shapes: L layers, M rows remembered, R = M + T with the T token rows of a segment, N (call, request) parts, K experts a row.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tracer.jit import njit

# rows compared with their references at a time
MOST_ROWS = 1024


class PartRows(NamedTuple):
    """Token rows of the (call, request) parts of a segment."""

    request_id: np.ndarray  # int64 [N]
    branches: np.ndarray  # int64 [N], copies that a part's rows are made of
    num_tokens: np.ndarray  # int64 [N]
    positions: np.ndarray  # int [T]


@dataclass(slots=True)
class SlotMemory:
    """The rows of the first branch of the last call of every request under way, which end a segment and begin the next.

    ``size`` is M; ``_lengths`` how many rows each request has, in order; ``_positions`` [M]; ``_sets`` by layer the ids [M, K]
    and their count [M].
    """

    size: int = 0
    _lengths: dict[int, int] = field(default_factory=dict)
    _positions: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    _sets: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def align(
        self,
        layers: tuple[int, ...],
        ids: np.ndarray,
        weights: np.ndarray,
        count: np.ndarray,
        parts: PartRows,
        ended: Collection[int],
    ) -> None:
        """Give all rows of a segment stable slots, in place, and remember those that the next segment goes on from.

        Parameters
        ----------
        layers : tuple of int
            The L layers.
        ids : uint8 or uint16 [L, R, K]
            The first M rows are filled in here.
        weights : float16 [L, R, K] or [L, 0, K]
            Reordered along with the ids.
        count : uint8 [L, R]
            How many ids are real. Rows of fewer than K keep their order, as the real ones come first, and are followed by none.
        parts : PartRows
        ended : collection of int
            Requests to be forgotten, as are those that are not in the segment.
        """
        for n, layer in enumerate(layers):
            if layer in self._sets:
                ids[n, : self.size], count[n, : self.size] = self._sets[layer]
        requests = [*self._lengths, *parts.request_id.tolist()]
        lengths = np.array([*self._lengths.values(), *parts.num_tokens], np.int64)
        branch = np.array([*self._lengths.values(), *(parts.num_tokens // parts.branches)], np.int64)
        starts = np.concatenate(([0], np.cumsum(lengths)))
        positions = np.concatenate((self._positions, parts.positions.astype(np.int64)))
        last: dict[int, int] = {}
        previous = np.empty(len(requests), np.int64)
        for number, request in enumerate(requests):
            previous[number] = last.get(request, -1)
            last[request] = number
        reference = references(previous, starts, branch, positions)
        whole = count == ids.shape[2]
        if ids.shape[2] == 8 and ids.dtype == np.uint8:
            words = ids.view(np.uint64).reshape(whole.shape)
            stable_slots_of_eight(words, weights.view(np.uint16), whole, reference, self.size)
        else:
            stable_slots(ids, weights.view(np.uint16), whole, reference, self.size)
        going_on = {r: n for r, n in last.items() if n >= len(self._lengths) and r not in ended}
        self._lengths = {request: int(branch[number]) for request, number in going_on.items()}
        rows = [np.arange(starts[number], starts[number] + branch[number]) for number in going_on.values()]
        kept = np.concatenate([np.empty(0, np.int64), *rows])
        self.size, self._positions = len(kept), positions[kept]
        self._sets = {layer: (ids[n, kept], count[n, kept]) for n, layer in enumerate(layers)}


@njit
def references(previous, starts, branch, positions):
    """The row each one is aligned with, that of its position in the first branch of the part before; -1 for none; int64 [R].

    Parts (remembered ones first): ``previous`` int64 [N] the part of the request's call before, -1 for none; ``starts`` int64
    [N + 1] their rows, ``branch`` int64 [N] the rows of their first branch; ``positions`` int64 [R].
    """
    reference = np.full(len(positions), -1, np.int64)
    # the last one is that of padding, -1
    place = np.full((positions.max() if len(positions) else 0) + 2, -1, np.int64)
    for n in range(len(previous)):
        before = previous[n]
        if before < 0:
            continue
        first, end = starts[before], starts[before] + branch[before]
        for t in range(first, end):
            place[positions[t]] = t
        for t in range(starts[n], starts[n + 1]):
            reference[t] = place[positions[t]]
        for t in range(first, end):
            place[positions[t]] = -1
    return reference


@njit
def stable_slots(ids, weights, whole, reference, remembered):
    """Reorder each row's experts, in place, so that those it shares with its reference row keep their slots.

    Newcomers take the free slots in their own order, so unstable experts gather in the slots that change anyway; a row without
    a reference comes out by ascending id. Weights move along.

    ids uint8 or uint16 [L, R, K]; weights uint16 [L, R, K], bits of the float16, or [L, 0, K]; whole bool [L, R], rows that
    have all K experts, the others are left alone; reference int64 [R]; the first ``remembered`` rows have their slots already.
    """
    layers, rows, top_k = ids.shape
    weighted = weights.shape[1] > 0
    # 1 + the slot an expert had in the reference row; cleared after each row by walking the same ids again
    slot_of = np.zeros(1 << (8 * ids.itemsize), np.int16)
    slot, free = np.empty(top_k, np.int64), np.zeros(top_k, np.bool_)
    given, bits = np.empty(top_k, ids.dtype), np.empty(top_k, np.uint16)
    for row in range(layers * rows):
        layer, t = divmod(row, rows)
        before = reference[t]
        linked = before >= 0 and whole[layer, before]
        if t < remembered or not whole[layer, t]:
            continue
        for k in range(top_k):
            given[k] = ids[layer, t, k]
            bits[k] = weights[layer, t, k] if weighted else 0
            free[k] = linked
        if linked:
            for k in range(top_k):
                slot_of[ids[layer, before, k]] = k + 1
        for k in range(top_k):
            slot[k] = slot_of[given[k]] - 1
            if slot[k] >= 0:
                free[slot[k]] = False
            elif not linked:
                slot[k] = (given < given[k]).sum()
        place = 0
        for k in range(top_k):
            if linked:
                slot_of[ids[layer, before, k]] = 0
            if slot[k] < 0:
                while not free[place]:
                    place += 1
                slot[k] = place
                place += 1
        for k in range(top_k):
            ids[layer, t, slot[k]] = given[k]
            if weighted:
                weights[layer, t, slot[k]] = bits[k]


@njit
def stable_slots_of_eight(ids, weights, whole, reference, remembered):
    """:func:`stable_slots` for rows of eight uint8 ids, each row one uint64 of ``ids`` [L, R]: the same many times as fast.

    Rows are compared with their references first, all pairs of slots by eight rotations and without a branch, which becomes
    vector code; what depends on a row's newcomers comes after.
    """
    low, high = np.uint64(0x7F7F7F7F7F7F7F7F), np.uint64(0x8080808080808080)
    # times a flag at byte i, the top byte is i; and byte j is j
    number, places = np.uint64(0x0001020304050607), np.uint64(0x0706050403020100)
    byte, one, seven, top = np.uint64(255), np.uint64(1), np.uint64(7), np.uint64(56)
    weighted = weights.shape[1] > 0
    linked, before = np.empty(MOST_ROWS, np.bool_), np.empty(MOST_ROWS, np.uint64)
    # flags, in bit 7, of the reference's slots that stay and of the ids that stay; byte j of order: which id goes into slot j
    kept, taken, orders = np.empty(MOST_ROWS, np.uint64), np.empty(MOST_ROWS, np.uint64), np.empty(MOST_ROWS, np.uint64)
    bits = np.empty(8, np.uint16)
    for layer in range(len(ids)):
        first = remembered
        while first < len(reference):
            end = first
            # rows that follow none of one another
            while end < len(reference) and end < first + MOST_ROWS and reference[end] < first:
                source = reference[end]
                linked[end - first] = source >= 0 and whole[layer, source]
                before[end - first] = ids[layer, source]
                end += 1
            given = ids[layer, first:end]
            for t in range(len(given)):
                earlier, row = before[t], given[t]
                mine, theirs, order = np.uint64(0), np.uint64(0), np.uint64(0)
                for r in range(8):
                    left, right = np.uint64(8 * r), np.uint64((64 - 8 * r) & 63)
                    other = earlier ^ ((row << left) | (row >> right))
                    # exactly the bytes that are zero
                    flags = ~(((other & low) + low) | other) & high
                    mine |= flags
                    theirs |= (flags >> left) | (flags << right)
                    order |= (flags - (flags >> seven)) & ((places << left) | (places >> right))
                kept[t], taken[t], orders[t] = mine, theirs, order
            for t in range(len(given)):
                if not whole[layer, first + t]:
                    continue
                row, stable, order = given[t], np.uint64(0), np.uint64(0)
                if linked[t]:
                    stable = before[t] & (kept[t] | (kept[t] - (kept[t] >> seven)))
                    order = orders[t]
                    newcomers, holes, rounds = taken[t] ^ high, kept[t] ^ high, 0
                    # few rows have more than two newcomers, so two go without a branch
                    while newcomers != 0 or rounds < 2:
                        flag, hole = newcomers & (~newcomers + one), holes & (~holes + one)
                        newcomers ^= flag
                        holes ^= hole
                        i = ((flag >> seven) * number) >> top
                        stable |= ((row >> (i * np.uint64(8))) & byte) * (hole >> seven)
                        order |= i * (hole >> seven)
                        rounds += 1
                else:
                    for n in range(8):
                        expert, shift = (row >> np.uint64(8 * n)) & byte, np.uint64(0)
                        for j in range(8):
                            shift += np.uint64(((row >> np.uint64(8 * j)) & byte) < expert) << np.uint64(3)
                        stable |= expert << shift
                        order |= np.uint64(n) << shift
                given[t] = stable
                if weighted:
                    own = weights[layer, first + t]
                    for j in range(8):
                        bits[j] = own[j]
                    for j in range(8):
                        own[j] = bits[np.int64((order >> np.uint64(8 * j)) & byte)]
            first = end
