"""Caches that evict what is needed again last: a bit for every lookup of a stream, set while its key is held and waits for it.

A cache counts its lookups from the stream's end: place 0 is the last one's. Below them come the keys' next needs after the
stream, so the key to evict is that of the lowest bit. A bit needs no clearing when its lookup comes: it is above all that count
from then on. Three levels of bits, a word of one of them a bit of the next, find the lowest.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tracer.bits import lowest_bit
from tracer.jit import njit

NEVER = np.iinfo(np.uint32).max


class Resident(NamedTuple):
    """What C caches hold; keys (expert, or layer * E + expert) are shared out equally between them."""

    inside: np.ndarray  # bool [keys]
    held: np.ndarray  # int64 [C, 2]: size held, experts held


class Queues(NamedTuple):
    """A queue a cache over a stream of D lookups: keys by place, one cache's places after the other's."""

    first: np.ndarray  # int64 [C + 1], of a cache's places
    words: np.ndarray  # int64 [3, C], its first word of each level
    lowest: np.ndarray  # int64 [C], no word of the third level before this one has a bit
    key_of: np.ndarray  # uint32 [D + keys]
    bits: tuple[np.ndarray, np.ndarray, np.ndarray]  # uint64, the levels


def empty(caches: int, keys: int) -> Resident:
    """Caches that hold nothing yet."""
    return Resident(np.zeros(keys, bool), np.zeros((caches, 2), np.int64))


def queues(lookups: np.ndarray, keys: int) -> Queues:
    """Empty queues for as many lookups of each cache, int64 [C], and its share of the keys."""
    caches = len(lookups)
    places = lookups + keys // caches
    words = np.empty((3, caches), np.int64)
    # One more, as the end of the places is looked at too.
    sizes, bits = places + 1, []
    for level in range(3):
        sizes = (sizes + 63) >> 6
        ends = np.cumsum(sizes)
        words[level] = ends - sizes
        bits.append(np.zeros(int(ends[-1]), np.uint64))
    first = np.concatenate(([0], np.cumsum(places)))
    return Queues(first, words, sizes, np.empty(int(first[-1]), np.uint32), (bits[0], bits[1], bits[2]))


@njit
def note_first(offsets, experts, cell_layer, several, cells, first):
    """The first cell of a stream that needs each key, counted from ``cells``; ``several`` is E where a key names its layer."""
    for back in range(len(offsets) - 1):
        c = len(offsets) - 2 - back
        base = np.uint64(cell_layer[c] * several)
        for i in range(offsets[c], offsets[c + 1]):
            first[base + np.uint64(experts[i])] = cells + c


@njit
def note_places(offsets, experts, cell_layer, sizes, whole, caches, place_of, places, after):
    """For every lookup [D] the place of its key's next one; ``place_of`` is that after the stream [keys], then before it.

    Of a cell's places the lowest is that of its lowest key where batches stay ``whole``, else of its highest. ``after`` [cells]
    takes how many lookups come after the cell in its cache. Gives how many there are in each, int64 [C].
    """
    num_experts = len(place_of) // len(sizes)
    so_far = np.zeros(caches, np.int64)
    share = len(place_of) // caches
    seen = np.zeros((num_experts + 63) >> 6, np.uint64)
    for back in range(len(offsets) - 1):
        c = len(offsets) - 2 - back
        layer = cell_layer[c] if len(sizes) > 1 else 0
        own = layer if caches > 1 else 0
        first = np.uint64(layer * num_experts)
        after[c] = so_far[own]
        for i in range(np.uint64(offsets[c]), np.uint64(offsets[c + 1])):
            e = np.uint64(experts[i])
            places[i] = place_of[first + e]
            seen[e >> np.uint64(6)] |= np.uint64(1) << (e & np.uint64(63))
        number = offsets[c + 1] - offsets[c]
        step = 1 if whole else -1
        place = share + so_far[own] + (0 if whole else number - 1)
        for w in range(np.uint64(len(seen))):
            left = seen[w]
            while left != 0:
                place_of[first + (w << np.uint64(6)) + lowest_bit(left)] = place
                place += step
                left &= left - np.uint64(1)
            seen[w] = 0
        so_far[own] += number
    return so_far


@njit
def _put(first, words, own, lowest, key_of, low, middle, high, place, key):
    """Let a key wait for a place of a cache."""
    six, last, one = np.uint64(6), np.uint64(63), np.uint64(1)
    key_of[first + place] = key
    word = place >> six
    above = word >> six
    top = above >> six
    low[np.uint64(words[0, own]) + word] |= one << (place & last)
    middle[np.uint64(words[1, own]) + above] |= one << (word & last)
    high[np.uint64(words[2, own]) + top] |= one << (above & last)
    return min(lowest, np.int64(top))


@njit
def _put_batch(c, offsets, experts, first, places, queue, own, lowest):
    """Let a batch's keys wait for their next places."""
    firsts, words, _, key_of, (low, middle, high) = queue
    first_place = np.uint64(firsts[own])
    for i in range(np.uint64(offsets[c]), np.uint64(offsets[c + 1])):
        key = first + np.uint64(experts[i])
        lowest = _put(first_place, words, own, lowest, key_of, low, middle, high, np.uint64(places[i]), key)
    return lowest


