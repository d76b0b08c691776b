"""Bound: the smallest set of experts a block could share and still keep a given share of its gate weight.

Source: the definition of a coreset in arXiv 2605.30876 (dMoE) and 2602.00879 (DES), with hindsight in the place of
their rules: per block and layer, experts enter by the vanilla gate weight they carry over the block's rows, heaviest
first, until the set holds ``share`` of all of it. An expert's weight does not depend on which others are in, so the
greedy set is the smallest one; no rule under which rows only keep experts they had can do with fewer. Rows choose no
new experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.kernels import router_arrays
from simulator.policy import WEIGHTS, Geometry, Selection, Trajectory
from simulator.selecting.coresets import check_block_length, keep_marked, recorded_weights, shared_rows
from tracer.errors import UserError
from tracer.jit import njit
from tracer.trace import LayerTrace


@njit
def _smallest_sets(rows, chunk_offsets, share, router, ids, count, weights):
    """Restrict the rows of every chunk, in place. Sums of float16 weights are exact in float64 in any order."""
    experts = len(router.bias)
    carried = np.zeros(experts, np.float64)
    used = np.zeros(experts, np.uint8)
    # One place more than experts: a repeat is written, then overwritten.
    left = np.empty(experts + 1, np.int64)
    inside = np.zeros(experts, np.uint8)
    keep = np.empty(ids.shape[1], np.uint8)
    for c in range(len(chunk_offsets) - 1):
        own = rows[chunk_offsets[c] : chunk_offsets[c + 1]]
        total = 0.0
        found = 0
        for t in own:
            for k in range(count[t]):
                e = ids[t, k]
                w = abs(np.float64(weights[t, k]))
                carried[e] += w
                total += w
                left[found] = e
                found += used[e] == 0
                used[e] = 1
        reached = 0.0
        while found > 0 and (share >= 1 or reached < share * total):
            at = 0
            for i in range(1, found):
                more = carried[left[i]] > carried[left[at]]
                if more or (carried[left[i]] == carried[left[at]] and left[i] < left[at]):
                    at = i
            reached += carried[left[at]]
            inside[left[at]] = 1
            left[at] = left[found - 1]
            found -= 1
        for t in own:
            n = np.int64(count[t])
            for k in range(n):
                e = ids[t, k]
                keep[k] = inside[e]
                carried[e] = 0
                used[e] = 0
            count[t] = keep_marked(keep, n, router, ids[t], weights[t])
        inside[:] = 0


@dataclass(frozen=True)
class GreedyCoreset:
    """Each block keeps the fewest experts that hold ``share`` of its vanilla gate weight: a bound. Padding stays as recorded.

    Parameters
    ----------
    share : float
        Share of the gate weight to keep, above 0, up to 1 (vanilla).
    block_length : int
        Rows of a chunk; 0 takes the trace's.
    restrict_prefix : bool
        Whether prompt and finished blocks are restricted too.
    """

    share: float = 0.9
    block_length: int = 0
    restrict_prefix: bool = True
    requires: ClassVar[frozenset[str]] = frozenset({WEIGHTS})

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"greedy_coreset: share must be above 0 and at most 1, not {self.share}.")
        check_block_length("greedy_coreset", self.block_length)

    def select(self, layer: LayerTrace, trajectory: Trajectory, geometry: Geometry) -> Selection:
        """The recorded experts of every row that are in its chunk's set; a row may have none left.

        Raises
        ------
        UserError
            The trace has no blocks and ``block_length`` is 0, or no gate weights.
        """
        recorded_weights(layer, "greedy_coreset")
        shared = shared_rows("greedy_coreset", layer, trajectory, geometry, self.block_length, self.restrict_prefix)
        ids, count, weights = shared.ids, shared.count, shared.weights
        router = router_arrays(layer.router)
        _smallest_sets(shared.rows, shared.offsets, float(self.share), router, ids, count, weights)
        return Selection(ids, count, weights)
