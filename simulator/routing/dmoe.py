"""dMoE: the tokens of a block vote for one small coreset of experts, and route inside it.

Source: arXiv 2605.30876 and its released gate (github fscdc/dMoE, modeling_llada2_moe_be_adaptive.py): plain top-K votes of
every row, summed and normalised, the top-p head of them, at least ``min_experts``; then the model's own group-limited top-K
inside. We differ in the corners the release leaves open: experts nobody voted for enter by lowest id; groups with fewer than
two coreset members tie at minus infinity, lowest group first; a last chunk shorter than the block votes with the rows it has
(the release pads it with minus infinity, which turns its votes into NaN). Sums are float32 running sums in row, id and rank
order. The published method fine-tunes the model with this routing; replayed on a vanilla trace it is training-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.kernels import WIDTH, kth_largest, router_arrays, select_tile, tile_scratch
from simulator.policy import ACTIVE, Geometry, Selection, Trajectory
from simulator.selecting.chunks import chunk_rows
from simulator.selecting.reselect import copied_selection, recorded_scores, refuse_missing_score
from tracer.errors import UserError
from tracer.jit import njit
from tracer.trace import LayerTrace

# Lanes of the first pass over a row: two AVX-512 registers of float32.
LANES = 32


@njit
def _lane_maxima(scores, rows, bias, columns):
    """Largest selection score of each lane of each row, ``columns`` [LANES, W]; expert e falls in lane e mod ``LANES``.

    NaN (a missing column) is never largest. Unsigned indices spare the test for negative ones, without which the inner loop
    is a vector loop.
    """
    top = np.empty(columns.shape[0], np.float32)
    experts, lanes = np.uint64(scores.shape[1]), np.uint64(len(top))
    for i in range(len(rows)):
        row = scores[rows[i]]
        for lane in range(lanes):
            top[lane] = -np.inf
        start = np.uint64(0)
        while start + lanes <= experts:
            for lane in range(lanes):
                v = row[start + lane] + bias[start + lane]
                top[lane] = v if v > top[lane] else top[lane]
            start += lanes
        for lane in range(experts - start):
            v = row[start + lane] + bias[start + lane]
            top[lane] = v if v > top[lane] else top[lane]
        for lane in range(lanes):
            columns[lane, i] = top[lane]


@njit
def _add_votes(scores, rows, bias, columns, bounds, top_k, lanes, candidates, values, votes):
    """Add each row's plain top-K scores to ``votes`` [E], row by row.

    ``bounds`` [W] hold the K-th largest of a row's lane maxima ``columns``, so its top K all lie in lanes that reach it.
    ``lanes`` int64 [LANES], ``candidates`` int64 [E] and ``values`` float32 [E] are working memory.
    """
    experts = np.uint64(scores.shape[1])
    for i in range(len(rows)):
        row = scores[rows[i]]
        bound = max(bounds[i], np.float32(-3.4028235e38))
        reached = np.uint64(0)
        for lane in range(LANES):
            lanes[reached] = lane
            reached += np.uint64(columns[lane, i] >= bound)
        found = np.uint64(0)
        for lane in range(reached):
            e = np.uint64(lanes[lane])
            while e < experts:
                v = row[e] + bias[e]
                candidates[found] = e
                values[found] = v
                found += np.uint64(v >= bound)
                e += np.uint64(LANES)
        size = np.int64(found)
        while size > top_k:
            worst = 0
            for j in range(1, size):
                tied = values[j] == values[worst] and candidates[j] > candidates[worst]
                worst = j if values[j] < values[worst] or tied else worst
            size -= 1
            values[worst] = values[size]
            candidates[worst] = candidates[size]
        for j in range(size):
            votes[candidates[j]] += values[j]


@njit
def _vote(scores, rows, router, columns, best, lanes, candidates, values, votes):
    """Sum the votes of up to ``WIDTH`` rows into ``votes`` [E]."""
    k = router.top_k
    _lane_maxima(scores, rows, router.bias, columns)
    if k < LANES:
        kth_largest(columns, np.int64(LANES), len(rows), k, best, values)
    else:
        best[k - 1] = -np.inf
    _add_votes(scores, rows, router.bias, columns, best[k - 1], k, lanes, candidates, values, votes)


@njit
def _coreset(votes, top_p, min_experts, keys, members):
    """Normalise ``votes`` and write their top-p head, at least ``min_experts``, ascending to ``members``; its size.

    ``keys`` int32 [E] is working memory: the votes as integers of the same order, of which a vector unit finds the largest.
    """
    experts = len(votes)
    total = np.float32(0)
    for e in range(experts):
        total += votes[e]
    total += np.float32(1e-20)
    for e in range(experts):
        # Adding zero turns -0 into 0, whose bits order like its value.
        votes[e] = votes[e] / total + np.float32(0)
    bits = votes.view(np.int32)
    for e in range(experts):
        keys[e] = bits[e] ^ ((bits[e] >> np.int32(31)) & np.int32(0x7FFFFFFF))
    taken = np.int32(-0x80000000)
    kept = 0
    reached = np.float32(0)
    over = False
    while kept < experts and (not over or kept < min_experts):
        largest = taken
        for e in range(experts):
            largest = max(largest, keys[e])
        first = np.int32(experts)
        for e in range(experts):
            first = min(first, np.int32(e) if keys[e] == largest else np.int32(experts))
        keys[first] = taken
        kept += 1
        if not over:
            reached += votes[first]
            over = reached > top_p
    found = 0
    for e in range(experts):
        if found < kept:
            members[found] = e
            found += int(keys[e] == taken)
    return kept


@njit
def _restrict(scores, rows, chunk_offsets, router, top_p, min_experts, ids, count, weights):
    """Route the rows of every chunk inside its coreset, in place; -1, or a row with a score missing."""
    experts = scores.shape[1]
    columns = np.empty((LANES, WIDTH), np.float32)
    best = np.empty((router.top_k, WIDTH), np.float32)
    lanes = np.empty(LANES, np.int64)
    values = np.empty(max(experts, WIDTH), np.float32)
    votes = np.empty(experts, np.float32)
    candidates = np.empty(experts, np.int64)
    members = np.empty(experts, np.int64)
    keys = np.empty(experts, np.int32)
    scratch = tile_scratch(router)
    for c in range(len(chunk_offsets) - 1):
        own = rows[chunk_offsets[c] : chunk_offsets[c + 1]]
        votes[:] = 0
        for start in range(0, len(own), WIDTH):
            _vote(scores, own[start : start + WIDTH], router, columns, best, lanes, candidates, values, votes)
        size = _coreset(votes, top_p, min_experts, keys, members)
        for start in range(0, len(own), WIDTH):
            tile = own[start : start + WIDTH]
            missing = select_tile(scores, tile, members[:size], router, scratch, ids, count, weights)
            if missing >= 0:
                return missing
    return -1


@dataclass(frozen=True)
class Dmoe:
    """The rows of each block vote for a coreset of experts and route inside it. Padding rows stay as recorded.

    Without a tokens table a part's rows are taken to follow its cached prefix in order, without padding.

    Parameters
    ----------
    top_p : float
        Share of the votes the coreset holds, 0 to 1 (0.6 in the paper).
    min_experts : int
        Experts it holds at least: 12 in the first release, 16 in the current one.
    block_length : int
        Rows of a chunk; 0 takes the trace's.
    restrict_prefix : bool
        Whether prompt and finished blocks are restricted too; the first release left them as they were.
    """

    top_p: float = 0.6
    min_experts: int = 12
    block_length: int = 0
    restrict_prefix: bool = True
    requires: ClassVar[frozenset[str]] = frozenset({ACTIVE})
    notes: ClassVar[tuple[str, ...]] = (
        "dMoE is published fine-tuned with its routing; this is its training-free behaviour.",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.top_p <= 1:
            raise UserError(f"dmoe: top_p must be between 0 and 1, not {self.top_p}.")
        if self.min_experts < 1:
            raise UserError(f"dmoe: min_experts must be 1 or more, not {self.min_experts}.")
        if self.block_length < 0:
            raise UserError(f"dmoe: block_length must be 0 (the trace's) or more, not {self.block_length}.")

    def select(self, layer: LayerTrace, trajectory: Trajectory, geometry: Geometry) -> Selection:
        """Experts of every row inside its chunk's coreset; a row takes min(K, reachable).

        Raises
        ------
        UserError
            The trace has no blocks and ``block_length`` is 0, or a router score is not held.
        """
        length = self.block_length or geometry.block_length
        if length < 1:
            raise UserError("dmoe: the trace has no blocks; give block_length, the tokens that vote together.")
        scores = recorded_scores(layer, "dmoe")
        ids, count, weights = copied_selection(layer, trajectory)
        rows, offsets = chunk_rows(trajectory, count, length, not self.restrict_prefix)
        router = router_arrays(layer.router)
        missing = _restrict(
            scores, rows, offsets, router, np.float32(self.top_p), self.min_experts, ids, count, weights
        )
        if missing >= 0:
            refuse_missing_score("dmoe", layer, trajectory, missing)
        return Selection(ids, count, weights)
