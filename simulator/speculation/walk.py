"""TEAM's decoding walked over the states of a vanilla run: first forward, speculative forwards of four branches, row states.

Source: arXiv 2602.08404 and its released loop (github PKU-SEC-Lab/TEAM-MoE-dLLM @e9c502e). Sets are uint8 arrays over the B
positions of a block. Ties go to the lowest position. A state with known set Q sees what the latest vanilla step of its block
saw whose known set is a subset of Q. ``known`` and the rest are the arrays of
:class:`simulator.speculation.blocks.BlockTable`, bools as uint8, ``here`` [C, B] the positions a block has.
"""

from __future__ import annotations

import numpy as np

from tracer.jit import njit

BRANCHES = 4


@njit
def put(target, source):
    """Make one set equal another. Numba's own assignment of arrays takes seconds to compile, for its error messages."""
    for j in range(len(target)):
        target[j] = source[j]


@njit
def join(target, source):
    """Unite a set with another."""
    for j in range(len(target)):
        target[j] |= source[j]


@njit
def accept(known, confidence, threshold, quota, accepted):
    """The accept rule: masked positions above ``threshold`` if there are ``quota`` of them, else the ``quota`` most confident.

    Masked is what is not ``known``. Writes ``accepted`` uint8 [B] and returns how many.
    """
    total = 0
    for j in range(len(known)):
        accepted[j] = not known[j] and confidence[j] > threshold
        total += accepted[j]
    if total >= quota:
        return total
    for j in range(len(known)):
        accepted[j] = 0
    total = 0
    while total < quota:
        best = -1
        for j in range(len(known)):
            if not known[j] and not accepted[j] and (best < 0 or confidence[j] > confidence[best]):
                best = j
        if best < 0:
            break
        accepted[best] = 1
        total += 1
    return total


@njit
def two_surest(known, confidence):
    """The two masked positions of largest confidence, (-1 where there is none)."""
    a, b = -1, -1
    for j in range(len(known)):
        if known[j]:
            continue
        if a < 0 or confidence[j] > confidence[a]:
            a, b = j, a
        elif b < 0 or confidence[j] > confidence[b]:
            b = j
    return a, b


@njit
def mark_cold(known, here, confidence, a, b, hot_probability, hot_distance, distance, cold):
    """Rows far from everything known and unsure: ``distance >= hot_distance``, probability below ``hot_probability``.

    ``a`` and ``b`` are exempt; nothing is far where nothing is known. ``distance`` int64 [B] is working memory.
    """
    width = len(known)
    last = -width - 1
    for j in range(width):
        if known[j] and here[j]:
            last = j
        distance[j] = j - last
    last = 2 * width + 1
    for j in range(width - 1, -1, -1):
        if known[j] and here[j]:
            last = j
        distance[j] = min(distance[j], last - j)
        far = hot_distance <= distance[j] <= width
        cold[j] = here[j] and far and j != a and j != b and confidence[j] < hot_probability


@njit
def contains(state, needed):
    """Whether ``needed`` is a subset of ``state``."""
    missing = 0
    for j in range(len(state)):
        missing |= needed[j] & ~state[j]
    return missing == 0


@njit
def latest_step(known, first, last, state):
    """The latest of steps ``first..last - 1`` whose known set is a subset of ``state``."""
    for s in range(last - 1, first, -1):
        if contains(state, known[s]):
            return s
    return first


@njit
def row_states(offsets, known, here, accepted, confidence, hot_probability, hot_distance, reused, cold):
    """Which positions of the recorded forwards TEAM would reuse or call cold, without speculation: uint8 [S, B] each.

    A block's first step computes everything. Later, what was known and not just accepted is reused; masked positions are
    cold by their probability in the step before and their distance to what is known now.
    """
    distance = np.empty(known.shape[1], np.int64)
    for c in range(len(offsets) - 1):
        for s in range(offsets[c] + 1, offsets[c + 1]):
            a, b = two_surest(known[s], confidence[s - 1])
            mark_cold(known[s], here[c], confidence[s - 1], a, b, hot_probability, hot_distance, distance, cold[s])
            for j in range(known.shape[1]):
                reused[s, j] = known[s, j] and not accepted[s - 1, j]


