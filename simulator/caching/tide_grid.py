"""TIDE at many refresh intervals and budgets in one pass over a trace, each equal to a replay of its own.

Source: arXiv 2605.20179 and its released code (github ims-kdks/TIDE), rules as in ``residency/tide.py``. One pass is enough
because the resident sets of all budgets form a chain: one order of the experts holds them all, its first B being the set of
budget B.

* It starts as 0, 1, 2, ..
* A refresh with A active experts puts these first, by load. At a budget B > A the set keeps B - A of its inactive experts, the
  highest ids of them. From B - 1 to B the old set gains one expert, so the new one gains the highest id not yet kept: the sets
  form a chain again.

An expert's place in the order says at which budgets it hits, so a cell costs one addition an expert, whatever the budgets.

Example: 4 experts, order 0 1 2 3, and a refresh that finds expert 3 with five tokens and 1 with two. The order becomes 3 1 2 0:
budget 1 holds {3}; budget 2 held {0, 1} and holds {3, 1}; budget 3 held {0, 1, 2}, needs one place for 3 and drops 0, the
lowest inactive id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic

from simulator.policy import ExpertStream, Geometry
from simulator.streams.routed import RoutedLayer, View
from simulator.tallies import placement_tally as tally
from simulator.tallies.placement_tally import LAGS, PlacementTally
from simulator.walk import Watcher
from tracer.jit import njit
from tracer.schema import KINDS
from tracer.trace import ForwardTable


class GroupSums(NamedTuple):
    """Sums of the G groups of intervals that have refreshed alike so far, in a layer; P = E + 1 places in the order.

    The first axis is the layer in :class:`TideGrid`.
    """

    tokens: (
        np.ndarray
    )  # int64 [G, LAGS + 1, P], by place and forwards since the refresh (first: before any, or too many)
    experts: np.ndarray  # int64 [G, kinds, P], by place and kind of forward
    promoted: np.ndarray  # int64 [G, P], changes from place to place of the experts promoted
    refreshes: np.ndarray  # int64 [G, P], by active experts
    lag: np.ndarray  # int64 [G, LAGS + 2]: forwards since the refresh, -1 before any; tokens by them, as in ``tokens``


class TideGrid(Watcher):
    """TIDE under many policies. L layers, I distinct intervals.

    Parameters
    ----------
    policies : sequence of simulator.residency.tide.Tide
        Of any budgets and intervals.
    geometry : Geometry
        Of the trace.
    """

    def __init__(self, policies: Sequence[Any], geometry: Geometry) -> None:
        self.policies, self.geometry = policies, geometry
        self.intervals = list(dict.fromkeys(policy.refresh_interval for policy in policies))
        layers, experts = len(geometry.layers), geometry.num_experts
        self._decoded: dict[int, int] = {}
        # Of each interval; intervals of a group share order and sums.
        self._group = np.zeros(len(self.intervals), np.int64)
        self._order = np.tile(np.arange(experts, dtype=np.uint16), (layers, 1, 1))
        shapes = (LAGS + 1, experts + 1), (len(KINDS), experts + 1), (experts + 1,), (experts + 1,), (LAGS + 2,)
        self._sums = GroupSums(*(np.zeros((layers, 1, *shape), np.int64) for shape in shapes))
        self._sums.lag[..., 0] = -1
        self._lookups = np.zeros((layers, len(KINDS)), np.int64)
        self._cells = np.zeros(layers, np.int64)

    def begin(self, view: View) -> None:
        """Split groups whose intervals refresh differently in this segment."""
        forwards = view.trajectory.forwards
        self._kind = forwards.forward_kind
        keys = np.column_stack((self._group, self._refreshes(forwards)))
        groups, self._group = np.unique(keys, axis=0, return_inverse=True)
        self._group = self._group.reshape(-1)
        before = groups[:, 0].astype(np.int64)
        self._order = np.take(self._order, before, axis=1)
        self._sums = GroupSums(*(np.take(sums, before, axis=1) for sums in self._sums))
        self._refresh = groups[:, 1:].astype(bool)

    def _refreshes(self, forwards: ForwardTable) -> np.ndarray:
        """bool [I, F]"""
        # the policy's file imports this one where it is asked for many settings
        from simulator.residency.tide import refreshes

        flags, after = [], self._decoded
        for interval in self.intervals:
            after = dict(self._decoded)
            flags.append(refreshes(forwards, self.geometry.first_block, interval, after))
        self._decoded = after
        return np.array(flags)

    def layer(self, at: int, routed: RoutedLayer) -> None:
        """Serve a layer's cells for every group."""
        stream = routed.stream
        experts, tokens = stream.experts.copy(), stream.tokens.copy()
        of_cell = np.ascontiguousarray(self._refresh[:, stream.cell_forward])
        kinds = self._kind[stream.cell_forward]
        rank_cells(stream.offsets, of_cell.any(axis=0), self.geometry.num_experts, experts, tokens)
        sums = GroupSums(*(of_layers[at] for of_layers in self._sums))
        _serve(stream.offsets, experts, tokens, kinds, of_cell, self._order[at], sums)
        self._lookups[at] += lookups_by_kind(stream, kinds)
        self._cells[at] += len(kinds)

    def result(self) -> dict[Any, PlacementTally]:
        """A tally a policy."""
        # What stands at places 0 to B - 1 is resident at budget B.
        below = GroupSums(*map(_up_to, self._sums))
        return {policy: self._tally(policy, below) for policy in self.policies}

    def _tally(self, policy: Any, below: GroupSums) -> PlacementTally:
        made = PlacementTally(self.geometry, policy.scope)
        group = self._group[self.intervals.index(policy.refresh_interval)]
        for at, budget in enumerate(policy.experts_by_layer(self.geometry)):
            tokens, moved = below.tokens[at, group, :, budget], below.promoted[at, group, budget]
            of_layer = made.totals[at]
            of_layer[0, [tally.GPU_TOKENS, tally.HIT_TOKENS]] = tokens.sum()
            of_layer[0, [tally.PROMOTIONS, tally.DEMOTIONS]] = moved
            of_layer[0, tally.COPIED_BACK] = moved if policy.copy_back else 0
            of_layer[:, tally.HIT_EXPERTS] = below.experts[at, group, :, budget]
            of_layer[:, tally.LOOKUPS] = self._lookups[at]
            made.held[at] = budget * made.sizes[at] if self._cells[at] else 0
            made.refreshes[at] = self._sums.refreshes[at, group].sum(), below.refreshes[at, group, budget]
            made.by_lag[at] = np.column_stack((tokens[1:], self._sums.lag[at, group, 2:]))
        return made


