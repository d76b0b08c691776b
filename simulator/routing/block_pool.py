"""Block pool: a block admits the experts that any one of its rows scores highest.

Source: the block routing published for LLaDA2.2, not checked against its code: an expert's pool score is the
largest selection score any row of the block gives it, the best 48 of 256 are admitted, and each row takes its
top-K inside.
Bias counts in the pool score; inside the pool the model's own group-limited rule chooses. Replayed on the trace of a
model that was not trained with it, this is training-free.
"""

from __future__ import annotations

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
from simulator.selecting.reselect import refuse_missing_score
from tracer.errors import UserError
from tracer.jit import njit
from tracer.top import plain_top
from tracer.trace import LayerTrace


@njit
def _pools(scores, bias, rows, chunk_offsets, size, members):
    """The ``size`` experts of largest pool score of every chunk, ascending; -1, or the first row with a score missing."""
    experts = scores.shape[1]
    pool = np.empty(experts, np.float32)
    best = np.empty(size, np.float32)
    top = np.empty(size, np.int64)
    inside = np.zeros(experts, np.uint8)
    for c in range(len(chunk_offsets) - 1):
        pool[:] = -np.inf
        for t in rows[chunk_offsets[c] : chunk_offsets[c + 1]]:
            missing = False
            for e in range(experts):
                v = scores[t, e] + bias[e]
                missing |= np.isnan(v)
                pool[e] = v if v > pool[e] else pool[e]
            if missing:
                return t
        for k in range(plain_top(pool, size, best, top)):
            inside[top[k]] = 1
        list_members(inside, members, c * size)
    return -1


@dataclass(frozen=True)
class BlockPool:
    """The rows of a block route inside the ``coreset_size`` experts of largest pool score. Padding rows stay as recorded.

    Parameters
    ----------
    coreset_size : int
        Experts a block admits, 1 or more (48 of 256 in LLaDA2.2); all of them where a layer has no more.
    block_length : int
        Rows of a chunk; 0 takes the trace's.
    restrict_prefix : bool
        Whether prompt and finished blocks are restricted too.
    """

    coreset_size: int = 48
    block_length: int = 0
    restrict_prefix: bool = True
    requires: ClassVar[frozenset[str]] = frozenset({SCORES})
    notes: ClassVar[tuple[str, ...]] = (
        "Block pool is published for a model trained with it; on another's trace it is shown without that training.",
    )

    def __post_init__(self) -> None:
        if self.coreset_size < 1:
            raise UserError(f"block_pool: coreset_size must be 1 or more, not {self.coreset_size}.")
        check_block_length("block_pool", self.block_length)

    def select(self, layer: LayerTrace, trajectory: Trajectory, geometry: Geometry) -> Selection:
        """Experts of every row inside its chunk's pool.

        Raises
        ------
        UserError
            The trace has no blocks and ``block_length`` is 0, or a router score is not held.
        """
        scores = all_scores(layer, "block_pool")
        shared = shared_rows("block_pool", layer, trajectory, geometry, self.block_length, self.restrict_prefix)
        size = min(self.coreset_size, scores.shape[1])
        chunks = len(shared.sizes)
        members = np.empty(chunks * size, np.int64)
        missing = _pools(scores, router_arrays(layer.router).bias, shared.rows, shared.offsets, size, members)
        if missing >= 0:
            refuse_missing_score("block_pool", layer, trajectory, missing)
        return route_inside("block_pool", layer, trajectory, scores, shared, members, np.arange(chunks + 1) * size)
