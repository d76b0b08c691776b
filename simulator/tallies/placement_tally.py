"""The figures of a run that depend on residency, added up segment by segment: hits, moves, bytes and estimated seconds.

Source of the metrics: arXiv 2605.20179 (TIDE) for hit rates, also by lag since the last refresh, bytes moved, refreshes with
fewer active experts than the budget, and GPU tokens a promotion ("promotion utilisation").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from simulator.cost import PARTS, CostModel
from simulator.policy import ExpertStream, Geometry, Placement
from simulator.tallies.cells import PlacedCells
from simulator.tallies.exact_sum import ExactSums
from simulator.tallies.summary import ratio
from tracer.errors import UserError
from tracer.jit import njit
from tracer.schema import KINDS
from tracer.trace import ForwardTable

# Hit rates by lag are kept for this many forwards of a layer since its last refresh.
LAGS = 64

# For what a placement does not say.
NO_COUNTS, NO_FLAGS = np.zeros(0, np.int64), np.zeros(0, np.bool_)

TOTALS = ("gpu_tokens", "hit_tokens", "promotions", "demotions", "copied_back", "hit_experts", "lookups")
GPU_TOKENS, HIT_TOKENS, PROMOTIONS, DEMOTIONS, COPIED_BACK, HIT_EXPERTS, LOOKUPS = range(len(TOTALS))


class PlacementTally:
    """Sums over a run of what a residency policy does with it. L layers.

    A segment is :meth:`begin`, :meth:`serve` of every stream, side by side where streams are single layers, :meth:`end`.
    """

    def __init__(self, geometry: Geometry, scope: str, costs: Sequence[CostModel] = (), staged: bool = False) -> None:
        layers = len(geometry.layers)
        self.sizes = np.array([geometry.expert_bytes[layer] for layer in geometry.layers], np.int64)
        self.scope, self.staged = scope, staged
        self.costs = costs
        self.totals = np.zeros((layers, len(KINDS), len(TOTALS)), np.int64)
        self.held = np.zeros(layers, np.int64)
        # Forwards: dense, and everything as the machine orders it. Cells, by layer or over all: the other parts.
        self.seconds = [ExactSums(2) for _ in costs]
        self.parts = [[ExactSums(len(PARTS) - 1) for _ in costs] for _ in range(layers)]
        # Forwards of the layer since its last refresh, -1 before the first; refreshes, and those with A < B.
        self.lag = np.full(layers, -1, np.int64)
        self.refreshes = np.zeros((layers, 2), np.int64)
        self.by_lag = np.zeros((layers, LAGS, 2), np.int64)

    def begin(self, forwards: ForwardTable, keep_cells: bool) -> None:
        """Make room for a segment; ``cells`` are filled where they are kept."""
        shape = forwards.num_forwards, len(self.sizes)
        self._forwards, self._kind = forwards, forwards.forward_kind
        self._layer_seconds = [np.zeros(shape) for _ in self.costs]
        self.cells = PlacedCells.empty(*shape) if keep_cells else None

    def serve(self, stream: ExpertStream, placement: Placement, policy: str) -> None:
        """Add a stream, of one layer or of all.

        Raises
        ------
        UserError
            The placement does not answer every entry and cell of the stream.
        """
        sums = self._sums(stream, placement, policy)
        if self.cells is not None:
            self.cells.fill(stream, placement, sums)
        first = int(stream.cell_layer[0]) if len(stream.cell_layer) else 0
        for seconds, parts, cost in zip(self._layer_seconds, self.parts[first], self.costs, strict=True):
            of_cells = cost.cell_seconds(stream, placement, self.sizes[stream.cell_layer])
            seconds[stream.cell_forward, stream.cell_layer] = cost.layer_seconds(of_cells)
            parts.add(of_cells)

    def _sums(self, stream: ExpertStream, placement: Placement, policy: str) -> np.ndarray:
        """Add to all totals but seconds; gives gpu_tokens, gpu_experts, hit_tokens, hit_experts and tokens, int64 [C, 5]."""
        number, lookups = len(stream.cell_forward), len(stream.experts)
        hit, on_gpu, held, refreshed = placement.hit, placement.on_gpu, placement.resident_bytes, placement.refreshed
        moved = placement.promotions, placement.demotions, placement.copied_back, placement.resident
        lengths = {
            *map(len, moved),
            number if held is None else len(held),
            number if refreshed is None else len(refreshed),
        }
        if lengths != {number} or not len(hit) == len(on_gpu) == lookups:
            raise UserError(
                f"The residency policy {policy} did not answer {lookups} lookups and {number} cells; "
                "return one hit and one place a lookup, and one count a cell."
            )
        sums = np.empty((number, 5), np.int64)
        _add_cells(
            self._kind,
            self.sizes,
            stream.cell_forward,
            stream.cell_layer,
            stream.offsets,
            stream.tokens,
            np.ascontiguousarray(hit, np.bool_),
            np.ascontiguousarray(on_gpu, np.bool_),
            *(np.ascontiguousarray(counts, np.int64) for counts in moved),
            NO_COUNTS if held is None else np.ascontiguousarray(held, np.int64),
            NO_FLAGS if refreshed is None else np.ascontiguousarray(refreshed, np.bool_),
            sums,
            self.totals,
            self.held,
            self.lag,
            self.refreshes,
            self.by_lag,
        )
        return sums

    def end(self) -> None:
        """Add up the seconds of a segment's forwards."""
        for total, cost, seconds in zip(self.seconds, self.costs, self._layer_seconds, strict=True):
            dense = cost.dense_seconds(self._forwards)
            total.add(np.column_stack((dense, dense + seconds.sum(axis=1))))

    def summary(self, assignments: int) -> dict[str, Any]:
        """The keys that depend on residency but not on hardware."""
        of_layer = self.totals.sum(axis=1)
        total = [int(n) for n in of_layer.sum(axis=0)]
        of_kind = self.totals.sum(axis=0)
        gpu, promotions = total[GPU_TOKENS], total[PROMOTIONS]
        refreshes, surplus = self.refreshes.sum(axis=0).tolist()
        return {
            "gpu_tokens": gpu,
            "cpu_tokens": assignments - gpu,
            "promotions": promotions,
            "demotions": total[DEMOTIONS],
            "hit_rate": ratio(total[HIT_TOKENS], assignments),
            "expert_hit_rate": ratio(total[HIT_EXPERTS], total[LOOKUPS]),
            "expert_hit_rate_by_kind": {
                name: ratio(row[HIT_EXPERTS], row[LOOKUPS])
                for name, row in zip(KINDS, of_kind, strict=True)
                if row[LOOKUPS]
            },
            "bytes_to_gpu": int(of_layer[:, PROMOTIONS] @ self.sizes),
            "bytes_to_host": int(of_layer[:, COPIED_BACK] @ self.sizes),
            "resident_bytes": self.resident_bytes,
            "staging_bytes": self.staging_bytes,
            "gpu_tokens_per_promotion": ratio(gpu, promotions),
            "refreshes": refreshes if refreshes else None,
            "surplus_refreshes": ratio(surplus, refreshes),
            "hit_rate_by_lag": self._by_lag() if refreshes else None,
        }

    def _by_lag(self) -> list[float | None] | None:
        """Share of tokens that hit, by forwards of the layer since its last refresh; None without tokens."""
        of_lag = self.by_lag.sum(axis=0)
        seen = np.flatnonzero(of_lag[:, 1])
        return [ratio(*row) for row in of_lag[: seen[-1] + 1]] if len(seen) else None

    @property
    def resident_bytes(self) -> int:
        """What was held at most: every layer's slots are its own and add up, one cache over all layers has one most."""
        return int(self.held.max() if self.scope == "global" else self.held.sum())

    @property
    def staging_bytes(self) -> int:
        """Of the slot that missing experts pass through: the largest fetched; 0 where none is, or they are loaded in place."""
        fetched = self.totals[..., PROMOTIONS].any(axis=1)
        return int(self.sizes[fetched].max(initial=0)) if self.staged else 0

    def latency(self, priced: CostModel | None, accepted: int) -> dict[str, Any]:
        """The latency keys on one of the cost models; all null without one."""
        if priced is None:
            return {"latency_s": None, "latency": None, "tokens_per_s": None}
        cost = self.costs.index(priced)
        dense, total = self.seconds[cost].totals()
        # Partial sums, so that it does not show which layers were served together.
        of_layers = zip(*(parts[cost].partials() for parts in self.parts), strict=True)
        parts = [dense, *(math.fsum(chain(*of_part)) for of_part in of_layers)]
        return {
            "latency_s": total,
            "latency": dict(zip(PARTS, parts, strict=True)),
            "tokens_per_s": ratio(accepted, total) if accepted else None,
        }


