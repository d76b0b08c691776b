"""OEA: every row keeps its own best experts and fills up with what the others have brought in anyway.

Source: "Opportunistic Expert Activation" (arXiv 2511.02237), its simplified form with the single parameter k0: the base
of a row are its k0 best experts, S is the union of the bases, and each row adds its next best experts inside S until it
has K. The paper unites over a decoding batch, we over a block of one request. Its models have no expert groups; for
routers that do, the base is the k0 best of the experts the router chose, and the experts a row adds may lie in any
group: S is being read anyway. So every base stays whole, the block uses exactly S, and k0 = K is vanilla for every
router.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.kernels import router_arrays
from simulator.policy import ACTIVE, Geometry, Selection, Trajectory
from simulator.selecting.coresets import check_block_length, check_kept, list_members, shared_rows, weigh_row
from simulator.selecting.reselect import recorded_scores, refuse_missing_score
from tracer.errors import UserError
from tracer.jit import njit
from tracer.top import plain_top
from tracer.trace import LayerTrace


@njit
def _fill_up(scores, rows, chunk_offsets, router, k0, ids, count, weights):
    """Route every chunk, in place; -1, or a row with a score missing."""
    experts = scores.shape[1]
    width = ids.shape[1]
    # NaN is never chosen: only experts that are up for choice have a score here.
    selection = np.full(experts, np.nan, np.float32)
    best = np.empty(width, np.float32)
    top = np.empty(width, np.int64)
    inside = np.zeros(experts, np.uint8)
    own = np.zeros(experts, np.uint8)
    members = np.empty(experts, np.int64)
    for c in range(len(chunk_offsets) - 1):
        block = rows[chunk_offsets[c] : chunk_offsets[c + 1]]
        for t in block:
            for k in range(count[t]):
                e = ids[t, k]
                selection[e] = scores[t, e] + router.bias[e]
                if np.isnan(selection[e]):
                    return t
            base = plain_top(selection, min(k0, count[t]), best, top)
            for k in range(count[t]):
                selection[ids[t, k]] = np.nan
            for k in range(base):
                ids[t, k] = top[k]
                inside[top[k]] = 1
            count[t] = base
        size = list_members(inside, members, np.int64(0))
        for t in block:
            base = np.int64(count[t])
            for k in range(base):
                own[ids[t, k]] = 1
            if base < router.top_k:
                for e in members[:size]:
                    v = scores[t, e] + router.bias[e]
                    if np.isnan(v):
                        return t
                    if own[e] == 0:
                        selection[e] = v
                for k in range(plain_top(selection, router.top_k - base, best, top)):
                    own[top[k]] = 1
                for e in members[:size]:
                    selection[e] = np.nan
            chosen = list_members(own, top, np.int64(0))
            for k in range(chosen):
                ids[t, k] = top[k]
            weigh_row(scores[t], chosen, router, ids[t], weights[t])
            count[t] = chosen
    return -1


@dataclass(frozen=True)
class Oea:
    """Rows keep their best ``k0`` experts and fill up to K with experts the block uses anyway. Padding stays as recorded.

    Parameters
    ----------
    k0 : int
        Experts of its own each row keeps, 1 to K.
    block_length : int
        Rows of a chunk; 0 takes the trace's.
    restrict_prefix : bool
        Whether prompt and finished blocks are restricted too.
    """

    k0: int = 3
    block_length: int = 0
    restrict_prefix: bool = True
    requires: ClassVar[frozenset[str]] = frozenset({ACTIVE})

    def __post_init__(self) -> None:
        if self.k0 < 1:
            raise UserError(f"oea: k0 must be 1 or more, not {self.k0}.")
        check_block_length("oea", self.block_length)

    def select(self, layer: LayerTrace, trajectory: Trajectory, geometry: Geometry) -> Selection:
        """Each row's base and what it adds inside the union of its chunk's bases; fewer than K where that is small.

        Raises
        ------
        UserError
            ``k0`` exceeds the layer's K, the trace has no blocks and ``block_length`` is 0, or a router score is not held.
        """
        check_kept("oea", "k0", self.k0, layer)
        scores = recorded_scores(layer, "oea")
        shared = shared_rows("oea", layer, trajectory, geometry, self.block_length, self.restrict_prefix)
        ids, count, weights = shared.ids, shared.count, shared.weights
        missing = _fill_up(
            scores, shared.rows, shared.offsets, router_arrays(layer.router), self.k0, ids, count, weights
        )
        if missing >= 0:
            refuse_missing_score("oea", layer, trajectory, missing)
        return Selection(ids, count, weights)
