"""DES-Seq: the rows of a block share the union of what each of them wants most.

Source: "Dynamic Expert Sharing" (arXiv 2602.00879), intra-sequence sharing: the coreset is the union over the block's
rows of their k' < K best experts; each row then takes its K best inside, weights renormalised. The best k' are the
plain ones by selection score, bias included, whatever groups the router has; inside the coreset the model's own
group-limited rule chooses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.kernels import router_arrays
from simulator.policy import ACTIVE, Geometry, Selection, Trajectory
from simulator.selecting.coresets import (
    check_block_length,
    check_kept,
    list_members,
    route_inside,
    shared_rows,
)
from simulator.selecting.reselect import recorded_scores
from tracer.errors import UserError
from tracer.jit import njit
from tracer.top import plain_top
from tracer.trace import LayerTrace


@njit
def _unions(scores, bias, rows, chunk_offsets, k_prime, members, member_offsets):
    """The union of the rows' plain top-k' of every chunk, ascending."""
    experts = scores.shape[1]
    selection = np.empty(experts, np.float32)
    best = np.empty(k_prime, np.float32)
    top = np.empty(k_prime, np.int64)
    inside = np.zeros(experts, np.uint8)
    end = np.int64(0)
    for c in range(len(chunk_offsets) - 1):
        for t in rows[chunk_offsets[c] : chunk_offsets[c + 1]]:
            for e in range(experts):
                selection[e] = scores[t, e] + bias[e]
            for k in range(plain_top(selection, k_prime, best, top)):
                inside[top[k]] = 1
        end = list_members(inside, members, end)
        member_offsets[c + 1] = end


@dataclass(frozen=True)
class DesSeq:
    """The rows of a block route inside the union of their best ``k_prime`` experts. Padding rows stay as recorded.

    Parameters
    ----------
    k_prime : int
        Experts each row brings in, 1 to K (2 and 3 of 8 in the paper).
    block_length : int
        Rows of a chunk; 0 takes the trace's.
    restrict_prefix : bool
        Whether prompt and finished blocks are restricted too.
    """

    k_prime: int = 3
    block_length: int = 0
    restrict_prefix: bool = True
    requires: ClassVar[frozenset[str]] = frozenset({ACTIVE})

    def __post_init__(self) -> None:
        if self.k_prime < 1:
            raise UserError(f"des_seq: k_prime must be 1 or more, not {self.k_prime}.")
        check_block_length("des_seq", self.block_length)

    def select(self, layer: LayerTrace, trajectory: Trajectory, geometry: Geometry) -> Selection:
        """Experts of every row inside its chunk's coreset.

        Raises
        ------
        UserError
            ``k_prime`` exceeds the layer's K, the trace has no blocks and ``block_length`` is 0, or a router score is not held.
        """
        check_kept("des_seq", "k_prime", self.k_prime, layer)
        scores = recorded_scores(layer, "des_seq")
        shared = shared_rows("des_seq", layer, trajectory, geometry, self.block_length, self.restrict_prefix)
        room = np.minimum(shared.sizes * self.k_prime, scores.shape[1])
        members, member_offsets = np.empty(int(room.sum()), np.int64), np.zeros(len(room) + 1, np.int64)
        bias = router_arrays(layer.router).bias
        _unions(scores, bias, shared.rows, shared.offsets, self.k_prime, members, member_offsets)
        return route_inside("des_seq", layer, trajectory, scores, shared, members, member_offsets)
