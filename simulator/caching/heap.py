"""Caches that evict the least used: a binary heap, least priority first, that is put right only when it is asked.

A hit leaves the heap as it is. Keys whose place in it is too late wait in a list until something must go, and a key that comes
up with a priority that has grown since sinks back.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tracer.jit import njit

# Room for 2 ** 40 lookups below a use, and for 2 ** 23 batches above them.
USE = 1 << 40
LAST = np.iinfo(np.int64).max


class Ranked(NamedTuple):
    """Keys (expert, or layer * E + expert) of C caches, all of a cache's in its heap or in its list of those that wait."""

    priority: np.ndarray  # int64 [keys]
    uses: np.ndarray  # int64 [keys], batches that needed the key so far
    inside: np.ndarray  # bool [keys]
    queued: np.ndarray  # bool [keys], in the heap
    heap_priority: np.ndarray  # int64 [keys], one cache's heap after the other's; as it was when the key was put in
    heap_key: np.ndarray  # int64 [keys]
    waits: np.ndarray  # bool [keys], in the list
    waiting: np.ndarray  # int64 [keys], one cache's list after the other's
    held: np.ndarray  # int64 [C, 4]: size held, experts held, length of the heap, length of the list


def empty(caches: int, keys: int) -> Ranked:
    """Caches that share out the keys equally and hold nothing yet."""
    # Few arrays cut up: small caches are many, one a layer and budget.
    priority, uses, heap_priority, heap_key, waiting = np.zeros((5, keys), np.int64)
    inside, queued, waits = np.zeros((3, keys), bool)
    held = np.zeros((caches, 4), np.int64)
    return Ranked(priority, uses, inside, queued, heap_priority, heap_key, waits, waiting, held)


@njit
def _rise(priorities, keys, base, end, priority, key):
    """Put a key in at the end of the heap that begins at ``base``."""
    # Unsigned indices spare the test for negative ones, here and below.
    at = np.uint64(end)
    while at > 0:
        above = (at - np.uint64(1)) >> np.uint64(1)
        if priorities[base + above] <= priority:
            break
        priorities[base + at] = priorities[base + above]
        keys[base + at] = keys[base + above]
        at = above
    priorities[base + at] = priority
    keys[base + at] = key


@njit
def _sink(priorities, keys, base, size, priority, key):
    """Put a key in at the top of a heap of ``size`` keys that begins at ``base``, or below."""
    at, child, end = np.uint64(0), np.uint64(1), np.uint64(size)
    while child < end:
        right = min(child + np.uint64(1), end - np.uint64(1))
        child = right if priorities[base + right] < priorities[base + child] else child
        if priorities[base + child] >= priority:
            break
        priorities[base + at] = priorities[base + child]
        keys[base + at] = keys[base + child]
        at = child
        child = at + at + np.uint64(1)
    priorities[base + at] = priority
    keys[base + at] = key


@njit
def _evict_others(cache, base, heaped, listed, forget, last_batch, batch):
    """Evict all keys but the batch of the cache whose heap and list begin at ``base``."""
    for j in range(np.uint64(heaped + listed)):
        key = cache.heap_key[base + j] if j < heaped else cache.waiting[base + j - np.uint64(heaped)]
        cache.queued[key] = False
        cache.waits[key] = False
        if last_batch[key] != batch:
            cache.inside[key] = False
            if forget:
                cache.uses[key] = 0


