"""Distances down the stack of an LRU cache: at which capacities an expert is still held when it is needed again.

Source: R. L. Mattson et al., "Evaluation techniques for storage hierarchies", IBM Systems Journal 9(2), 1970, carried over to
batches whose leavings fit the capacity (``caching/demand.py``, hold "budget"). Experts form a stack, the last touched on top.
A cache of any capacity holds just the top of the stack, by induction over batches: a batch goes on top, and an expert below it
has no less above it than before, so one among the top ones now was among them then and held, or is of the batch.

An expert therefore hits from its distance on: itself and those above it when the batch before has ended. What lies above an
expert is counted in bits, one a touch, set while it is its expert's last.

Example: batches {a, b}, {c}, {a}. Before the third the stack is c, b, a from the top: a is third, so it hits from capacity 3
on; at 2 the cache holds c and b.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tracer.bits import popcount
from tracer.jit import njit

# Room for this many touches an expert before the stack is packed again; two would do.
ROOM = 4


class Stack(NamedTuple):
    """Experts of a layer by their last touch; S slots, a touch each."""

    touch: np.ndarray  # int32 [E], the slot of the expert's last touch, -1 never touched
    live: np.ndarray  # uint64 [S / 64], a bit a slot: it holds the last touch of an expert
    now: np.ndarray  # int64 [2]: slots filled so far, experts touched so far


def empty_stack(num_experts: int, room: int = ROOM) -> Stack:
    """A stack nothing has been put on; ``room`` slots an expert, at least 2."""
    slots = np.zeros(-(-room * num_experts // 64), np.uint64)
    return Stack(np.full(num_experts, -1, np.int32), slots, np.zeros(2, np.int64))


@njit
def serve_stack(offsets, experts, tokens, last_touch, kinds, capacities, stack, counts):
    """Put a stream's batches on a stack.

    Tokens and entries are added to ``counts`` [kinds, C + 1, 2] by the first of the ascending ``capacities`` [C] that hits.
    """
    touch, live, now = stack
    words = len(live)
    # Experts from the start of a word on, counted as far down as a batch asks.
    above = np.zeros(words + 1, np.int64)
    first_fit = _first_fits(capacities, len(touch))
    for c in range(len(offsets) - 1):
        first, stop = offsets[c], offsets[c + 1]
        top = now[0]
        summed = (top + 63) >> 6
        above[summed] = 0
        of_kind = counts[kinds[c]]
        for i in range(first, stop):
            old = np.int64(touch[experts[i]])
            at = len(capacities)
            if old >= 0:
                word, bit = old >> 6, np.uint64(old & 63)
                while summed > word + 1:
                    summed -= 1
                    above[summed] = above[summed + 1] + np.int64(popcount(live[summed]))
                # The expert's own bit is the last that is left.
                at = first_fit[above[word + 1] + np.int64(popcount(live[word] >> bit))]
            now[1] += old < 0
            of_kind[at, 0] += tokens[i]
            of_kind[at, 1] += 1
        if top + stop - first > 64 * words:
            top = _pack(touch, live)
        for i in range(first, stop):
            old = touch[experts[i]]
            if old >= 0:
                live[old >> 6] &= ~(np.uint64(1) << np.uint64(old & 63))
            touch[experts[i]] = top + last_touch[i]
        for slot in range(top, top + stop - first):
            live[slot >> 6] |= np.uint64(1) << np.uint64(slot & 63)
        now[0] = top + stop - first


@njit
def _first_fits(capacities, num_experts):
    """Index of the first capacity that is not below each distance 0 .. E; C where none is."""
    first_fit = np.empty(num_experts + 1, np.int64)
    at = 0
    for distance in range(num_experts + 1):
        while at < len(capacities) and capacities[at] < distance:
            at += 1
        first_fit[distance] = at
    return first_fit


@njit
def _pack(touch, live):
    """Close the gaps that experts touched again have left; how many touches remain."""
    words = len(live)
    before = np.empty(words, np.int64)
    filled = live.copy()
    total = np.int64(0)
    for word in range(words):
        before[word] = total
        total += np.int64(popcount(filled[word]))
    live[:] = 0
    for e in range(len(touch)):
        if touch[e] >= 0:
            word, bit = touch[e] >> 6, np.uint64(touch[e] & 63)
            slot = before[word] + np.int64(popcount(filled[word] & ~(~np.uint64(0) << bit)))
            touch[e] = slot
            live[slot >> 6] |= np.uint64(1) << np.uint64(slot & 63)
    return total
