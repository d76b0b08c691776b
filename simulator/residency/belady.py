"""Belady's clairvoyant cache: as lru, but the experts whose next use is farthest away are evicted first.

Source: L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966; the
bound for caches that load on demand. Experts that are never needed again go first, ties to the lowest layer and id. With
batches that cannot be evicted and layers of unequal bytes it is a bound in practice, not a proven one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from simulator.budget import Budgeted
from simulator.caching.demand import capacity_and_sizes, demand_placement
from simulator.caching.heap import Ranked, Rule, empty, serve
from simulator.policy import ExpertStream, Geometry, Placement
from tracer.jit import njit
from tracer.trace import ForwardTable

NEVER = np.iinfo(np.uint32).max


class LookAhead(NamedTuple):
    """What a stream needs to know of those after it."""

    cells: int  # before the stream
    lookups: int  # in it
    later: np.ndarray  # uint32 [keys], the first cell after it that needs the key, ``NEVER`` without one


@dataclass(frozen=True)
class Belady(Budgeted):
    """Load on demand, evict what is needed again last (two passes over the trace).

    Parameters
    ----------
    scope : str
        "layer": each layer has a cache of its own, counted in experts; "global": one cache over all layers, in bytes.
    """

    scope: Literal["layer", "global"] = "layer"

    requires: ClassVar[frozenset[str]] = frozenset()
    on_demand: ClassVar[bool] = True
    passes: ClassVar[int] = 2
    together: ClassVar[bool] = True
    ordered: ClassVar[bool] = False
    notes: ClassVar[tuple[str, ...]] = ("belady knows the future: a bound, not something to run.",)

    def start(self, geometry: Geometry, layer: int | None) -> Any:
        """State of a run that needs nothing."""
        return self.fit((), geometry, layer)

    def fit(
        self, streams: Iterable[ExpertStream], geometry: Geometry, layer: int | None
    ) -> tuple[Ranked, np.ndarray, np.ndarray, tuple[LookAhead, ...]]:
        """Empty caches, their capacities, the sizes of experts, and what each stream needs to know of those after it.

        Takes four bytes an expert and stream. The streams must then be placed as they are, one by one.
        """
        capacity, sizes = capacity_and_sizes(self, geometry, layer, self.scope == "global")
        keys = geometry.num_experts * len(sizes)
        several = geometry.num_experts if layer is None else 0
        found: list[LookAhead] = []
        cells = 0
        for stream in streams:
            first = np.full(keys, NEVER, np.uint32)
            _note_first(stream.offsets, stream.experts, stream.cell_layer, several, cells, first)
            found.append(LookAhead(cells, len(stream.experts), first))
            cells += len(stream.cell_forward)
        later = np.full(keys, NEVER, np.uint32)
        for n in range(len(found) - 1, -1, -1):
            first = found[n].later
            found[n] = found[n]._replace(later=later)
            later = np.where(first == NEVER, later, first)
        return empty(len(capacity), keys), capacity, sizes, tuple(found)

    def place(
        self, stream: ExpertStream, forwards: ForwardTable, geometry: Geometry, state: Any
    ) -> tuple[Placement, Any]:
        """Serve the cells in order; each is one batch."""
        cache, (capacity, sizes, ahead) = Ranked(*(a.copy() for a in state[0])), state[1:]
        keys, number = len(cache.inside), len(stream.experts)
        known = ahead[0] if ahead else LookAhead(0, 0, np.full(keys, NEVER, np.uint32))
        if known.lookups != number:
            raise ValueError(f"The state knows the next use of {known.lookups} lookups, the stream has {number}.")
        next_use = np.empty(number, np.uint32)
        several, later = geometry.num_experts if len(sizes) > 1 else 0, known.later.copy()
        _note_next(stream.offsets, stream.experts, stream.cell_layer, several, known.cells, later, next_use)
        rule = Rule(of_use=0, of_lookup=0, of_rank=-keys, of_key=1, grows=False, forget=False)
        shared = self.scope == "global"
        placement = demand_placement(serve, stream, shared, sizes, next_use, rule, 0, capacity, cache)
        return placement, (cache, capacity, sizes, ahead[1:])


@njit
def _note_first(offsets, experts, cell_layer, several, cells, first):
    """The first cell of a stream that needs each key, counted from ``cells``."""
    for back in range(len(offsets) - 1):
        c = len(offsets) - 2 - back
        base = np.uint64(cell_layer[c] * several)
        for i in range(offsets[c], offsets[c + 1]):
            first[base + np.uint64(experts[i])] = cells + c


@njit
def _note_next(offsets, experts, cell_layer, several, cells, later, next_use):
    """For every lookup the cell of the next one; ``later`` is where each key is needed after the stream, and brought back."""
    for back in range(len(offsets) - 1):
        c = len(offsets) - 2 - back
        base = np.uint64(cell_layer[c] * several)
        for i in range(offsets[c], offsets[c + 1]):
            key = base + np.uint64(experts[i])
            next_use[i] = later[key]
            later[key] = cells + c
