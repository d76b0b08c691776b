"""Distances down the stack of an LRU cache: at which capacities an expert is still held when it is needed again.

Source: R. L. Mattson et al., "Evaluation techniques for storage hierarchies", IBM Systems Journal 9(2), 1970, carried over to
the batch rules of ``residency/lru.py``. Experts form a stack, the last touched on top. A cache of any capacity holds just the
last batch and the longest top part of the stack that fits the capacity, by induction over batches:

* A batch goes on top and is not evicted, and the oldest are evicted first, so what is held is a top part of the stack.
* An untouched expert has no less above it than before the batch. So one in the part that fits now was in the part that fitted
  then, was held, and is not evicted, as eviction stops at that part.

An expert therefore hits at every capacity if the batch before touched it, and otherwise from its distance on: its bytes and
those above it before its batch. It holds for one layer counted in experts, for all layers as one cache in bytes, and for layers
of unequal bytes. What lies above an expert is counted in bits, one a touch, set while it is its expert's last.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tracer.bits import popcount
from tracer.jit import njit

# Room for this many touches a key before the stack is packed again; two would do.
ROOM = 4


class Stack(NamedTuple):
    """Keys (expert, or layer * E + expert) by their last touch; G different sizes, L layers, S slots, a touch each."""

    touch: np.ndarray  # int32 [keys], the slot of the key's last touch, -1 never touched
    live: np.ndarray  # uint64 [G, S / 64], a bit a slot: it holds the last touch of a key of that size
    size_of: np.ndarray  # int64 [G]
    group_of: np.ndarray  # int64 [L]
    now: np.ndarray  # int64 [2]: slots filled so far, and how many of them by the last batch


def empty_stack(num_experts: int, sizes: np.ndarray, room: int = ROOM) -> Stack:
    """A stack nothing has been put on.

    Parameters
    ----------
    num_experts : int
        E.
    sizes : np.ndarray
        int64 [L], of an expert of each layer in scope.
    room : int
        Slots a key, at least 2.
    """
    keys = num_experts * len(sizes)
    size_of, group_of = np.unique(sizes, return_inverse=True)
    return Stack(
        np.full(keys, -1, np.int32),
        np.zeros((len(size_of), -(-room * keys // 64)), np.uint64),
        size_of.astype(np.int64),
        group_of.astype(np.int64),
        np.zeros(2, np.int64),
    )


@njit
def serve_stack(offsets, experts, tokens, last_touch, layer, num_experts, capacities, stack, counts):
    """Put a stream's batches on a stack; add tokens and entries to ``counts`` [L, C + 1, 2] by the first capacity that hits."""
    touch, live, size_of, group_of, now = stack
    groups, words = live.shape
    # Size from the start of a word on, summed up as far down as a batch asks.
    above = np.zeros(words + 1, np.int64)
    start, shift = _starts(capacities)
    for c in range(len(offsets) - 1):
        first, stop = offsets[c], offsets[c + 1]
        at = layer[c]
        base = at * num_experts
        top, newest = now[0], now[0] - now[1]
        summed = (top + 63) >> 6
        above[summed] = 0
        for i in range(first, stop):
            old = np.int64(touch[base + experts[i]])
            found = len(capacities)
            if old >= newest:
                found = 0
            elif old >= 0:
                word, bit = old >> 6, np.uint64(old & 63)
                while summed > word + 1:
                    summed -= 1
                    size = above[summed + 1]
                    for g in range(groups):
                        size += size_of[g] * np.int64(popcount(live[g, summed]))
                    above[summed] = size
                # The key's own bit is the last that is left.
                distance = above[word + 1]
                for g in range(groups):
                    distance += size_of[g] * np.int64(popcount(live[g, word] >> bit))
                found = start[min(distance >> shift, len(start) - 1)]
                while found < len(capacities) and capacities[found] < distance:
                    found += 1
            counts[at, found, 0] += tokens[i]
            counts[at, found, 1] += 1
        if top + stop - first > 64 * words:
            top = _pack(stack, num_experts)
        own = live[group_of[at]]
        for i in range(first, stop):
            key = base + experts[i]
            old = touch[key]
            if old >= 0:
                own[old >> 6] &= ~(np.uint64(1) << np.uint64(old & 63))
            touch[key] = top + last_touch[i]
        for slot in range(top, top + stop - first):
            own[slot >> 6] |= np.uint64(1) << np.uint64(slot & 63)
        now[0], now[1] = top + stop - first, stop - first


@njit
def _starts(capacities):
    """For every multiple of 2 ** shift the index of the first capacity that is not below; some thousands of multiples."""
    shift = 0
    while capacities[-1] >> shift >= 8192:
        shift += 1
    start = np.empty((capacities[-1] >> shift) + 2, np.int32)
    at = 0
    for i in range(len(start)):
        while at < len(capacities) and capacities[at] < i << shift:
            at += 1
        start[i] = at
    return start, shift


@njit
def _pack(stack, num_experts):
    """Close the gaps that keys touched again have left; how many touches remain."""
    touch, live, _, group_of, _ = stack
    groups, words = live.shape
    before = np.empty(words, np.int64)
    filled = np.zeros(words, np.uint64)
    kept = np.int64(0)
    for word in range(words):
        for g in range(groups):
            filled[word] |= live[g, word]
        before[word] = kept
        kept += np.int64(popcount(filled[word]))
    live[:] = 0
    for key in range(len(touch)):
        if touch[key] >= 0:
            word, bit = touch[key] >> 6, np.uint64(touch[key] & 63)
            slot = before[word] + np.int64(popcount(filled[word] & ~(~np.uint64(0) << bit)))
            touch[key] = slot
            live[group_of[key // num_experts], slot >> 6] |= np.uint64(1) << np.uint64(slot & 63)
    return kept
