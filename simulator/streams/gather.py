"""From a trace to what policies are asked: the geometry, a trajectory's rows, and which of them are in the current block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from simulator.policy import Geometry, Trajectory
from tracer.errors import UserError
from tracer.trace import ForwardTable, LayerTrace, Segment


def geometry_of(trace: Any) -> Geometry:
    """The geometry of an opened trace, out of its ``meta`` and ``first_block``."""
    model = trace.meta.model
    return Geometry(
        layers=tuple(model.moe_layers),
        num_experts=model.num_experts,
        top_k=model.top_k,
        routers=trace.meta.routers,
        expert_bytes=model.expert_bytes,
        block_length=trace.meta.block_length,
        first_block=trace.first_block,
        decoding=trace.meta.decoding,
        dense_bytes=model.dense_bytes,
    )


def check_trajectory(trajectory: Trajectory, segment: Segment, name: str) -> None:
    """Refuse a trajectory whose rows kernels could not gather.

    Raises
    ------
    UserError
        ``source`` has another length than the forwards have rows, or points outside the segment.
    """
    source, rows = trajectory.source, trajectory.forwards.num_rows
    held = segment.forwards.num_rows
    held += trajectory.following.forwards.num_rows if trajectory.following is not None else 0
    inside = source is None or not len(source) or (source.min() >= 0 and source.max() < held)
    if not inside or len(source if source is not None else np.empty(rows)) != rows:
        raise UserError(
            f"The acceptance policy {name} takes rows from outside the segment, or not one for each of its {rows} rows; "
            "its source must hold a recorded row for every row."
        )


def recorded_layer(
    segment: Segment, at: int, geometry: Geometry, with_scores: bool = False, with_weights: bool = True
) -> LayerTrace:
    """A segment's layer by its index in ``Geometry.layers``, empty where it ran in no call; otherwise as ``Segment.layer``."""
    number = geometry.layers[at]
    if number in segment.layers:
        return segment.layer(number, with_scores, with_weights)
    return absent_layer(number, segment.forwards, geometry.routers[number])


def absent_layer(layer: int, forwards: ForwardTable, router: Any) -> LayerTrace:
    """A layer that ran in no call of a segment."""
    rows = forwards.num_rows
    return LayerTrace(
        layer=layer,
        expert_ids=np.zeros((rows, router.top_k), np.uint8 if router.num_experts <= 256 else np.uint16),
        count=np.zeros(rows, np.uint8),
        gate_weights=None,
        router_scores=None,
        present=np.zeros(forwards.num_forwards, bool),
        router=router,
    )


def gather_layer(layer: LayerTrace, forwards: ForwardTable, trajectory: Trajectory) -> LayerTrace:
    """A layer's rows as the trajectory orders them; ``forwards`` are the recorded ones.

    A simulated forward has the layer where the call its first row comes from had it.
    """
    if trajectory.source is None:
        return layer
    source, offsets = trajectory.source, trajectory.forwards.row_offsets
    beyond = _following_layer(layer, trajectory)
    ran = layer.present if beyond is None else np.append(layer.present, beyond.present)
    has_rows = np.diff(offsets) > 0
    present = np.zeros(len(has_rows), bool)
    if len(source):
        first = source[offsets[:-1][has_rows]]
        present[has_rows] = ran[np.searchsorted(forwards.row_offsets, first, side="right") - 1]
    return replace(
        layer,
        expert_ids=_gathered("expert_ids", layer, beyond, source),
        count=_gathered("count", layer, beyond, source),
        gate_weights=_gathered("gate_weights", layer, beyond, source),
        router_scores=_gathered("router_scores", layer, beyond, source),
        present=present,
    )


def _following_layer(layer: LayerTrace, trajectory: Trajectory) -> LayerTrace | None:
    """The layer in the call after the segment, where a trajectory takes rows of it; as the segment's own was loaded."""
    following = trajectory.following
    if following is None:
        return None
    if layer.layer not in following.layers:
        return absent_layer(layer.layer, following.forwards, layer.router)
    return following.layer(layer.layer, layer.router_scores is not None, layer.gate_weights is not None)


def _gathered(name: str, layer: LayerTrace, beyond: LayerTrace | None, source: np.ndarray) -> Any:
    """Rows ``source`` of a layer's array, of which those of ``beyond`` follow its own; None where it has none.

    A row of ``beyond`` is 0 where the layer did not run there, so that it has no such array.
    """
    own = getattr(layer, name)
    if own is None or beyond is None:
        return None if own is None else own[source]
    late, more = source >= len(own), getattr(beyond, name)
    rows = own[np.where(late, 0, source)]
    rows[late] = 0 if more is None else more[source[late] - len(own)]
    return rows


def current_block_rows(trajectory: Trajectory, block_length: int) -> np.ndarray | None:
    """Rows of the current block, bool [R]: position // block_length == the part's block.

    All rows of a part without a block count, and all rows where the trace has no positions. None where that is every row, and
    no call holds two parts.
    """
    forwards = trajectory.forwards
    single = len(forwards.block) == forwards.num_forwards
    if trajectory.position is None or block_length == 0:
        return None if single else np.ones(forwards.num_rows, bool)
    block = np.full(forwards.num_rows, -1, np.int64)
    start, stop = forwards.part_rows
    if single:
        block = np.repeat(forwards.block.astype(np.int64), stop - start)
    else:
        for n in range(len(start)):
            block[start[n] : stop[n]] = forwards.block[n]
    inside = (block < 0) | (trajectory.position // block_length == block)
    return None if single and inside.all() else inside