@njit
def _add_cells(
    kinds,
    sizes,
    cell_forward,
    cell_layer,
    offsets,
    tokens,
    hit,
    on_gpu,
    promotions,
    demotions,
    copied_back,
    resident,
    resident_bytes,
    refreshed,
    sums,
    totals,
    held,
    lag,
    refreshes,
    by_lag,
):
    """Fill ``sums`` [C, 5] and add to all else: ``totals`` [L, kinds, 7] as in ``TOTALS``, the most bytes held [L], refreshes.

    No ``resident_bytes``: the resident experts' own. No ``refreshed``: the policy has no refreshes.
    """
    for c in range(len(cell_forward)):
        at = cell_layer[c]
        start, stop = offsets[c], offsets[c + 1]
        of_gpu = experts_gpu = of_hits = experts_hit = every = np.int64(0)
        for i in range(start, stop):
            there, found, load = np.int64(on_gpu[i]), np.int64(hit[i]), np.int64(tokens[i])
            of_gpu += there * load
            experts_gpu += there
            of_hits += found * load
            experts_hit += found
            every += load
        sums[c, 0], sums[c, 1], sums[c, 2], sums[c, 3], sums[c, 4] = of_gpu, experts_gpu, of_hits, experts_hit, every
        row = totals[at, kinds[cell_forward[c]]]
        row[0] += of_gpu
        row[1] += of_hits
        row[2] += promotions[c]
        row[3] += demotions[c]
        row[4] += copied_back[c]
        row[5] += experts_hit
        row[6] += stop - start
        bytes_held = resident_bytes[c] if len(resident_bytes) else resident[c] * sizes[at]
        held[at] = max(held[at], bytes_held)
        if len(refreshed) == 0:
            continue
        if refreshed[c]:
            refreshes[at, 0] += 1
            # Fewer active experts than the budget.
            refreshes[at, 1] += stop - start < resident[c]
            lag[at] = 0
        elif lag[at] >= 0:
            lag[at] += 1
        # Tokens by the forwards of the layer since its last refresh.
        if lag[at] >= 0 and lag[at] < by_lag.shape[1]:
            by_lag[at, lag[at], 0] += of_hits
            by_lag[at, lag[at], 1] += every
