"""Every token keeps its best k' of the K experts, weights renormalised.

Source: the "top-4" baseline of dMoE (arXiv 2605.30876, table 1). Best means the highest selection score, bias included, so a
group-limited router chooses what it would choose with K = k': groups are ranked before experts are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.kernels import router_arrays, select_tile, tile_scratch
from simulator.policy import ACTIVE, Geometry, Selection, Trajectory
from simulator.selecting.reselect import copied_selection, recorded_scores, refuse_missing_score
from tracer.errors import UserError
from tracer.jit import njit
from tracer.trace import LayerTrace


@njit
def _keep_best(scores, router, ids, count, weights):
    """Keep ``router.top_k`` of every row's recorded experts, in place; -1, or the first row with a score missing."""
    scratch = tile_scratch(router)
    own = np.empty(ids.shape[1], np.int64)
    row = np.empty(1, np.int64)
    for t in range(len(ids)):
        recorded = np.int64(count[t])
        if recorded <= router.top_k:
            continue
        for k in range(recorded):
            e = np.int64(ids[t, k])
            at = k
            while at > 0 and own[at - 1] > e:
                own[at] = own[at - 1]
                at -= 1
            own[at] = e
        row[0] = t
        missing = select_tile(scores, row, own[:recorded], router, scratch, ids, count, weights)
        if missing >= 0:
            return missing
    return -1


@dataclass(frozen=True)
class TopK:
    """Each token keeps its best ``k`` experts; rows that have no more than ``k`` stay as recorded.

    Parameters
    ----------
    k : int
        Experts a token keeps, 1 to K.
    """

    k: int = 4
    requires: ClassVar[frozenset[str]] = frozenset({ACTIVE})

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"top_k: k must be 1 or more, not {self.k}.")

    def select(self, layer: LayerTrace, trajectory: Trajectory, geometry: Geometry) -> Selection:
        """The best ``k`` of every row's recorded experts.

        Raises
        ------
        UserError
            ``k`` exceeds the layer's K, or the trace does not hold a router score.
        """
        if self.k > layer.router.top_k:
            raise UserError(
                f"top_k: k must be 1 to {layer.router.top_k}, the experts a token of this trace uses, not {self.k}."
            )
        scores = recorded_scores(layer, "top_k")
        ids, count, weights = copied_selection(layer, trajectory)
        # The recorded experts already lie in the kept groups, so no group limit applies among them.
        router = router_arrays(layer.router)._replace(top_k=self.k, n_group=1)
        missing = _keep_best(scores, router, ids, count, weights)
        if missing >= 0:
            refuse_missing_score("top_k", layer, trajectory, missing)
        return Selection(ids, count, weights)
