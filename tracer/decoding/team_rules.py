"""TEAM's rules, for its decoding loop and for replays: what is guessed, which rows are cold, which guesses hold.

Source: arXiv 2602.08404 and its released loop (github PKU-SEC-Lab/TEAM-MoE-dLLM @e9c502e). A forward runs 2^k branches of a
block of B positions: branch r has guess i filled in where bit i of r is set. Sets are uint8 arrays over the positions of a
block. Ties go to the lowest position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tracer.errors import UserError
from tracer.jit import njit

# Speculated positions of a forward, k, and what follows from it.
GUESSES = 2
BRANCHES = 1 << GUESSES


class Hot(NamedTuple):
    """What keeps a row from being cold, as kernels take it."""

    probability: np.float32
    distance: int


@dataclass(frozen=True)
class TeamRules:
    """TEAM's switches and numbers.

    Parameters
    ----------
    reuse : bool
        Decoded rows keep their previous expert outputs (the paper's delayed caching).
    limit : bool
        Rows far from known tokens and unsure are cold (limited activation).
    speculate : bool
        Run four branches of the block a forward (speculative exploration).
    threshold : float, optional
        Probability above which a token is accepted; None takes the trace's, or 0.95.
    quota : int, optional
        Tokens a forward accepts at least; None takes the trace's block length / steps, the remainder to the first steps as
        in its loop, or 1.
    hot_probability : float
        A row at least this sure of its token is never cold: 0.7 in the release, 0.6 best in the paper.
    hot_distance : int
        Positions from the nearest known token at which a row may be cold.

    Raises
    ------
    UserError
        A number out of range.
    """

    reuse: bool = True
    limit: bool = True
    speculate: bool = True
    threshold: float | None = None
    quota: int | None = None
    hot_probability: float = 0.7
    hot_distance: int = 4

    def __post_init__(self) -> None:
        if self.threshold is not None and not self.threshold >= 0:
            raise UserError(f"team: threshold must be 0 or more, not {self.threshold}.")
        if self.quota is not None and self.quota < 1:
            raise UserError(f"team: quota must be 1 or more, not {self.quota}.")
        if not 0 <= self.hot_probability <= 1:
            raise UserError(f"team: hot_probability must be between 0 and 1, not {self.hot_probability}.")
        if type(self.hot_distance) is not int or self.hot_distance < 1:
            raise UserError(f"team: hot_distance must be 1 or more, not {self.hot_distance}.")

    @property
    def hot(self) -> Hot:
        """What keeps a row from being cold; without ``limit`` every probability does."""
        return Hot(np.float32(self.hot_probability if self.limit else 0), self.hot_distance)


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
def surest(known, confidence, places):
    """Write the masked positions of largest ``confidence`` to ``places`` int64 [k], surest first, -1 where there is none."""
    for i in range(len(places)):
        places[i] = -1
    for j in range(len(known)):
        if known[j]:
            continue
        i = len(places)
        while i > 0 and (places[i - 1] < 0 or confidence[j] > confidence[places[i - 1]]):
            i -= 1
            if i + 1 < len(places):
                places[i + 1] = places[i]
            places[i] = j


@njit
def fill_in(known, guesses, states):
    """Write what each branch knows, uint8 [R, B]: ``known`` and its share of the ``guesses``."""
    for r in range(len(states)):
        put(states[r], known)
        for i in range(len(guesses)):
            if (r >> i) & 1 and guesses[i] >= 0:
                states[r, guesses[i]] = 1


@njit
def mark_cold(known, here, confidence, guesses, hot, cold):
    """Rows far from everything known and unsure: at least ``hot.distance`` away, probability below ``hot.probability``.

    ``known`` is the last branch's; positions a block lacks (not ``here``) are no tokens. Guessed positions are exempt; nothing
    is far where nothing is known. Writes ``cold`` uint8 [B].
    """
    width = len(known)
    distance = np.empty(width, np.int64)
    last = -width - 1
    for j in range(width):
        if known[j] and here[j]:
            last = j
        distance[j] = j - last
    last = 2 * width + 1
    for j in range(width - 1, -1, -1):
        if known[j] and here[j]:
            last = j
        nearest = min(distance[j], last - j)
        cold[j] = here[j] and hot.distance <= nearest <= width and confidence[j] < hot.probability
    for j in guesses:
        if j >= 0:
            cold[j] = 0


@njit
def _size(branch):
    size = 0
    while branch:
        size += branch & 1
        branch >>= 1
    return size


@njit
def chosen_branch(guesses, guess, predicted, accepted):
    """The largest branch whose guesses hold: branches with fewer of them, that hold too, accept those very tokens.

    With guesses a and b: both hold if the branch without guesses confirms both, or one, and the branch with that one the other.

    Parameters
    ----------
    guesses : int64 [k]
        Guessed positions, -1 where there is none.
    guess : int [B]
        What was guessed at each position.
    predicted, accepted : int and uint8 [R, B]
        What each branch predicts and accepts.
    """
    branches = len(predicted)
    holds = np.zeros(branches, np.uint8)
    holds[0] = 1
    best = 0
    for r in range(branches):
        if not holds[r]:
            continue
        if _size(r) > _size(best):
            best = r
        confirmed = 0
        for i in range(len(guesses)):
            j = guesses[i]
            if j >= 0 and not (r >> i) & 1 and accepted[r, j] and predicted[r, j] == guess[j]:
                confirmed |= 1 << i
        for more in range(1, branches):
            if not more & ~confirmed:
                holds[r | more] = 1
    return best


@njit
def gained(known, state, accepted):
    """Tokens a forward gains: what its chosen branch knows and accepts beyond what was ``known`` before."""
    total = 0
    for j in range(len(known)):
        total += (state[j] | accepted[j]) & ~known[j]
    return total
