"""Distances down the stack of an LRU cache: at which capacities an expert is still held when it is needed again.

Source: R. L. Mattson et al., "Evaluation techniques for storage hierarchies", IBM Systems Journal 9(2), 1970, carried over to
the batch rules of ``residency/lru.py``. Experts form a stack, the last touched on top. A cache of any capacity holds just the
last batch and the longest top part of the stack that fits the capacity, by induction over batches:

* A batch goes on top and is not evicted, and the oldest are evicted first, so what is held is a top part of the stack.
* An untouched expert has no less above it than before the batch. So one in the part that fits now was in the part that fitted
  then, was held, and is not evicted, as eviction stops at that part.

An expert therefore hits at every capacity if the batch before touched it, and otherwise from its distance on: its bytes and
those above it before its batch. It holds for one layer counted in experts, for all layers as one cache in bytes, and for layers
of unequal bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tracer.jit import njit

# Sizes of touches are summed in runs of this many.
RUN = 128


class Stack(NamedTuple):
    """Keys (expert, or layer * E + expert) by their last touch. S touches fit before the stack is packed again."""

    touch: np.ndarray  # int64 [keys], -1 never touched
    end: np.ndarray  # int64 [keys], where the batch of that touch ends
    last_cell: np.ndarray  # int64 [keys], the number of that batch
    key_at: np.ndarray  # int64 [S], -1 where the key has been touched since
    size_at: np.ndarray  # int64 [S], size of the key, 0 likewise
    size_of_run: np.ndarray  # int64 [S / RUN]
    now: np.ndarray  # int64 [2]: touches, batches so far


def empty_stack(keys: int) -> Stack:
    """A stack nothing has been put on."""
    # At least half of it is free after packing.
    room = -(-(2 * keys + 1) // RUN) * RUN
    return Stack(
        np.full(keys, -1, np.int64),
        np.zeros(keys, np.int64),
        np.full(keys, -2, np.int64),
        np.full(room, -1, np.int64),
        np.zeros(room, np.int64),
        np.zeros(room // RUN, np.int64),
        np.zeros(2, np.int64),
    )


@njit
def serve_stack(offsets, experts, tokens, last_touch, layer, num_experts, sizes, capacities, stack, counts):
    """Put a stream's batches on a stack; add tokens and entries to ``counts`` [L, C + 1, 2] by the first capacity that hits."""
    touch, ends, last_cell, key_at, size_at, size_of_run, now = stack
    batch = np.empty(len(touch), np.int64)
    # By the end of an earlier batch: the last batch that asked for it, and down to which of its touches sizes are summed.
    met = np.full(len(key_at) + 1, -1, np.int64)
    reached = np.zeros(len(key_at) + 1, np.int64)
    above = np.zeros(len(key_at), np.int64)
    start, shift = _starts(capacities)
    for c in range(len(offsets) - 1):
        first, stop = offsets[c], offsets[c + 1]
        at = layer[c]
        size = sizes[at]
        top, cell = now[0], now[1]
        now[1] += 1
        for i in range(first, stop):
            key = at * num_experts + experts[i]
            batch[last_touch[i]] = key
            found = len(capacities)
            if last_cell[key] == cell - 1:
                found = 0
            elif touch[key] >= 0:
                old, end = touch[key], ends[key]
                if met[end] != c:
                    met[end] = c
                    reached[end] = end - 1
                    above[end - 1] = _above(size_at, size_of_run, end, top)
                for slot in range(reached[end], old, -1):
                    above[slot - 1] = above[slot] + size_at[slot]
                reached[end] = min(reached[end], old)
                distance = above[old] + size
                found = start[min(distance >> shift, len(start) - 1)]
                while found < len(capacities) and capacities[found] < distance:
                    found += 1
            counts[at, found, 0] += tokens[i]
            counts[at, found, 1] += 1
        if top + stop - first > len(key_at):
            top = _pack(stack, top)
        for i in range(stop - first):
            key = batch[i]
            old = touch[key]
            if old >= 0:
                key_at[old] = -1
                size_at[old] = 0
                size_of_run[old // RUN] -= size
            touch[key] = top + i
            ends[key] = top + stop - first
            last_cell[key] = cell
            key_at[top + i] = key
            size_at[top + i] = size
            size_of_run[(top + i) // RUN] += size
        now[0] = top + stop - first


@njit
def _starts(capacities):
    """For every multiple of 2 ** shift the index of the first capacity that is not below; some thousands of multiples."""
    shift = 0
    while capacities[-1] >> shift >= 8192:
        shift += 1
    start = np.empty((capacities[-1] >> shift) + 2, np.int64)
    at = 0
    for i in range(len(start)):
        while at < len(capacities) and capacities[at] < i << shift:
            at += 1
        start[i] = at
    return start, shift


@njit
def _above(size_at, size_of_run, end, top):
    """Size of what was put on the stack from ``end`` on."""
    total = 0
    run = (end + RUN - 1) // RUN
    for slot in range(end, min(run * RUN, top)):
        total += size_at[slot]
    for i in range(run, (top + RUN - 1) // RUN):
        total += size_of_run[i]
    return total


@njit
def _pack(stack, top):
    """Close the gaps that keys touched again have left; how many touches remain."""
    touch, ends, _, key_at, size_at, size_of_run, _ = stack
    kept = 0
    moved = np.empty(top + 1, np.int64)
    for slot in range(top):
        moved[slot] = kept
        key, size = key_at[slot], size_at[slot]
        key_at[slot] = -1
        size_at[slot] = 0
        if key >= 0:
            touch[key] = kept
            key_at[kept] = key
            size_at[kept] = size
            kept += 1
    moved[top] = kept
    size_of_run[:] = 0
    for slot in range(kept):
        ends[key_at[slot]] = moved[ends[key_at[slot]]]
        size_of_run[slot // RUN] += size_at[slot]
    return kept
