"""Skipping: a token drops its least wanted experts once they hold too little of its gate weight.

Source: dynamic skipping of "Not All Experts are Equal" (NAEE, arXiv 2402.14800, and its released code), which drops the
second of two experts where its weight is below a fraction b of the first's, and renormalises. For K experts we drop
ranks i to K, i >= 2, as soon as together they hold less than ``beta`` of the row's top-K weight; for two experts that
is NAEE's rule with beta = b / (1 + b). One ``beta`` serves all layers, where NAEE calibrates one each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.kernels import router_arrays
from simulator.policy import WEIGHTS, Geometry, Selection, Trajectory
from simulator.selecting.coresets import keep_marked, recorded_weights
from simulator.selecting.reselect import copied_selection
from tracer.errors import UserError
from tracer.jit import njit
from tracer.trace import LayerTrace


@njit
def _drop_tails(beta, router, ids, count, weights):
    """Shorten every row, in place. Sums of float16 weights are exact in float64, so their order does not matter."""
    width = ids.shape[1]
    order = np.empty(width, np.int64)
    size = np.empty(width, np.float64)
    keep = np.empty(width, np.uint8)
    for t in range(len(ids)):
        n = np.int64(count[t])
        total = 0.0
        for k in range(n):
            w = abs(np.float64(weights[t, k]))
            size[k] = w
            total += w
            at = k
            while at > 0 and (
                size[order[at - 1]] < w or (size[order[at - 1]] == w and ids[t, order[at - 1]] > ids[t, k])
            ):
                order[at] = order[at - 1]
                at -= 1
            order[at] = k
        keep[:n] = 1
        tail = 0.0
        for rank in range(n - 1, 0, -1):
            tail += size[order[rank]]
            if not tail < beta * total:
                break
            keep[order[rank]] = 0
        count[t] = keep_marked(keep, n, router, ids[t], weights[t])


@dataclass(frozen=True)
class Skip:
    """Each token drops the last of its experts, by gate weight, that together hold less than ``beta`` of it.

    Parameters
    ----------
    beta : float
        Share of a row's gate weight that may be dropped, 0 (vanilla) to 1 (only the best expert stays).
    """

    beta: float = 0.1
    requires: ClassVar[frozenset[str]] = frozenset({WEIGHTS})

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise UserError(f"skip: beta must be between 0 and 1, not {self.beta}.")

    def select(self, layer: LayerTrace, trajectory: Trajectory, geometry: Geometry) -> Selection:
        """The recorded experts of every row but those it drops; ranks by weight, ties to the lowest id.

        Raises
        ------
        UserError
            The trace holds no gate weights.
        """
        recorded_weights(layer, "skip")
        ids, count, weights = copied_selection(layer, trajectory)
        _drop_tails(float(self.beta), router_arrays(layer.router), ids, count, weights)
        return Selection(ids, count, weights)
