"""DES-Vote: the rows of a block elect a coreset of fixed size by their summed router scores.

Source: "Dynamic Expert Sharing" (arXiv 2602.00879), saliency-aware voting: each row's scores outside its own top-K
count nothing, V is the sum over the block's rows, and the floor(beta * E) experts of largest V are the coreset. Scores
are selection scores, bias included, the top-K is the plain one, and votes are float32 running sums in row order; inside
the coreset the model's own group-limited rule chooses. Where fewer experts have votes than the coreset holds, the
lowest ids follow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.kernels import router_arrays
from simulator.policy import SCORES, Geometry, Selection, Trajectory
from simulator.selecting.coresets import (
    all_scores,
    check_block_length,
    list_members,
    route_inside,
    shared_rows,
)
from tracer.errors import UserError
from tracer.jit import njit
from tracer.top import plain_top
from tracer.trace import LayerTrace


@njit
def _elect(scores, bias, rows, chunk_offsets, top_k, size, members):
    """The ``size`` experts of most votes of every chunk, ascending."""
    experts = scores.shape[1]
    selection = np.empty(experts, np.float32)
    votes = np.empty(experts, np.float32)
    best = np.empty(max(top_k, size), np.float32)
    top = np.empty(max(top_k, size), np.int64)
    inside = np.zeros(experts, np.uint8)
    for c in range(len(chunk_offsets) - 1):
        votes[:] = 0
        for t in rows[chunk_offsets[c] : chunk_offsets[c + 1]]:
            for e in range(experts):
                selection[e] = scores[t, e] + bias[e]
            for k in range(plain_top(selection, top_k, best, top)):
                votes[top[k]] += selection[top[k]]
        for k in range(plain_top(votes, size, best, top)):
            inside[top[k]] = 1
        list_members(inside, members, c * size)


@dataclass(frozen=True)
class DesVote:
    """The rows of a block route inside the ``beta`` share of experts they vote for. Padding rows stay as recorded.

    Parameters
    ----------
    beta : float
        Share of all experts the coreset holds, 0 to 1, one expert at least (0.15 and 0.10 in the paper).
    block_length : int
        Rows of a chunk; 0 takes the trace's.
    restrict_prefix : bool
        Whether prompt and finished blocks are restricted too.
    """

    beta: float = 0.15
    block_length: int = 0
    restrict_prefix: bool = True
    requires: ClassVar[frozenset[str]] = frozenset({SCORES})

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise UserError(f"des_vote: beta must be between 0 and 1, not {self.beta}.")
        check_block_length("des_vote", self.block_length)

    def select(self, layer: LayerTrace, trajectory: Trajectory, geometry: Geometry) -> Selection:
        """Experts of every row inside its chunk's coreset.

        Raises
        ------
        UserError
            The trace has no blocks and ``block_length`` is 0, or a router score is not held.
        """
        scores = all_scores(layer, "des_vote")
        shared = shared_rows("des_vote", layer, trajectory, geometry, self.block_length, self.restrict_prefix)
        size = max(1, math.floor(self.beta * scores.shape[1]))
        chunks = len(shared.sizes)
        members = np.empty(chunks * size, np.int64)
        router = router_arrays(layer.router)
        _elect(scores, router.bias, shared.rows, shared.offsets, router.top_k, size, members)
        return route_inside("des_vote", layer, trajectory, scores, shared, members, np.arange(chunks + 1) * size)