@njit
def walk(
    offsets, known, here, final, predicted, confidence, threshold, quotas, hot_probability, hot_distance, limit,
    block, step, state, fresh, cold, gained, chosen,
):  # fmt: skip
    """Simulate every block; return how many forwards happen.

    ``quotas`` int64 [steps] are the tokens a block's forwards accept at least, the last one for all from there on.
    Of forward i are written: its ``block``; the vanilla ``step`` [N, 4] each branch sees; the known set of branch r as
    ``state`` [N, 4, B]; ``fresh`` [N, B], accepted by the forward before; ``cold`` [N, B]; the tokens ``gained``; the
    ``chosen`` branch, -1 in a block's first forward. A block ends when all is known that vanilla knew in the end.
    """
    width = known.shape[1]
    current, just = np.empty(width, np.uint8), np.empty(width, np.uint8)
    taken = np.empty((BRANCHES, width), np.uint8)
    distance = np.empty(width, np.int64)
    count = np.empty(BRANCHES, np.int64)
    i = 0
    for c in range(len(offsets) - 1):
        first, last = offsets[c], offsets[c + 1]
        seen = first
        put(current, known[first])
        block[i] = c
        for r in range(BRANCHES):
            step[i, r] = first
            put(state[i, r], current)
        chosen[i] = -1
        gained[i] = accept(current, confidence[first], threshold, quotas[0], just)
        begin = i
        join(current, just)
        i += 1
        while not contains(current, final[c]):
            a, b = two_surest(current, confidence[seen])
            quota = quotas[min(i - begin, len(quotas) - 1)]
            block[i] = c
            for r in range(BRANCHES):
                own = state[i, r]
                put(own, current)
                if r & 1:
                    own[a] = 1
                if r & 2 and b >= 0:
                    own[b] = 1
                step[i, r] = latest_step(known, first, last, own)
                count[r] = accept(own, confidence[step[i, r]], threshold, quota, taken[r])
            put(fresh[i], just)
            if limit:
                mark_cold(
                    state[i, 3], here[c], confidence[seen], a, b, hot_probability, hot_distance, distance, cold[i]
                )
            x0 = predicted[seen]
            s0, s1, s2 = step[i, 0], step[i, 1], step[i, 2]
            first_right = taken[0, a] == 1 and predicted[s0, a] == x0[a]
            second_right, second_after, first_after = False, False, False
            if b >= 0:
                second_right = taken[0, b] == 1 and predicted[s0, b] == x0[b]
                second_after = taken[1, b] == 1 and predicted[s1, b] == x0[b]
                first_after = second_right and taken[2, a] == 1 and predicted[s2, a] == x0[a]
            r = 0
            extra = 0
            if (first_right and (second_right or second_after)) or (second_right and first_after):
                r, extra = 3, 2
            elif first_right:
                r, extra = 1, 1
            elif second_right:
                r, extra = 2, 1
            chosen[i] = r
            gained[i] = extra + count[r]
            seen = step[i, r]
            put(current, state[i, r])
            put(just, taken[r])
            join(current, just)
            i += 1
    return i


@njit
def fewest_forwards(offsets, known, final, accepted, predicted, confidence):
    """Denoise forwards of each block, int64 [C], were speculation as lucky as vanilla's own states allow.

    From each vanilla state the two surest positions join whenever the step before predicted their final vanilla token and
    vanilla accepts them at this step or the next; the forward then accepts what vanilla accepts in the state they lead to, and
    any vanilla state up to there may come next. The fewest forwards from the first state to the last.
    """
    width = known.shape[1]
    fewest = np.empty(len(offsets) - 1, np.int64)
    token, when = np.empty(width, np.int64), np.empty(width, np.int64)
    state = np.empty(width, np.uint8)
    for c in range(len(offsets) - 1):
        first, last = offsets[c], offsets[c + 1]
        for j in range(width):
            token[j], when[j] = -1, last + 1
            for s in range(last - 1, first - 1, -1):
                if accepted[s, j]:
                    token[j], when[j] = predicted[s, j], s
        total = 1
        reach, end = first + 1, first + 1
        s = first + 1
        while end < last:
            while s <= end:
                put(state, known[s])
                a, b = two_surest(known[s], confidence[s - 1])
                for j in (a, b):
                    if j >= 0 and predicted[s - 1, j] == token[j] and when[j] <= s + 1:
                        state[j] = 1
                join(state, accepted[latest_step(known, first, last, state)])
                goal = last if contains(state, final[c]) else latest_step(known, first, last, state)
                reach = max(reach, goal, s + 1)
                s += 1
            total += 1
            end = reach
        fewest[c] = total
    return fewest
