"""The figures of a run that do not depend on residency, added up segment by segment.

Source of the metrics: arXiv 2605.30876 (dMoE) for unique experts a request, arXiv 2602.08404 (TEAM) for tokens a forward,
Denning (1968) for working sets.
"""

from __future__ import annotations

import math
from collections import defaultdict
from fractions import Fraction
from itertools import groupby
from typing import Any

import numpy as np

from simulator.policy import Geometry
from simulator.streams.routed import RoutedLayer, View
from simulator.tallies.cells import RoutedCells
from simulator.tallies.working_set import WorkingSets
from simulator.walk import Watcher
from tracer.jit import njit
from tracer.schema import COMMIT, DENOISE, KINDS

# Two-sided 95% quantile of the normal distribution.
NORMAL_95 = 1.959963984540054


class RoutingTally(Watcher):
    """Sums over a run of what its trajectory and selections ask for; shared by all residencies.

    ``cells`` are those of the segment under way.
    """

    cells: RoutedCells

    def __init__(self, geometry: Geometry) -> None:
        self.num_experts = geometry.num_experts
        self.sizes = np.array([geometry.expert_bytes[layer] for layer in geometry.layers], np.int64)
        self.forwards = np.zeros(len(KINDS), np.int64)
        self.accepted = np.zeros(len(KINDS), np.int64)
        self.accepted_known = True
        # By kind: cells, unique experts, unique experts of the current block, assignments.
        self.of_kind = np.zeros((len(KINDS), 4), np.int64)
        self.working_set = 0
        self.kept = self.vanilla = 0.0
        self.has_weights = False
        # Request and requests of the call: denoise cells, unique experts of its calls, unique experts of its own current block.
        self.requests: dict[tuple[int, int], np.ndarray] = defaultdict(lambda: np.zeros(3, np.int64))
        self.bound_cells = np.zeros(3, np.int64)
        self.token_bounds: np.ndarray | None = None
        layers = len(geometry.layers)
        self.working_sets = WorkingSets(layers, geometry.num_experts)
        # By recorded experts of a row: those still selected, and rows.
        self.rows_kept = np.zeros((layers, 256, 2), np.int64)
        # Of denoise cells with tokens: sum of largest over mean load, and cells.
        self.skew = np.zeros((layers, 2))

    def begin(self, view: View) -> None:
        """Make room for a segment's cells."""
        self._view = view
        self.cells = RoutedCells.empty(view.trajectory, len(self.sizes))

    def layer(self, at: int, routed: RoutedLayer) -> None:
        """Fill column ``at`` of the cells and add up what needs no cells."""
        stream = routed.stream
        self.cells.fill(at, routed, self.rows_kept[at])
        self.working_sets.add(at, stream.offsets, stream.experts)
        denoise = self._view.trajectory.forwards.forward_kind[stream.cell_forward] == DENOISE
        _add_skew(stream.offsets, stream.tokens, denoise, self.num_experts, self.skew[at])

    def end(self) -> None:
        """Add the segment's cells."""
        trajectory, cells = self._view.trajectory, self.cells
        forwards = trajectory.forwards
        kind = forwards.forward_kind if forwards.num_forwards else np.zeros(0, np.uint8)
        self.forwards += np.bincount(kind, minlength=len(KINDS))
        np.add.at(self.accepted, forwards.kind, np.maximum(forwards.num_accepted, 0))
        self.accepted_known &= bool((forwards.num_accepted[forwards.kind == DENOISE] >= 0).all())
        for column, values in enumerate((cells.present, cells.unique, cells.in_block, cells.assignments)):
            np.add.at(self.of_kind[:, column], kind, values.sum(axis=1))
        self.working_set += int((cells.unique @ self.sizes).sum())
        if not np.isnan(cells.vanilla).all():
            self.has_weights = True
            self.kept += float(np.nansum(cells.kept))
            self.vanilla += float(np.nansum(cells.vanilla))
        of_part = forwards.part_forward
        rows = np.stack(
            [cells.present.sum(axis=1)[of_part], cells.unique.sum(axis=1)[of_part], cells.part_in_block.sum(axis=1)],
            axis=1,
        )
        denoise = forwards.kind == DENOISE
        together = np.diff(forwards.part_offsets)[of_part]
        pairs = np.stack((forwards.request_id[denoise].astype(np.int64), together[denoise]), axis=1)
        names, at = np.unique(pairs, axis=0, return_inverse=True)
        sums = np.zeros((len(names), 3), np.int64)
        np.add.at(sums, at, rows[denoise])
        for (request, number), row in zip(names.tolist(), sums, strict=True):
            self.requests[request, number] += row
        if cells.lower is not None and cells.upper is not None:
            of_denoise = kind == DENOISE
            for column, values in enumerate((cells.present, cells.lower, cells.upper)):
                self.bound_cells[column] += values[of_denoise].sum()
        if trajectory.bounds is not None:
            found = np.array([trajectory.bounds["accepted"], trajectory.bounds["denoise_forwards"]], np.int64)
            self.token_bounds = found if self.token_bounds is None else self.token_bounds + found

    def result(self) -> dict[str, Any]:
        """The keys of a summary that do not depend on residency."""
        of_denoise, of_all = self.of_kind[DENOISE], self.of_kind.sum(axis=0)
        denoise = int(self.forwards[DENOISE])
        accepted = int(self.accepted[DENOISE])
        own, shares = self._of_requests()
        return {
            "forwards": int(self.forwards.sum()),
            "denoise_forwards": denoise,
            "unique_experts": ratio(of_denoise[1], of_denoise[0]),
            "unique_experts_block": ratio(of_denoise[2], of_denoise[0]),
            "unique_experts_all_forwards": ratio(of_all[1], of_all[0]),
            "unique_experts_block_all_forwards": ratio(of_all[2], of_all[0]),
            "unique_experts_per_request": ratio(math.fsum(block / cells for cells, block in own), len(own)),
            "unique_experts_ci95": _interval(shares, ratio(of_denoise[1], of_denoise[0])),
            "tokens_per_forward": ratio(accepted, denoise) if self.accepted_known else None,
            "tokens_per_forward_with_commit": (
                ratio(accepted, denoise + int(self.forwards[COMMIT])) if self.accepted_known else None
            ),
            "assignments": int(of_all[3]),
            "working_set_bytes": ratio(self.working_set, int(self.forwards.sum())),
            "gate_retained": (ratio(self.kept, self.vanilla) if self.vanilla else 1.0) if self.has_weights else None,
            "experts_retained": self._experts_retained(),
            "load_skew": ratio(math.fsum(self.skew[:, 0].tolist()), self.skew[:, 1].sum()),
            "working_set_experts": self.working_sets.means(),
        }

    @property
    def all_accepted(self) -> int:
        """Tokens that forwards of every kind accepted; 0 where that is not known."""
        return int(self.accepted.sum()) if self.accepted_known else 0

    def _of_requests(self) -> tuple[list[tuple[int, int]], np.ndarray]:
        """Of each request with denoise cells: their number and the unique experts of its block in them; its share of them.

        The share, float64 [requests, 2], is cells and unique experts of calls, of each of which its requests get the same part.
        """
        own, shares = [], []
        for _, found in groupby(sorted(self.requests.items()), key=lambda item: item[0][0]):
            rows = [(number, *row.tolist()) for (_, number), row in found]
            cells, block = (sum(row[at] for row in rows) for at in (1, 3))
            if cells:
                own.append((cells, block))
                shares.append([float(sum(Fraction(row[at], row[0]) for row in rows)) for at in (1, 2)])
        return own, np.array(shares, np.float64).reshape(-1, 2)

    def _experts_retained(self) -> float | None:
        """Mean share of a row's recorded experts that are still selected, over layers and rows with any."""
        kept, rows = self.rows_kept.sum(axis=0)[1:].T.tolist()
        shares = sum((Fraction(n, size) for size, n in enumerate(kept, start=1) if n), Fraction(0))
        return float(shares / sum(rows)) if any(rows) else None

    def bounds(self) -> dict[str, Any] | None:
        """Scenario bounds of tokens a forward and unique experts, or None."""
        if self.token_bounds is None and not self.bound_cells[0]:
            return None
        tokens = None
        if self.token_bounds is not None:
            tokens = [ratio(*pair) for pair in self.token_bounds.T]
        experts = [ratio(n, self.bound_cells[0]) for n in self.bound_cells[1:]] if self.bound_cells[0] else None
        return {"tokens_per_forward": tokens, "unique_experts": experts}