def _up_to(sums: np.ndarray) -> np.ndarray:
    """Sums over the places before each, [.., P]."""
    below = np.zeros_like(sums)
    np.cumsum(sums[..., :-1], axis=-1, out=below[..., 1:])
    return below


def lookups_by_kind(stream: ExpertStream, kinds: np.ndarray) -> np.ndarray:
    """Distinct experts of a stream's cells by kind of forward, int64 [kinds]; ``kinds`` uint8 [C] of the cells."""
    counted = np.zeros(len(KINDS), np.int64)
    np.add.at(counted, kinds, np.diff(stream.offsets))
    return counted


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
def _serve(offsets, experts, tokens, kinds, refresh, orders, sums):
    """Serve a layer's cells for every group of intervals; ``orders`` [G, E] and ``sums`` are brought on."""
    num_experts = orders.shape[1]
    place = np.empty(num_experts, np.int64)
    active = np.zeros(num_experts, np.bool_)
    left_over = np.zeros((num_experts + 63) // 64, np.uint64)
    lags = sums.tokens.shape[1] - 1
    for g in range(len(orders)):
        order, promoted_at, refreshes_of, lag = orders[g], sums.promoted[g], sums.refreshes[g], sums.lag[g]
        for p in range(num_experts):
            place[order[p]] = p
        for c in range(len(offsets) - 1):
            first = offsets[c]
            size = offsets[c + 1] - first
            anew = refresh[g, c] and size > 0
            if anew:
                lag[0] = 0
            elif lag[0] >= 0:
                lag[0] += 1
            if size == 0:
                continue
            if anew:
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
            slot = lag[0] + 1 if lag[0] < lags else 0
            tokens_at, experts_at = sums.tokens[g, slot], sums.experts[g, kinds[c]]
            every = np.int64(0)
            for i in range(first, first + size):
                p = place[experts[i]]
                tokens_at[p] += tokens[i]
                experts_at[p] += 1
                every += tokens[i]
            lag[slot + 1] += every


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
