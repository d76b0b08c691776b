"""Caches that evict by a priority of their own: a binary heap, least priority first, that is put right only when it is asked.

A hit leaves the heap as it is. Keys whose place in it is too late wait in a list until something must go, and a key that comes
up with a priority that has grown since sinks back.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tracer.jit import njit


class Ranked(NamedTuple):
    """Keys (expert, or layer * E + expert) of C caches, all of a cache's in its heap or in its list of those that wait."""

    priority: np.ndarray  # int64 [keys]
    uses: np.ndarray  # int64 [keys], batches that needed the key so far
    inside: np.ndarray  # bool [keys]
    queued: np.ndarray  # bool [keys], in the heap with no more than its priority
    heap_priority: np.ndarray  # int64 [C, 4 * keys of a cache], as it was when the key was put in
    heap_key: np.ndarray  # int64 [C, 4 * keys of a cache]
    waits: np.ndarray  # bool [keys], in the list
    waiting: np.ndarray  # int64 [C, keys of a cache]
    held: np.ndarray  # int64 [C, 4]: size held, experts held, length of the heap, length of the list


class Rule(NamedTuple):
    """A touched key's priority: the sum of its uses, the number of the batch's first lookup, ``rank[entry]`` and itself, each
    times the number here. Keys of equal priority may not be; if ``grows``, no touch makes a priority smaller.
    """

    of_use: int
    of_lookup: int
    of_rank: int
    of_key: int
    grows: bool
    forget: bool  # whether an evicted key's uses start anew


