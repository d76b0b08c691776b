"""What the program for TIDE's interval measures: replays at every interval, and how wanted experts change from step to step.

Source: arXiv 2605.20179 (TIDE); see ``interval.py`` for what is measured and why.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.caching.tide_grid import rank_cells
from simulator.cost import CostModel
from simulator.policy import ExpertStream, Geometry, Placement
from simulator.residency.tide import Tide
from simulator.streams.routed import RoutedLayer, View
from simulator.walk import Watcher
from tracer.jit import njit
from tracer.schema import DENOISE
from tracer.trace import ForwardTable


class IntervalCells(Watcher):
    """Sums over a trace, brought on segment by segment. L layers, I intervals; the first of the replays is that at 1."""

    # Seconds are added up in the order of entries.
    ordered = True

    def __init__(
        self, geometry: Geometry, cost: CostModel, budget: int, copy_back: bool, intervals: tuple[int, ...]
    ) -> None:
        self.geometry, self.cost = geometry, cost
        self.budget, self.copy_back, self.intervals = budget, copy_back, intervals
        self.policies = [Tide(budget=budget, refresh_interval=tau, copy_back=copy_back) for tau in (1, *intervals)]
        layers, replays = len(geometry.layers), len(intervals)
        self.states = [[policy.start(geometry, at) for policy in self.policies] for at in range(layers)]
        self.tokens, self.lookups = np.zeros(layers, np.int64), np.zeros(layers, np.int64)
        self.hit_tokens, self.hit_experts = (np.zeros((layers, replays), np.int64) for _ in range(2))
        self.promotions = np.zeros((layers, replays), np.int64)
        # Over the measured cells; misses at 1 first.
        self.misses = np.zeros((layers, 1 + replays), np.int64)
        self.measured, self.surplus = np.zeros(layers, np.int64), np.zeros(layers, np.int64)
        self.pairs, self.changed = np.zeros(layers, np.int64), np.zeros(layers, np.int64)
        # Misses of all intervals by the expert's tokens.
        self.missed_tokens = [np.zeros(0, np.int64) for _ in range(layers)]
        self.seconds: list[list[float]] = [[] for _ in intervals]

    def begin(self, view: View) -> None:
        """A segment starts."""
        self._forwards = view.trajectory.forwards
        self._measured = measured_calls(self._forwards, self.geometry.first_block)
        self._before = step_before(self._forwards, self._measured)
        # Seconds of a layer, float64 [L, I, F].
        self._layers = np.zeros((len(self.geometry.layers), len(self.intervals), self._forwards.num_forwards))

    def end(self) -> None:
        """Add up a segment's calls: everything but experts, and the layers one after the other."""
        dense = self.cost.dense_seconds(self._forwards)
        for i in range(len(self.intervals)):
            self.seconds[i] += (dense + np.ascontiguousarray(self._layers[:, i].T).sum(axis=1)).tolist()

    def move_seconds(self, expert_bytes: int) -> float:
        """C_io: what moving one expert in takes, and with ``copy_back`` one out."""
        nothing = np.zeros(0, np.int64)
        stream = ExpertStream(*(np.zeros(n, np.int64) for n in (1, 1, 2, 0, 0, 0)))
        one, back = np.ones(1, np.int64), np.full(1, int(self.copy_back))
        placement = Placement(nothing > 0, nothing > 0, one, one, back, one)
        return float(self.cost.cell_seconds(stream, placement, np.array([expert_bytes], np.int64))[0, :2].sum())

    def layer(self, at: int, routed: RoutedLayer) -> None:
        """Replay a layer at every interval."""
        stream, forwards, measured = routed.stream, self._forwards, self._measured
        sizes = np.diff(stream.offsets)
        of_cell = measured[stream.cell_forward]
        of_entry = np.repeat(of_cell, sizes)
        self.tokens[at] += int(stream.tokens.sum(dtype=np.int64))
        self.lookups[at] += len(stream.experts)
        self.measured[at] += int(of_cell.sum())
        self.surplus[at] += int((sizes[of_cell] < self.budget).sum())
        self._drift(at, stream, self._before)
        expert_bytes = np.full(len(sizes), self.geometry.expert_bytes[self.geometry.layers[at]], np.int64)
        seconds = self._layers[at]
        times_missed = np.zeros(len(stream.experts), np.int64)
        for n, policy in enumerate(self.policies):
            placement, self.states[at][n] = policy.place(stream, forwards, self.geometry, self.states[at][n])
            missed = ~placement.hit & of_entry
            self.misses[at, n] += int(missed.sum())
            if n == 0:
                continue
            times_missed += missed
            self.hit_tokens[at, n - 1] += int(stream.tokens[placement.hit].sum(dtype=np.int64))
            self.hit_experts[at, n - 1] += int(placement.hit.sum())
            self.promotions[at, n - 1] += int(placement.promotions.sum())
            of_parts = self.cost.cell_seconds(stream, placement, expert_bytes)
            seconds[n - 1, stream.cell_forward] = self.cost.layer_seconds(of_parts)
        self._count_missed(at, stream.tokens, times_missed)

    def _drift(self, at: int, stream: ExpertStream, before: np.ndarray) -> None:
        """Count the wanted experts of measured cells that the step before did not want, where there is one."""
        cell_of_call = np.full(len(before) + 1, -1, np.int64)
        cell_of_call[stream.cell_forward] = np.arange(len(stream.cell_forward))
        earlier = cell_of_call[before[stream.cell_forward]]
        experts, tokens = stream.experts.copy(), stream.tokens.copy()
        everywhere = np.ones(len(earlier), bool)
        rank_cells(stream.offsets, everywhere, self.geometry.num_experts, experts, tokens)
        self.pairs[at] += int((earlier >= 0).sum())
        self.changed[at] += _changed(stream.offsets, experts, earlier, self.budget, self.geometry.num_experts)

    def _count_missed(self, at: int, tokens: np.ndarray, times: np.ndarray) -> None:
        counted = np.bincount(tokens, weights=times).astype(np.int64)
        kept = self.missed_tokens[at]
        longer, shorter = (counted, kept) if len(counted) > len(kept) else (kept, counted)
        longer[: len(shorter)] += shorter
        self.missed_tokens[at] = longer


