"""The figures of each (forward, layer): what a selection asks for and what a placement does with it, and nothing else.

F forwards of a segment, N (forward, request) parts, L layers, C cells of a stream; every array [F, L] is filled one layer, one
column, at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simulator.policy import ExpertStream, Placement, Trajectory
from simulator.streams.routed import RoutedLayer
from simulator.streams.stream import block_unique
from simulator.tallies.counting import unique_experts
from tracer.jit import njit


@dataclass(frozen=True, slots=True)
class RoutedCells:
    """What a routing policy asks for in a segment, [F, L] each.

    ``kept`` and ``vanilla`` are gate weights of the recorded experts: those still selected, and all; NaN without weights.
    ``lower`` and ``upper`` are scenario bounds of ``unique``, see ``Trajectory.bound_rows``; None where it has none.
    """

    present: np.ndarray  # bool
    assignments: np.ndarray  # int64
    unique: np.ndarray  # int64
    in_block: np.ndarray  # int64, unique over the rows of the current block
    part_in_block: np.ndarray  # int64 [N, L], the same of each request
    kept: np.ndarray  # float64
    vanilla: np.ndarray  # float64
    lower: np.ndarray | None  # int64
    upper: np.ndarray | None  # int64

    @classmethod
    def empty(cls, trajectory: Trajectory, layers: int) -> RoutedCells:
        """Cells to be filled by :meth:`fill`."""
        shape = (trajectory.forwards.num_forwards, layers)
        counts = [np.zeros(shape, np.int64) for _ in range(5)]
        bounded = trajectory.bound_rows is not None
        return cls(
            present=np.zeros(shape, bool),
            assignments=counts[0],
            unique=counts[1],
            in_block=counts[2],
            part_in_block=np.zeros((len(trajectory.forwards.block), layers), np.int64),
            kept=np.full(shape, np.nan),
            vanilla=np.full(shape, np.nan),
            lower=counts[3] if bounded else None,
            upper=counts[4] if bounded else None,
        )

    def fill(self, at: int, routed: RoutedLayer, rows_kept: np.ndarray) -> None:
        """Fill column ``at`` from one layer.

        ``rows_kept`` int64 [256, 2] is added to: of rows with n recorded experts, how many are still selected, and rows.
        """
        view, layer, selection, stream = routed.view, routed.layer, routed.selection, routed.stream
        forwards, num_experts = view.trajectory.forwards, view.geometry.num_experts
        self.present[:, at] = layer.present
        self.unique[stream.cell_forward, at] = np.diff(stream.offsets)
        ends = np.concatenate(([0], np.cumsum(stream.tokens, dtype=np.int64)))
        self.assignments[stream.cell_forward, at] = np.diff(ends[stream.offsets])
        if view.block_rows is None:
            self.in_block[:, at] = self.part_in_block[:, at] = self.unique[:, at]
        else:
            self.in_block[:, at], self.part_in_block[:, at] = block_unique(
                selection, view.block_rows, forwards.part_rows, forwards.part_offsets, num_experts
            )
        self._retain(at, routed, rows_kept)
        if view.trajectory.bound_rows is not None and self.lower is not None and self.upper is not None:
            lower, upper = view.trajectory.bound_rows
            used = (selection.expert_ids, selection.count, lower), (layer.expert_ids, layer.count, upper)
            for column, (ids, count, rows) in zip((self.lower, self.upper), used, strict=True):
                ids = np.ascontiguousarray(ids)
                column[:, at] = unique_experts(ids, count, forwards.row_offsets, num_experts, rows)

    def _retain(self, at: int, routed: RoutedLayer, rows_kept: np.ndarray) -> None:
        layer, selection, trajectory = routed.layer, routed.selection, routed.view.trajectory
        weights, offsets = layer.gate_weights, trajectory.forwards.row_offsets
        of_kept, of_all = np.zeros((2, len(offsets) - 1))
        if selection.expert_ids is layer.expert_ids and selection.count is layer.count:
            rows = np.bincount(layer.count, minlength=len(rows_kept))
            rows_kept += np.stack((rows * np.arange(len(rows_kept)), rows), axis=1)
            if weights is not None:
                _gate_sums(layer.count, weights.astype(np.float32), offsets, of_all)
                of_kept = of_all
        else:
            _retained(
                layer.expert_ids,
                layer.count,
                np.zeros((0, 0), np.float32) if weights is None else weights.astype(np.float32),
                selection.expert_ids,
                selection.count,
                np.zeros(0, bool) if trajectory.reused is None else trajectory.reused,
                offsets,
                np.full(routed.view.geometry.num_experts, -1),
                of_kept,
                of_all,
                rows_kept,
            )
        if weights is not None:
            self.kept[:, at], self.vanilla[:, at] = of_kept, of_all


@dataclass(frozen=True, slots=True)
class PlacedCells:
    """What a residency policy does in a segment, [F, L] each, for the table of cells."""

    gpu_tokens: np.ndarray  # uint32
    gpu_experts: np.ndarray  # uint16
    hit_tokens: np.ndarray  # uint32
    hit_experts: np.ndarray  # uint16
    promotions: np.ndarray  # uint16
    demotions: np.ndarray  # uint16

    @classmethod
    def empty(cls, forwards: int, layers: int) -> PlacedCells:
        """Cells to be filled by :meth:`fill`."""
        wide, narrow = np.uint32, np.uint16
        return cls(*(np.zeros((forwards, layers), kind) for kind in (wide, narrow, wide, narrow, narrow, narrow)))

    def fill(self, stream: ExpertStream, placement: Placement, sums: np.ndarray) -> None:
        """Fill the cells of a stream, of one layer or of all; ``sums`` from :class:`PlacementTally`."""
        at = stream.cell_forward, stream.cell_layer
        columns = (*sums[:, :4].T, placement.promotions, placement.demotions)
        targets = self.gpu_tokens, self.gpu_experts, self.hit_tokens, self.hit_experts, self.promotions, self.demotions
        for target, column in zip(targets, columns, strict=True):
            target[at] = column


@njit
def _gate_sums(count, weights, row_offsets, sums):
    """Gate weight of the real slots of each forward."""
    for f in range(len(sums)):
        total = 0.0
        for t in range(row_offsets[f], row_offsets[f + 1]):
            for k in range(count[t]):
                total += weights[t, k]
        sums[f] = total


@njit
def _retained(ids, count, weights, new_ids, new_count, reused, row_offsets, selected, of_kept, of_all, rows_kept):
    """Recorded experts that are still selected (all of a reused row): their gate weight by forward, their number by row.

    ``rows_kept`` int64 [256, 2]: by recorded experts of a row, those still selected and rows. ``selected`` int64 [E], all -1,
    is working memory. No weights: an empty array.
    """
    weighted = len(weights) > 0
    for f in range(len(row_offsets) - 1):
        kept_weight, whole_weight = 0.0, 0.0
        for t in range(row_offsets[f], row_offsets[f + 1]):
            for k in range(new_count[t]):
                selected[new_ids[t, k]] = t
            whole = len(reused) > 0 and reused[t]
            kept = 0
            for k in range(count[t]):
                still = whole or selected[ids[t, k]] == t
                kept += still
                if weighted:
                    weight = np.float64(weights[t, k])
                    whole_weight += weight
                    kept_weight += weight * np.float64(still)
            rows_kept[count[t], 0] += kept
            rows_kept[count[t], 1] += 1
        of_kept[f], of_all[f] = kept_weight, whole_weight
