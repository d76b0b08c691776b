"""Numba primitives that count experts: distinct ones, their union, their loads.

T rows, K experts a row, E experts, F forwards. Imports numba and NumPy only. Nothing here checks its input: ids are below E and
offsets ascend because the trace's reader made sure of it.
"""

from __future__ import annotations

import numpy as np

from tracer.bits import popcount
from tracer.jit import njit


@njit
def _stamp(words, flat, start, stop, seen):
    """Mark the ids in ``flat[start:stop]``, eight bytes a load; ``seen`` [256]."""
    head = min(stop, (start + 7) // 8 * 8)
    tail = max(head, stop // 8 * 8)
    for i in range(start, head):
        seen[flat[i]] = 1
    for i in range(head // 8, tail // 8):
        word = words[i]
        seen[np.uint8(word)] = 1
        seen[np.uint8(word >> np.uint64(8))] = 1
        seen[np.uint8(word >> np.uint64(16))] = 1
        seen[np.uint8(word >> np.uint64(24))] = 1
        seen[np.uint8(word >> np.uint64(32))] = 1
        seen[np.uint8(word >> np.uint64(40))] = 1
        seen[np.uint8(word >> np.uint64(48))] = 1
        seen[np.uint8(word >> np.uint64(56))] = 1
    for i in range(tail, stop):
        seen[flat[i]] = 1


@njit
def _marks(seen):
    """How many of the 256 bytes are 1; sums of up to 128 fit a byte, so one instruction adds 32 of them."""
    low = np.uint8(0)
    high = np.uint8(0)
    for e in range(128):
        low += seen[e]
    for e in range(128, 256):
        high += seen[e]
    return np.int64(low) + np.int64(high)


@njit
def _unique_full(words, flat, width, row_offsets, unique):
    """Distinct experts of each forward where all rows use all their slots and ids are bytes."""
    seen = np.zeros(256, np.uint8)
    for f in range(len(row_offsets) - 1):
        _stamp(words, flat, row_offsets[f] * width, row_offsets[f + 1] * width, seen)
        unique[f] = _marks(seen)
        seen[:] = 0


@njit
def _unique_narrow(flat, width, row_offsets, unique):
    """As :func:`_unique_full` for up to 128 experts: a set is two words that stay in vector registers, an id a lane."""
    none = np.uint64(0)
    for f in range(len(row_offsets) - 1):
        a, b = none, none
        for at in range(np.uint64(row_offsets[f] * width), np.uint64(row_offsets[f + 1] * width)):
            bit = np.uint64(1) << np.uint64(flat[at] & 63)
            a |= bit if flat[at] < 64 else none
            b |= none if flat[at] < 64 else bit
        unique[f] = popcount(a) + popcount(b)


@njit
def _unique(ids, count, rows, row_offsets, num_experts, unique):
    """Distinct experts of each forward over the rows marked in ``rows`` (an empty array: over all)."""
    seen = np.zeros(num_experts, np.uint8)
    for f in range(len(row_offsets) - 1):
        for t in range(row_offsets[f], row_offsets[f + 1]):
            if len(rows) == 0 or rows[t]:
                for k in range(count[t]):
                    seen[ids[t, k]] = 1
        total = np.uint32(0)
        for e in range(num_experts):
            total += seen[e]
        unique[f] = total
        seen[:] = 0


def unique_experts(
    ids: np.ndarray, count: np.ndarray, row_offsets: np.ndarray, num_experts: int, rows: np.ndarray | None = None
) -> np.ndarray:
    """Distinct experts of each forward, int64 [F].

    Parameters
    ----------
    ids : np.ndarray
        uint8 | uint16 [T, K], C-contiguous.
    count : np.ndarray
        uint8 [T], how many of the K are real.
    row_offsets : np.ndarray
        int64 [F + 1].
    num_experts : int
        E; every real id is below it.
    rows : np.ndarray, optional
        bool [T], the rows to count; all by default.
    """
    width = ids.shape[1]
    unique = np.empty(len(row_offsets) - 1, np.int64)
    if rows is None and ids.dtype == np.uint8 and count.min(initial=width) == width:
        flat = ids.reshape(-1)
        if num_experts <= 128:
            _unique_narrow(flat, width, row_offsets, unique)
        else:
            words = flat[: len(flat) // 8 * 8].view(np.uint64)
            _unique_full(words, flat, width, row_offsets, unique)
    else:
        _unique(ids, count, np.empty(0, np.bool_) if rows is None else rows, row_offsets, num_experts, unique)
    return unique


@njit
def union_sets(ids, count, row_offsets, num_experts):
    """Distinct experts of each forward, ascending: (members int64 [M], offsets int64 [F + 1])."""
    forwards = len(row_offsets) - 1
    offsets = np.zeros(forwards + 1, np.int64)
    seen = np.zeros(num_experts, np.uint8)
    members = np.empty(1024, np.int64)
    total = 0
    for f in range(forwards):
        for t in range(row_offsets[f], row_offsets[f + 1]):
            for k in range(count[t]):
                seen[ids[t, k]] = 1
        if total + num_experts > len(members):
            grown = np.empty(2 * (total + num_experts), np.int64)
            # An assignment of slices compiles, with the text of its error, for seconds.
            for i in range(total):
                grown[i] = members[i]
            members = grown
        for e in range(num_experts):
            members[total] = e
            total += seen[e]
            seen[e] = 0
        offsets[f + 1] = total
    return members[:total].copy(), offsets


@njit
def expert_loads(ids, count, row_offsets, num_experts):
    """Tokens of each expert in each forward, uint32 [F, E]."""
    forwards = len(row_offsets) - 1
    loads = np.zeros((forwards, num_experts), np.uint32)
    for f in range(forwards):
        for t in range(row_offsets[f], row_offsets[f + 1]):
            for k in range(count[t]):
                loads[f, ids[t, k]] += np.uint32(1)
    return loads
