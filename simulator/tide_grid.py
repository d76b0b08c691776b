"""TIDE at every refresh interval and every budget in one pass over a trace, each cell equal to a replay of its own.

Source: arXiv 2605.20179 and its released code (github ims-kdks/TIDE), rules as in ``residency/tide.py``. One pass is enough
because the resident sets of all budgets form a chain: one order of the experts holds them all, its first B being the set of
budget B.

* It starts as 0, 1, 2, ..
* A refresh with A active experts puts these first, by load. At a budget B > A the set keeps B - A of its inactive experts, the
  highest ids of them. From B - 1 to B the old set gains one expert, so the new one gains the highest id not yet kept: the sets
  form a chain again.

An expert's place in the order says at which budgets it hits, so a cell costs one addition an expert, whatever the budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from simulator.policy import ExpertStream, Geometry
from simulator.residency.tide import refreshes
from simulator.streams.gather import geometry_of
from simulator.streams.recorded import serve_recorded
from tracer.errors import UserError
from tracer.jit import njit
from tracer.trace import ForwardTable

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True, slots=True)
class TideGrid:
    """Totals of TIDE over a trace. L layers, I intervals; the last axis is the budget in experts per layer, 0 to E."""

    intervals: tuple[int, ...]
    expert_bytes: np.ndarray  # int64 [L]
    tokens: np.ndarray  # int64 [L], (row, expert) pairs
    lookups: np.ndarray  # int64 [L], distinct experts of each forward
    gpu_tokens: np.ndarray  # int64 [L, I, E + 1]
    gpu_experts: np.ndarray  # int64 [L, I, E + 1]
    promotions: np.ndarray  # int64 [L, I, E + 1]; as many demotions
    refreshes: np.ndarray  # int64 [L, I], refreshes with any active expert
    surplus: np.ndarray  # int64 [L, I, E + 1], refreshes with fewer active experts than the budget

    @property
    def cpu_tokens(self) -> np.ndarray:
        """int64 [L, I, E + 1]."""
        return self.tokens[:, None, None] - self.gpu_tokens

    @property
    def cpu_experts(self) -> np.ndarray:
        """int64 [L, I, E + 1]."""
        return self.lookups[:, None, None] - self.gpu_experts

    def frame(self) -> pl.DataFrame:
        """One row per (refresh_interval, budget), summed over layers that all have this budget.

        ``bytes_to_gpu`` are promoted bytes; ``surplus_share`` is the share of refreshes with fewer active experts than the
        budget, where the order of demotion matters. Rates are null for an empty trace.
        """
        import polars as pl

        budgets = self.gpu_tokens.shape[2]
        tokens, lookups = int(self.tokens.sum()), int(self.lookups.sum())
        of_interval = pl.Series("refreshes", np.repeat(self.refreshes.sum(axis=0), budgets))
        columns = {
            "refresh_interval": np.repeat(np.array(self.intervals, np.int64), budgets),
            "budget": np.tile(np.arange(budgets, dtype=np.int64), len(self.intervals)),
            "gpu_tokens": self.gpu_tokens.sum(axis=0).ravel(),
            "cpu_tokens": self.cpu_tokens.sum(axis=0).ravel(),
            "gpu_experts": self.gpu_experts.sum(axis=0).ravel(),
            "cpu_experts": self.cpu_experts.sum(axis=0).ravel(),
            "promotions": self.promotions.sum(axis=0).ravel(),
            "bytes_to_gpu": (self.promotions * self.expert_bytes[:, None, None]).sum(axis=0).ravel(),
            "surplus": self.surplus.sum(axis=0).ravel(),
        }
        return pl.DataFrame(columns).with_columns(
            hit_rate=pl.col("gpu_tokens") / tokens if tokens else pl.lit(None, pl.Float64),
            expert_hit_rate=pl.col("gpu_experts") / lookups if lookups else pl.lit(None, pl.Float64),
            surplus_share=pl.when(of_interval > 0).then(pl.col("surplus") / of_interval),
        )


def tide_grid(
    trace: Any,
    intervals: Sequence[int] = tuple(range(1, 32)),
    progress: Callable[[int, int | None], None] | None = None,
) -> TideGrid:
    """Replay TIDE on a trace's recorded experts at every interval and every budget.

    Parameters
    ----------
    trace
        An opened trace.
    intervals : sequence of int
        Refresh intervals, distinct, 1 or more each.
    progress : callable, optional
        ``progress(done, total)`` after every segment, in model calls; ``total`` is None where the trace does not know it.

    Raises
    ------
    UserError
        No interval, one below 1, or one given twice.
    """
    wanted = tuple(int(interval) for interval in intervals)
    if not wanted or min(wanted) < 1 or len(set(wanted)) < len(wanted):
        raise UserError(f"intervals={list(wanted)} are no refresh intervals; give distinct numbers of 1 or more.")
    geometry = geometry_of(trace)
    grid = GridState(geometry, wanted)
    calls, done = getattr(trace, "num_forwards", None), 0
    for forwards, _ in serve_recorded(trace, grid.begin, weights=False, ordered=False):
        done += forwards.num_forwards
        if progress is not None:
            progress(done, None if calls is None else int(calls))
    return grid.result()


class GridState:
    """Orders and totals of every layer between segments; intervals that have refreshed alike so far share theirs."""

    def __init__(self, geometry: Geometry, intervals: tuple[int, ...]) -> None:
        self.geometry, self.intervals = geometry, intervals
        layers, experts = len(geometry.layers), geometry.num_experts
        self.decoded: dict[int, int] = {}
        self.group = np.zeros(len(intervals), np.int64)
        self.order = np.tile(np.arange(experts, dtype=np.uint16), (layers, 1, 1))
        # By place in the order: tokens, experts, promotions; and by active experts: refreshes.
        self.totals = np.zeros((layers, 1, 4, experts + 1), np.int64)
        self.tokens = np.zeros(layers, np.int64)
        self.lookups = np.zeros(layers, np.int64)

    def begin(self, forwards: ForwardTable) -> Callable[[int, ExpertStream], None]:
        """Split groups whose intervals refresh differently in this segment; give what serves a layer of it."""
        after = self.decoded
        flags = []
        for interval in self.intervals:
            after = dict(self.decoded)
            flags.append(refreshes(forwards, self.geometry.first_block, interval, after))
        self.decoded = after
        keys = np.column_stack((self.group, np.array(flags)))
        kept, self.group = np.unique(keys, axis=0, return_inverse=True)
        self.group = self.group.reshape(-1)
        before = kept[:, 0].astype(np.int64)
        self.order, self.totals = np.take(self.order, before, axis=1), np.take(self.totals, before, axis=1)
        refresh = kept[:, 1:].astype(bool)

        def serve(at: int, stream: ExpertStream) -> None:
            experts, tokens = stream.experts.copy(), stream.tokens.copy()
            of_cell = np.ascontiguousarray(refresh[:, stream.cell_forward])
            rank_cells(stream.offsets, of_cell.any(axis=0), self.geometry.num_experts, experts, tokens)
            _serve(stream.offsets, experts, tokens, of_cell, self.order[at], self.totals[at])
            self.tokens[at] += int(tokens.sum(dtype=np.int64))
            self.lookups[at] += len(experts)

        return serve

    def result(self) -> TideGrid:
        """Everything served so far."""
        of_interval = self.totals[:, self.group]
        # What stands at places 0 to B - 1 is resident at budget B.
        below = np.zeros_like(of_interval)
        np.cumsum(of_interval[..., :-1], axis=-1, out=below[..., 1:])
        return TideGrid(
            intervals=self.intervals,
            expert_bytes=np.array([self.geometry.expert_bytes[layer] for layer in self.geometry.layers], np.int64),
            tokens=self.tokens.copy(),
            lookups=self.lookups.copy(),
            gpu_tokens=below[:, :, 0],
            gpu_experts=below[:, :, 1],
            promotions=below[:, :, 2],
            refreshes=of_interval[:, :, 3].sum(axis=-1),
            surplus=below[:, :, 3],
        )


@njit
def rank_cells(offsets, ranked, num_experts, experts, tokens):
    """Order the entries of every ranked cell by descending tokens, ties to the lowest id, in place."""
    load = np.zeros(num_experts, np.int64)
    largest = np.int64(0)
    for i in range(len(tokens)):
        largest = max(largest, np.int64(tokens[i]))
    start = np.zeros(largest + 2, np.int64)
    for c in range(len(offsets) - 1):
        first, stop = offsets[c], offsets[c + 1]
        if not ranked[c] or stop == first:
            continue
        most = np.int64(0)
        for i in range(first, stop):
            load[experts[i]] = tokens[i]
            most = max(most, np.int64(tokens[i]))
            start[tokens[i]] += 1
        # From how many have each load to where those of that load begin.
        at = first
        for n in range(most, 0, -1):
            start[n], at = at, at + start[n]
        for e in range(num_experts):
            n = load[e]
            if n > 0:
                experts[start[n]] = e
                tokens[start[n]] = n
                start[n] += 1
                load[e] = 0
        start[: most + 1] = 0


@njit
def _serve(offsets, experts, tokens, refresh, orders, totals):
    """Serve a layer's cells for every group of intervals; ``orders`` [G, E] and ``totals`` [G, 4, E + 1] are brought on."""
    num_experts = orders.shape[1]
    place = np.empty(num_experts, np.int64)
    active = np.zeros(num_experts, np.bool_)
    left_over = np.zeros((num_experts + 63) // 64, np.uint64)
    for g in range(len(orders)):
        order = orders[g]
        tokens_at, experts_at, promoted_at, refreshes_of = totals[g, 0], totals[g, 1], totals[g, 2], totals[g, 3]
        for p in range(num_experts):
            place[order[p]] = p
        for c in range(len(offsets) - 1):
            first = offsets[c]
            size = offsets[c + 1] - first
            if size == 0:
                continue
            if refresh[g, c]:
                # Wanted at the budgets above its rank, there already at those above its place.
                for r in range(size):
                    e = experts[first + r]
                    active[e] = True
                    promoted_at[r] += 1
                    promoted_at[max(r, place[e])] -= 1
                refreshes_of[size] += 1
                _reorder(order, experts, first, size, active, left_over)
                for p in range(num_experts):
                    place[order[p]] = p
                for r in range(size):
                    active[experts[first + r]] = False
                    tokens_at[r] += tokens[first + r]
                    experts_at[r] += 1
            else:
                for i in range(first, first + size):
                    p = place[experts[i]]
                    tokens_at[p] += tokens[i]
                    experts_at[p] += 1


@intrinsic
def _leading_zeros(typing_context: Any, word: Any) -> Any:
    """Zero bits above the highest set bit of a uint64 that is not 0."""
    del typing_context

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctlz(arguments[0], context.get_constant(types.boolean, True))

    return types.uint64(types.uint64), generate


@njit
def _highest(words, last):
    """The highest id in a set of bits of which words after ``last`` are empty; -1 where it is empty."""
    while last >= 0 and words[last] == 0:
        last -= 1
    return (last << 6) + 63 - np.int64(_leading_zeros(words[last])) if last >= 0 else -1  # type: ignore[call-arg]


@njit
def _reorder(order, experts, first, size, active, left_over):
    """Active experts to the front by rank; behind them, place by place, the highest id the sets so far have left over."""
    one = np.uint64(1)
    for p in range(size):
        e = np.int64(order[p])
        left_over[e >> 6] |= np.uint64(not active[e]) << np.uint64(e & 63)
        order[p] = experts[first + p]
    highest = _highest(left_over, len(left_over) - 1)
    for p in range(size, len(order)):
        e = np.int64(order[p])
        # Most experts stay where they are, so one branch finds those that do not.
        if (-1 if active[e] else e) > highest:
            continue
        order[p] = highest
        left_over[e >> 6] |= np.uint64(not active[e]) << np.uint64(e & 63)
        left_over[highest >> 6] ^= one << np.uint64(highest & 63)
        highest = _highest(left_over, highest >> 6)
