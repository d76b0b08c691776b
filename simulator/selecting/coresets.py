"""Sets of experts that a block of rows shares: what the policies that build them have in common.

A policy says which rows decide together (:func:`shared_rows`), builds one set per chunk with the kernels here, and lets
the rows choose inside it (:func:`route_inside`). Ties go to the lowest expert id; experts of a row that chose anew come
in ascending id.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simulator.kernels import router_arrays, select_experts
from simulator.policy import Geometry, Selection, Trajectory
from simulator.selecting.chunks import chunk_rows
from simulator.selecting.reselect import copied_selection, refuse_missing_score
from tracer.errors import UserError
from tracer.jit import njit
from tracer.trace import LayerTrace


@dataclass(frozen=True, slots=True)
class SharedRows:
    """The recorded selection, to be changed in place, and the rows that decide together. R rows, C chunks."""

    ids: np.ndarray  # uint8 | uint16 [R, K]
    count: np.ndarray  # uint8 [R]
    weights: np.ndarray  # float32 [R, K]
    rows: np.ndarray  # int64 [M], chunk by chunk
    offsets: np.ndarray  # int64 [C + 1]

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each chunk, int64 [C]."""
        return np.diff(self.offsets)


def check_block_length(policy: str, block_length: int) -> None:
    """Refuse a negative ``block_length``.

    Raises
    ------
    UserError
        It is negative.
    """
    if block_length < 0:
        raise UserError(f"{policy}: block_length must be 0 (the trace's) or more, not {block_length}.")


def check_kept(policy: str, name: str, value: int, layer: LayerTrace) -> None:
    """Refuse a number of experts a row keeps that exceeds what the rows of a layer use.

    Raises
    ------
    UserError
        ``value`` is above the layer's K.
    """
    if value > layer.router.top_k:
        raise UserError(
            f"{policy}: {name} must be 1 to {layer.router.top_k}, the experts a token of this trace uses, not {value}."
        )


def shared_rows(
    policy: str,
    layer: LayerTrace,
    trajectory: Trajectory,
    geometry: Geometry,
    block_length: int,
    restrict_prefix: bool,
) -> SharedRows:
    """The rows of each (request, branch, position // block_length) that compute; padding is in none.

    Parameters
    ----------
    policy : str
        Its name, for the error.
    layer, trajectory, geometry
        As ``select`` got them.
    block_length : int
        Positions of a chunk; 0 takes the trace's.
    restrict_prefix : bool
        Whether prompt and finished blocks are chunks too, or only the forward's own block.

    Raises
    ------
    UserError
        The trace has no blocks and ``block_length`` is 0.
    """
    length = block_length or geometry.block_length
    if length < 1:
        raise UserError(
            f"{policy}: the trace has no blocks; give block_length, the tokens that share a set of experts."
        )
    ids, count, weights = copied_selection(layer, trajectory)
    rows, offsets = chunk_rows(trajectory, count, length, not restrict_prefix)
    return SharedRows(ids, count, weights, rows, offsets)


def all_scores(layer: LayerTrace, policy: str) -> np.ndarray:
    """Router scores float32 [R, E], C-contiguous, of a policy that looks at every expert.

    Raises
    ------
    UserError
        The trace holds none.
    """
    if layer.router_scores is None:
        raise UserError(
            f"{policy} needs the router scores of all experts, which the trace does not hold in layer {layer.layer}; "
            "capture it with --level scores."
        )
    return np.ascontiguousarray(layer.router_scores, np.float32)


def recorded_weights(layer: LayerTrace, policy: str) -> None:
    """Refuse a layer without gate weights.

    Raises
    ------
    UserError
        The trace holds none.
    """
    if layer.gate_weights is None:
        raise UserError(
            f"{policy} needs gate weights, which the trace does not hold in layer {layer.layer}; "
            "use a trace that was captured with weights."
        )


def route_inside(
    policy: str,
    layer: LayerTrace,
    trajectory: Trajectory,
    scores: np.ndarray,
    shared: SharedRows,
    members: np.ndarray,
    member_offsets: np.ndarray,
) -> Selection:
    """Every row of a chunk takes its best K experts inside the chunk's set, by the model's own rule; others stay.

    Parameters
    ----------
    policy : str
    layer, trajectory
        As ``select`` got them.
    scores : np.ndarray
        float32 [R, E].
    shared : SharedRows
        Changed in place.
    members : np.ndarray
        int64 [M], experts of all sets, ascending inside a set.
    member_offsets : np.ndarray
        int64 [C + 1].

    Raises
    ------
    UserError
        A row needs a score that the trace does not hold.
    """
    router = router_arrays(layer.router)
    missing = select_experts(
        scores,
        shared.rows,
        shared.offsets,
        members,
        member_offsets,
        router,
        shared.ids,
        shared.count,
        shared.weights,
    )
    if missing >= 0:
        refuse_missing_score(policy, layer, trajectory, missing)
    return Selection(shared.ids, shared.count, shared.weights)


@njit
def list_members(inside, members, start):
    """Write the experts marked in ``inside`` uint8 [E], ascending, to ``members[start:]`` and unmark them; the end."""
    for e in range(len(inside)):
        if inside[e]:
            members[start] = e
            start += 1
            inside[e] = 0
    return start


@njit
def weigh_row(scores, chosen, router, ids, weights):
    """Weights of a row's first ``chosen`` experts by the router's rule, float32, summed in their order; the rest become 0.

    ``scores`` [E] are before bias; ``ids`` and ``weights`` [>= chosen] change in place.
    """
    total = np.float32(0)
    for k in range(chosen):
        e = ids[k]
        weights[k] = scores[e] + router.bias[e] if router.biased_weights else scores[e]
        total += weights[k]
    total += np.float32(1e-20)
    for k in range(chosen):
        raw = weights[k] / total if router.normalise else weights[k]
        weights[k] = raw * router.scaling * router.scale[ids[k]]
    ids[chosen:] = 0
    weights[chosen:] = 0


@njit
def keep_marked(keep, n, router, ids, weights):
    """Drop those of a row's ``n`` slots that ``keep`` uint8 [K] does not mark, in place; how many are left.

    Where the router normalises, the rest are scaled up so that their weights, ``expert_scale`` aside, sum to what all had.
    """
    whole = np.float32(0)
    part = np.float32(0)
    kept = 0
    for k in range(n):
        share = weights[k] / router.scale[ids[k]]
        whole += share
        if keep[k]:
            part += share
            ids[kept] = ids[k]
            weights[kept] = weights[k]
            kept += 1
    if router.normalise and kept < n and part != 0:
        for k in range(kept):
            weights[k] = weights[k] * (whole / part)
    ids[kept:] = 0
    weights[kept:] = 0
    return kept