@njit
def _wait_again(cache, queue, place_of):
    """Let what is held when a stream begins wait for its first lookup."""
    inside, held = cache
    firsts, words, lowest, key_of, (low, middle, high) = queue
    share = len(inside) // len(held)
    for key in range(len(inside)):
        if inside[key]:
            own = key // share
            first, place = np.uint64(firsts[own]), np.uint64(place_of[key])
            lowest[own] = _put(first, words, own, lowest[own], key_of, low, middle, high, place, np.uint64(key))


@njit
def serve(
    offsets,
    experts,
    cell_layer,
    sizes,
    whole,
    places,
    after,
    place_of,
    queue,
    capacity,
    cache,
    hit,
    promoted,
    demoted,
    peak,
):
    """Serve batches on demand: fetch the missing, evict after the batch from the lowest place on, none of one that stays whole.

    ``places`` and ``after`` are :func:`note_places`'s, and ``place_of`` what it left.
    """
    inside, held = cache
    firsts, words, lowest, key_of, (low, middle, high) = queue
    six, one = np.uint64(6), np.uint64(1)
    num_experts = np.uint64(len(inside) // len(sizes))
    share = len(inside) // len(held)
    _wait_again(cache, queue, place_of)
    for c in range(len(offsets) - 1):
        start, stop = np.uint64(offsets[c]), np.uint64(offsets[c + 1])
        layer = cell_layer[c] if len(sizes) > 1 else 0
        own = layer if len(held) > 1 else 0
        first_place, high_from = np.uint64(firsts[own]), words[2, own]
        low_from, middle_from = np.uint64(words[0, own]), np.uint64(words[1, own])
        first, size = np.uint64(layer) * num_experts, sizes[layer]
        missed = 0
        for i in range(start, stop):
            key = first + np.uint64(experts[i])
            hit[i] = inside[key]
            missed += not inside[key]
            inside[key] = True
        size_held = held[own, 0] + missed * size
        promoted[c] = missed
        number = held[own, 1] + missed
        peak[0, c], peak[1, c] = number, size_held
        # From here on places are the batch's own, or past.
        end = np.uint64(share + after[c])
        top, gone = lowest[own], 0
        if not whole:
            top = _put_batch(c, offsets, experts, first, places, queue, own, top)
        end_top = np.int64(end >> np.uint64(18))
        while size_held > capacity[own]:
            while top <= end_top and high[high_from + top] == 0:
                top += 1
            if top > end_top:
                break
            above = (np.uint64(top) << six) + lowest_bit(high[high_from + top])
            word = (above << six) + lowest_bit(middle[middle_from + above])
            left = low[low_from + word]
            place = (word << six) + lowest_bit(left)
            if place >= end:
                break
            left &= left - one
            low[low_from + word] = left
            if left == 0:
                left = middle[middle_from + above]
                left &= left - one
                middle[middle_from + above] = left
                if left == 0:
                    high[high_from + top] &= high[high_from + top] - one
            key = np.uint64(key_of[first_place + place])
            inside[key] = False
            size_held -= sizes[key // num_experts] if len(sizes) > 1 else size
            gone += 1
        demoted[c] = gone
        if whole:
            top = _put_batch(c, offsets, experts, first, places, queue, own, top)
        else:
            peak[0, c], peak[1, c] = max(held[own, 1], number - gone), max(held[own, 0], size_held)
        held[own, 0], held[own, 1], lowest[own] = size_held, number - gone, top