def empty(caches: int, keys: int) -> Ranked:
    """Caches that share out the keys equally and hold nothing yet."""
    # Few arrays cut up: small caches are many, one a layer and budget.
    priority, uses, waiting = np.zeros((3, keys), np.int64)
    inside, queued, waits = np.zeros((3, keys), bool)
    heap_priority, heap_key = np.zeros((2, caches, 4 * keys // caches), np.int64)
    waiting = waiting.reshape(caches, -1)
    held = np.zeros((caches, 4), np.int64)
    return Ranked(priority, uses, inside, queued, heap_priority, heap_key, waits, waiting, held)


@njit
def _rise(priorities, keys, end, priority, key):
    """Put a key in at the end of the heap."""
    # Unsigned indices spare the test for negative ones, here and below.
    at = np.uint64(end)
    while at > 0:
        above = (at - np.uint64(1)) >> np.uint64(1)
        if priorities[above] <= priority:
            break
        priorities[at] = priorities[above]
        keys[at] = keys[above]
        at = above
    priorities[at] = priority
    keys[at] = key


@njit
def _sink(priorities, keys, size, start, priority, key):
    """Put a key in at ``start`` or below, in a heap of ``size`` keys."""
    at, child, end = np.uint64(start), np.uint64(2 * start + 1), np.uint64(size)
    while child < end:
        right = min(child + np.uint64(1), end - np.uint64(1))
        child = right if priorities[right] < priorities[child] else child
        if priorities[child] >= priority:
            break
        priorities[at] = priorities[child]
        keys[at] = keys[child]
        at = child
        child = at + at + np.uint64(1)
    priorities[at] = priority
    keys[at] = key


@njit
def _pack(cache, priorities, keys, heaped):
    """Leave in a heap what counts: of each key inside the entry of its latest touch; the heap's new length."""
    for j in range(heaped):
        cache.queued[keys[j]] = False
    # Literals would have what is called compiled for each of them, here and below.
    kept = np.int64(0)
    for j in range(heaped):
        key, priority = keys[j], priorities[j]
        if cache.inside[key] and not cache.queued[key] and priority == cache.priority[key]:
            cache.queued[key] = True
            keys[kept] = key
            priorities[kept] = priority
            kept += 1
    for j in range(kept // 2 - 1, -1, -1):
        _sink(priorities, keys, kept, j, priorities[j], keys[j])
    return kept


@njit
def _evict_others(cache, keys, waiting, heaped, listed, forget, last_batch, batch):
    """Evict all of a cache's keys but the batch."""
    for j in range(heaped + listed):
        key = keys[j] if j < heaped else waiting[j - heaped]
        cache.queued[key] = False
        cache.waits[key] = False
        if last_batch[key] != batch:
            cache.inside[key] = False
            if forget:
                cache.uses[key] = 0


@njit
def serve(offsets, experts, cell_layer, sizes, rank, rule, lookups, capacity, cache, hit, promoted, demoted, peak):
    """Serve batches on demand: load the missing, evict after the batch by least priority, never what the batch touched.

    ``lookups`` is the number of those before the stream. Arrays are taken out of the cache and counters kept apart, as a call
    that passes the whole cache on costs more than an eviction.
    """
    priority, uses, inside, queued, heap_priorities, heap_keys, waits, every_waiting, every_held = cache
    num_experts = np.uint64(len(inside) // len(sizes))
    last_batch = np.full(len(inside), -1, np.int64)
    for c in range(len(offsets) - 1):
        start, stop = offsets[c], offsets[c + 1]
        layer = cell_layer[c] if len(sizes) > 1 else 0
        own = layer if len(every_held) > 1 else 0
        heap_priority, heap_key = heap_priorities[own], heap_keys[own]
        waiting, held = every_waiting[own], every_held[own]
        size_held, keys_held, heaped, listed = held
        room, first, size = capacity[own], np.uint64(layer) * num_experts, sizes[layer]
        missed = 0
        for i in range(np.uint64(start), np.uint64(stop)):
            key = first + np.uint64(experts[i])
            hit[i] = inside[key]
            missed += not inside[key]
            inside[key] = True
            uses[key] += 1
            of_touch = uses[key] * rule.of_use + np.int64(rank[i]) * rule.of_rank
            priority[key] = of_touch + (lookups + start) * rule.of_lookup + np.int64(key) * rule.of_key
            last_batch[key] = c
        size_held += missed * size
        keys_held += missed
        promoted[c] = missed
        peak[0, c], peak[1, c] = keys_held, size_held
        if size_held > room and size * (stop - start) > room:
            _evict_others(cache, heap_key, waiting, heaped, listed, rule.forget, last_batch, c)
            size_held, keys_held, heaped, listed = size * (stop - start), stop - start, 0, 0
        elif size_held > room:
            # Only where priorities fall are there ever more entries than keys.
            if heaped + listed > len(heap_key):
                heaped = _pack(cache, heap_priority, heap_key, heaped)
            for j in range(listed):
                key = np.uint64(waiting[j])
                waits[key] = False
                # The batch's own keys wait again after it.
                if last_batch[key] != c:
                    _rise(heap_priority, heap_key, heaped, priority[key], waiting[j])
                    queued[key] = True
                    heaped += 1
            listed = 0
            while size_held > room and heaped > 0:
                entry, key = heap_priority[0], np.uint64(heap_key[0])
                if inside[key] and last_batch[key] != c and priority[key] > entry:
                    _sink(heap_priority, heap_key, heaped, np.int64(0), priority[key], heap_key[0])
                    continue
                if inside[key] and last_batch[key] != c and priority[key] == entry:
                    inside[key] = False
                    uses[key] = 0 if rule.forget else uses[key]
                    size_held -= sizes[key // num_experts] if len(sizes) > 1 else size
                    keys_held -= 1
                queued[key] = False
                heaped -= 1
                if heaped > 0:
                    _sink(heap_priority, heap_key, heaped, np.int64(0), heap_priority[heaped], heap_key[heaped])
        demoted[c] = peak[0, c] - keys_held
        for i in range(np.uint64(start), np.uint64(stop)):
            key = first + np.uint64(experts[i])
            if not waits[key] and not (rule.grows and queued[key]):
                waits[key] = True
                waiting[listed] = np.int64(key)
                listed += 1
        held[0], held[1], held[2], held[3] = size_held, keys_held, heaped, listed
