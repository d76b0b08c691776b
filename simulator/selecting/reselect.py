"""What routing policies that choose experts anew have in common: which rows compute, and what a missing score means."""

from __future__ import annotations

from typing import NoReturn

import numpy as np

from simulator.policy import Selection, Trajectory
from tracer.errors import UserError
from tracer.trace import LayerTrace


def computed_count(layer: LayerTrace, trajectory: Trajectory) -> np.ndarray:
    """Experts each row really uses, uint8 [R]: 0 where it was not routed or keeps its previous output."""
    if trajectory.reused is None:
        return layer.count
    return np.where(trajectory.reused, np.uint8(0), layer.count)


def recorded_selection(layer: LayerTrace, trajectory: Trajectory) -> Selection:
    """The recorded experts of every row that computes."""
    return Selection(layer.expert_ids, computed_count(layer, trajectory), layer.gate_weights)


def copied_selection(layer: LayerTrace, trajectory: Trajectory) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fresh arrays of the recorded selection for a kernel to change: ids [R, K], count uint8 [R], weights float32 [R, K].

    Weights are 0 where the trace holds none.
    """
    ids = np.ascontiguousarray(layer.expert_ids).copy()
    weights = np.zeros(ids.shape, np.float32) if layer.gate_weights is None else layer.gate_weights.astype(np.float32)
    return ids, computed_count(layer, trajectory).copy(), weights


def recorded_scores(layer: LayerTrace, policy: str) -> np.ndarray:
    """Router scores float32 [R, E], C-contiguous.

    Raises
    ------
    UserError
        The trace holds none.
    """
    if layer.router_scores is None:
        raise UserError(
            f"{policy} chooses experts by router scores, which the trace does not hold in layer {layer.layer}; "
            "capture it with --level active or scores."
        )
    return np.ascontiguousarray(layer.router_scores, np.float32)


def refuse_missing_score(policy: str, layer: LayerTrace, trajectory: Trajectory, row: int) -> NoReturn:
    """Stop because a row needs the score of an expert whose column the trace does not hold.

    Raises
    ------
    UserError
        Always; names forward and layer.
    """
    forwards = trajectory.forwards
    found = int(np.searchsorted(forwards.row_offsets, row, side="right")) - 1
    kind = "forward" if trajectory.recorded else "simulated forward"
    raise UserError(
        f"{policy} needs router scores of experts that the trace does not hold for {kind} "
        f"{int(forwards.forward_id[found])}, layer {layer.layer}; capture it with --level scores."
    )