def ratio(part: float, whole: float) -> float | None:
    """A quotient as a plain float; None where nothing is divided by."""
    return float(part) / float(whole) if whole else None


def _interval(requests: np.ndarray, mean: float | None) -> list[float] | None:
    """95% interval of unique experts over requests: normal approximation of a ratio of sums (linearised variance).

    Parameters
    ----------
    requests : np.ndarray
        float64 [requests, 2]: cells and unique experts. None is returned for fewer than two.
    mean : float, optional
        The ratio of their sums.
    """
    if len(requests) < 2 or mean is None:
        return None
    cells, unique = requests.T
    spread = ((unique - mean * cells) ** 2).sum() / (len(requests) - 1)
    error = NORMAL_95 * math.sqrt(spread / len(requests)) / cells.mean()
    return [float(mean - error), float(mean + error)]


@njit
def _add_skew(offsets, tokens, counted, num_experts, skew):
    """Add largest over mean load, of all experts, of every counted cell with tokens; and the number of such cells."""
    for c in range(len(counted)):
        if not counted[c]:
            continue
        total, most = np.int64(0), np.int64(0)
        for i in range(offsets[c], offsets[c + 1]):
            total += tokens[i]
            most = max(most, np.int64(tokens[i]))
        if total > 0:
            skew[0] += most * num_experts / total
            skew[1] += 1