def measured_calls(forwards: ForwardTable, first_block: dict[int, int]) -> np.ndarray:
    """Denoise calls in which no request is in its first block, bool [F]."""
    requests, of_part = np.unique(forwards.request_id, return_inverse=True)
    first = np.array([first_block.get(int(r), -1) for r in requests], np.int64)[of_part.reshape(-1)]
    later = (forwards.kind == DENOISE) & ~((first >= 0) & (forwards.block == first))
    if not len(later):
        return later
    return np.logical_and.reduceat(later, forwards.part_offsets[:-1])


def step_before(forwards: ForwardTable, measured: np.ndarray) -> np.ndarray:
    """The measured call that made the step before in the same block, int64 [F]; -1 without one, and for calls not measured.

    A call of several requests goes by its first.
    """
    before = np.full(forwards.num_forwards, -1, np.int64)
    first_part = forwards.part_offsets[:-1]
    columns: Any = zip(*(a[first_part].tolist() for a in (forwards.request_id, forwards.block, forwards.step)))
    last: dict[tuple[int, int], tuple[int, int]] = {}
    for call, (request, block, step) in enumerate(columns):
        if measured[call]:
            found, earlier = last.get((request, block), (-1, -2))
            before[call] = found if earlier == step - 1 else -1
            last[request, block] = call, step
    return before


@njit
def _changed(offsets, experts, earlier, budget, num_experts):
    """Wanted experts (the first ``budget`` of a ranked cell) that the earlier cell did not want, over cells that have one."""
    wanted = np.full(num_experts, -1, np.int64)
    changed = np.int64(0)
    for c in range(len(earlier)):
        p = earlier[c]
        if p < 0:
            continue
        for i in range(offsets[p], min(offsets[p] + budget, offsets[p + 1])):
            wanted[experts[i]] = c
        for i in range(offsets[c], min(offsets[c] + budget, offsets[c + 1])):
            changed += np.int64(wanted[experts[i]] != c)
    return changed
