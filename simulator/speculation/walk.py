"""TEAM's decoding walked over recorded states: its forwards, what their branches know and accept, and which branch holds.

Source: arXiv 2602.08404 and its released loop (github PKU-SEC-Lab/TEAM-MoE-dLLM @e9c502e). On a vanilla run a state with known
set Q sees what the latest step of its block saw whose known set is a subset of Q. Sets are uint8 arrays over a block's B
positions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tracer.decoding.accepting import AcceptRule, accept
from tracer.decoding.blocks import BlockTable
from tracer.decoding.team_rules import (
    BRANCHES,
    GUESSES,
    TeamRules,
    chosen_branch,
    fill_in,
    gained,
    join,
    mark_cold,
    put,
    surest,
)
from tracer.jit import njit


class Walk(NamedTuple):
    """N denoise forwards, block after block, as the rules have them. R branches."""

    block: np.ndarray  # int64 [N]
    step: np.ndarray  # int64 [N, R], the step of the table each branch sees
    state: np.ndarray  # uint8 [N, R, B], what each branch knows
    accepted: np.ndarray  # uint8 [N, R, B]
    cold: np.ndarray  # uint8 [N, B]
    gained: np.ndarray  # int64 [N], tokens
    chosen: np.ndarray  # int64 [N], -1 in a block's first forward


def walked(table: BlockTable, rule: AcceptRule, rules: TeamRules, kept: np.ndarray | None = None) -> Walk:
    """Walk over every block.

    Parameters
    ----------
    table : BlockTable
    rule : AcceptRule
    rules : TeamRules
    kept : int64 [S], optional
        The branch each recorded forward went on with: its forwards are walked as they were recorded, each from what the one
        before left. None simulates TEAM on a vanilla run.
    """
    blocks, width = len(table.commit), table.known.shape[2]
    room, branches = len(table.forward), table.known.shape[1]
    if kept is None:
        room, branches = int((table.known[table.offsets[:-1], 0] == 0).sum()) + 2 * blocks, BRANCHES
    forwards = Walk(
        block=np.empty(room, np.int64),
        step=np.empty((room, branches), np.int64),
        state=np.empty((room, branches, width), np.uint8),
        accepted=np.empty((room, branches, width), np.uint8),
        cold=np.zeros((room, width), np.uint8),
        gained=np.empty(room, np.int64),
        chosen=np.empty(room, np.int64),
    )
    total = _walk(table, rule, rules.hot, np.empty(0, np.int64) if kept is None else kept, kept is not None, forwards)
    return Walk(*(array[:total] for array in forwards))


@njit
def _contains(state, needed):
    """Whether ``needed`` is a subset of ``state``."""
    missing = 0
    for j in range(len(state)):
        missing |= needed[j] & ~state[j]
    return missing == 0


@njit
def _latest_step(known, first, last, state):
    """The latest of steps ``first..last - 1`` whose known set is a subset of ``state``."""
    for s in range(last - 1, first, -1):
        if _contains(state, known[s, 0]):
            return s
    return first


@njit
def _walk(table, rule, hot, kept, recorded, forwards):
    """Write ``forwards``; return how many happen. A simulated block ends when all is known that was known in the end."""
    branches, width = forwards.state.shape[1], forwards.state.shape[2]
    current, token = np.empty(width, np.uint8), np.empty((branches, width), np.int32)
    guesses = np.empty(GUESSES, np.int64)
    i = 0
    for c in range(len(table.commit)):
        first, last = table.offsets[c], table.offsets[c + 1]
        begin, seen, branch = i, first, 0
        put(current, table.known[first, 0])
        guesses[:] = -1
        while i < last if recorded else i == begin or not _contains(current, table.final[c]):
            sure = table.confidence[seen, branch]
            if i > begin:
                surest(current, sure, guesses)
            fill_in(current, guesses, forwards.state[i])
            for r in range(branches):
                s = i if recorded else first
                if i > begin and not recorded:
                    s = _latest_step(table.known, first, last, forwards.state[i, r])
                of = r if recorded else 0
                accept(rule, i - begin, forwards.state[i, r], table.confidence[s, of], forwards.accepted[i, r])
                put(token[r], table.predicted[s, of])
                forwards.step[i, r] = s
            if i > begin:
                mark_cold(forwards.state[i, -1], table.here[c], sure, guesses, hot, forwards.cold[i])
            chosen = chosen_branch(guesses, table.predicted[seen, branch], token, forwards.accepted[i])
            forwards.block[i] = c
            forwards.chosen[i] = chosen if i > begin else -1
            forwards.gained[i] = gained(current, forwards.state[i, chosen], forwards.accepted[i, chosen])
            if recorded:
                seen, branch = i, kept[i]
                put(current, table.known[min(i + 1, last - 1), 0])
            else:
                seen = forwards.step[i, chosen]
                put(current, forwards.state[i, chosen])
                join(current, forwards.accepted[i, chosen])
            i += 1
    return i


@njit
def fewest_forwards(table):
    """Denoise forwards of each block, int64 [C], were speculation as lucky as vanilla's own states allow.

    From each vanilla state the surest positions join whenever the step before predicted their final vanilla token and vanilla
    accepts them at this step or the next; the forward then accepts what vanilla accepts in the state they lead to, and any
    vanilla state up to there may come next. The fewest forwards from the first state to the last.
    """
    known, accepted, predicted = table.known, table.accepted, table.predicted
    width = known.shape[2]
    fewest = np.empty(len(table.commit), np.int64)
    token, when = np.empty(width, np.int64), np.empty(width, np.int64)
    state, guesses = np.empty(width, np.uint8), np.empty(GUESSES, np.int64)
    for c in range(len(table.commit)):
        first, last = table.offsets[c], table.offsets[c + 1]
        for j in range(width):
            token[j], when[j] = -1, last + 1
            for s in range(last - 1, first - 1, -1):
                if accepted[s, 0, j]:
                    token[j], when[j] = predicted[s, 0, j], s
        total = 1
        reach, end = first + 1, first + 1
        s = first + 1
        while end < last:
            while s <= end:
                put(state, known[s, 0])
                surest(known[s, 0], table.confidence[s - 1, 0], guesses)
                for guess in guesses:
                    if guess >= 0 and predicted[s - 1, 0, guess] == token[guess] and when[guess] <= s + 1:
                        state[guess] = 1
                join(state, accepted[_latest_step(known, first, last, state), 0])
                goal = last if _contains(state, table.final[c]) else _latest_step(known, first, last, state)
                reach = max(reach, goal, s + 1)
                s += 1
            total += 1
            end = reach
        fewest[c] = total
    return fewest
