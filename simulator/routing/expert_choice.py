"""Expert choice: experts choose their tokens, so that all have the same load.

Source: EC-DLM (arXiv 2604.01622), after "Mixture-of-Experts with Expert Choice Routing" (arXiv 2202.09368): every
expert takes the c = K * B / E rows of the block that score it highest. c is rounded up, so that no expert goes idle and
a block gets at least the K * B assignments it had; B counts the rows that compute. Rows are ranked by the score before
bias, which adds the same to every row of a column; ties go to the first row; groups, a limit on a row's own choice, do
not apply. A row gets as many experts as chose it, none or far more than K, weighted by the router's own rule. The paper
trains with this routing; here it is training-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulator.kernels import router_arrays
from simulator.policy import SCORES, Geometry, Selection, Trajectory
from simulator.selecting.coresets import all_scores, check_block_length, shared_rows, weigh_row
from simulator.selecting.reselect import refuse_missing_score
from tracer.errors import UserError
from tracer.jit import njit
from tracer.trace import LayerTrace

# Selection.count is a byte.
MOST = 255


@njit
def _choose(scores, rows, chunk_offsets, capacity, picks, chosen):
    """Let every expert of a chunk pick its rows; -1, or a row with a score missing.

    ``picks`` receives capacity[c] rows for expert 0 of chunk c, then for expert 1, ...; ``chosen`` int64 [R] counts how
    often each row was picked.
    """
    experts = scores.shape[1]
    start = 0
    for c in range(len(chunk_offsets) - 1):
        room = capacity[c]
        best = np.full((experts, room), -np.inf, np.float32)
        mine = picks[start : start + experts * room].reshape(experts, room)
        found = 0
        for t in rows[chunk_offsets[c] : chunk_offsets[c + 1]]:
            for e in range(experts):
                v = scores[t, e]
                if np.isnan(v):
                    return t
                if found >= room and v <= best[e, room - 1]:
                    continue
                at = min(found, room - 1)
                while at > 0 and best[e, at - 1] < v:
                    best[e, at] = best[e, at - 1]
                    mine[e, at] = mine[e, at - 1]
                    at -= 1
                best[e, at] = v
                mine[e, at] = t
            found += 1
        for i in range(start, start + experts * room):
            chosen[picks[i]] += 1
        start += experts * room
    return -1


@njit
def _hand_out(scores, rows, capacity, picks, router, ids, count, weights):
    """Write each picked row's experts, ascending, and their weights."""
    experts = scores.shape[1]
    for t in rows:
        count[t] = 0
    start = 0
    for room in capacity:
        for e in range(experts):
            for i in range(start + e * room, start + (e + 1) * room):
                t = picks[i]
                ids[t, count[t]] = e
                count[t] += 1
        start += experts * room
    for t in rows:
        weigh_row(scores[t], np.int64(count[t]), router, ids[t], weights[t])


@dataclass(frozen=True)
class ExpertChoice:
    """Every expert takes its K * B / E best rows of each block, rounded up: equal load. Padding rows stay as recorded.

    Parameters
    ----------
    block_length : int
        Rows of a chunk; 0 takes the trace's.
    restrict_prefix : bool
        Whether prompt and finished blocks are routed this way too.
    """

    block_length: int = 0
    restrict_prefix: bool = True
    requires: ClassVar[frozenset[str]] = frozenset({SCORES})
    notes: ClassVar[tuple[str, ...]] = (
        "Expert choice is published for models trained with it; this is its behaviour without that training.",
    )

    def __post_init__(self) -> None:
        check_block_length("expert_choice", self.block_length)

    def select(self, layer: LayerTrace, trajectory: Trajectory, geometry: Geometry) -> Selection:
        """The experts that chose each row; the selection is as wide as the row with most of them.

        Raises
        ------
        UserError
            The trace has no blocks and ``block_length`` is 0, a router score is not held, or more than 255 experts choose
            one row.
        """
        scores = all_scores(layer, "expert_choice")
        shared = shared_rows("expert_choice", layer, trajectory, geometry, self.block_length, self.restrict_prefix)
        experts = scores.shape[1]
        capacity = -(-layer.router.top_k * shared.sizes // experts)
        picks = np.empty(int(capacity.sum()) * experts, np.int64)
        chosen = np.zeros(len(shared.count), np.int64)
        missing = _choose(scores, shared.rows, shared.offsets, capacity, picks, chosen)
        if missing >= 0:
            refuse_missing_score("expert_choice", layer, trajectory, missing)
        width = max(shared.ids.shape[1], int(chosen.max(initial=0)))
        if width > MOST:
            raise UserError(
                f"expert_choice: {width} experts choose one row in layer {layer.layer}, more than the {MOST} a row can have; "
                "give a larger block_length, or restrict_prefix=false."
            )
        ids = np.zeros((len(chosen), width), shared.ids.dtype)
        weights = np.zeros(ids.shape, np.float32)
        ids[:, : shared.ids.shape[1]] = shared.ids
        weights[:, : shared.ids.shape[1]] = shared.weights
        _hand_out(scores, shared.rows, capacity, picks, router_arrays(layer.router), ids, shared.count, weights)
        return Selection(ids, shared.count, weights)