@njit
def serve(
    offsets,
    experts,
    cell_layer,
    sizes,
    whole,
    last_touch,
    forget,
    lookups,
    capacity,
    cache,
    hit,
    promoted,
    demoted,
    peak,
):
    """Serve batches on demand: fetch the missing, evict after the batch by least priority, none of a batch that stays whole.

    A key's priority is its uses, then its last touch; no touch makes it smaller while it is held. ``lookups`` is the number of
    those before the stream; ``forget``: an evicted key's uses start anew. Arrays are taken out of the cache, counters kept
    apart and no array is cut up on the way, as that costs more than an eviction.
    """
    priority, uses, inside, queued, heap_priority, heap_key, waits, waiting, held = cache
    share = len(inside) // len(held)
    num_experts = np.uint64(len(inside) // len(sizes))
    last_batch = np.full(len(inside), -1, np.int64)
    for c in range(len(offsets) - 1):
        start, stop = offsets[c], offsets[c + 1]
        layer = cell_layer[c] if len(sizes) > 1 else 0
        own = layer if len(held) > 1 else 0
        base = np.uint64(own * share)
        size_held, keys_held, heaped, listed = held[own, 0], held[own, 1], held[own, 2], held[own, 3]
        room, first, size = capacity[own], np.uint64(layer) * num_experts, sizes[layer]
        missed = 0
        for i in range(np.uint64(start), np.uint64(stop)):
            key = first + np.uint64(experts[i])
            hit[i] = inside[key]
            missed += not inside[key]
            inside[key] = True
            uses[key] += 1
            priority[key] = uses[key] * USE + lookups + start + np.int64(last_touch[i])
            last_batch[key] = c
        size_held += missed * size
        keys_held += missed
        promoted[c] = missed
        peak[0, c], peak[1, c] = keys_held, size_held
        # The batch that is not evicted; there is none of the last number.
        spared, crowded = c if whole else len(offsets), size_held > room
        if whole and size_held > room and size * (stop - start) > room:
            _evict_others(cache, base, heaped, listed, forget, last_batch, c)
            size_held, keys_held, heaped, listed = size * (stop - start), stop - start, 0, 0
        elif size_held > room:
            for j in range(np.uint64(listed)):
                key = np.uint64(waiting[base + j])
                waits[key] = False
                # The batch's own keys wait again after it.
                if last_batch[key] != spared:
                    _rise(heap_priority, heap_key, base, heaped, priority[key], waiting[base + j])
                    queued[key] = True
                    heaped += 1
            listed = 0
            if not whole:
                while heaped > 0 and priority[heap_key[base]] > heap_priority[base]:
                    _sink(heap_priority, heap_key, base, heaped, priority[heap_key[base]], heap_key[base])
                least = heap_priority[base] if heaped > 0 else LAST
                low = 0
                for i in range(np.uint64(start), np.uint64(stop)):
                    low += not hit[i] and priority[first + np.uint64(experts[i])] < least
                # Missing keys below all that were held go first: where all of them must, in no order and without the heap.
                if low * size > size_held - room:
                    low, least = 0, 0
                for i in range(np.uint64(start), np.uint64(stop)):
                    key = first + np.uint64(experts[i])
                    if hit[i]:
                        continue
                    if priority[key] < least:
                        inside[key] = False
                        uses[key] = 0 if forget else uses[key]
                    else:
                        _rise(heap_priority, heap_key, base, heaped, priority[key], np.int64(key))
                        queued[key] = True
                        heaped += 1
                size_held -= low * size
                keys_held -= low
            while size_held > room and heaped > 0:
                entry, key = heap_priority[base], np.uint64(heap_key[base])
                if last_batch[key] != spared and priority[key] > entry:
                    _sink(heap_priority, heap_key, base, heaped, priority[key], heap_key[base])
                    continue
                if last_batch[key] != spared:
                    inside[key] = False
                    uses[key] = 0 if forget else uses[key]
                    size_held -= sizes[key // num_experts] if len(sizes) > 1 else size
                    keys_held -= 1
                queued[key] = False
                heaped -= 1
                if heaped > 0:
                    last = base + np.uint64(heaped)
                    _sink(heap_priority, heap_key, base, heaped, heap_priority[last], heap_key[last])
        demoted[c] = peak[0, c] - keys_held
        if whole or not crowded:
            for i in range(np.uint64(start), np.uint64(stop)):
                key = first + np.uint64(experts[i])
                if not waits[key] and not queued[key]:
                    waits[key] = True
                    waiting[base + np.uint64(listed)] = np.int64(key)
                    listed += 1
        if not whole:
            peak[0, c], peak[1, c] = max(held[own, 1], keys_held), max(held[own, 0], size_held)
        held[own, 0], held[own, 1], held[own, 2], held[own, 3] = size_held, keys_held, heaped, listed
