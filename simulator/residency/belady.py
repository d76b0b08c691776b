"""Belady's clairvoyant cache: as lru, but the experts whose next use is farthest away are evicted first.

Source: L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966.
Experts rank by their next batch, the soonest first, those never needed again last, ties to the lowest layer and id (where
batches stay whole, ``hold=batch``, it is the lowest that is evicted first). What a batch leaves behind: ``caching/demand.py``.

Where what is held fits the budget and all experts are of one size, no cache of that budget fetches fewer experts, whatever it
keeps. That is no bound on token-slots that hit, as one expert may serve more tokens than another, and none where experts are of
unequal bytes or batches stay whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from simulator.caching.demand import DemandCache
from simulator.caching.next_use import NEVER, Resident, empty, note_first, note_places, queues, serve
from simulator.policy import ExpertStream, Geometry, Placement
from tracer.trace import ForwardTable

BOUND = (
    "belady knows the future, so it is not something to run: no cache of this budget fetches fewer experts, a bound on fetches "
    "and not on token-slots that hit."
)
CLAIRVOYANT = "belady is clairvoyant, so it is not something to run; with {} it is no bound either."


class LookAhead(NamedTuple):
    """What a stream needs to know of those after it."""

    lookups: int  # in the stream
    later: np.ndarray  # uint32 [keys], the first cell after it that needs the key, ``NEVER`` without one


@dataclass(frozen=True)
class Belady(DemandCache):
    """Load on demand, evict what is needed again last (two passes over the trace)."""

    passes: ClassVar[int] = 2
    ordered: ClassVar[bool] = False

    def notes_on(self, geometry: Geometry) -> tuple[str, ...]:
        """What its figures say: the fewest fetches there are, or less."""
        sizes = {geometry.expert_bytes[layer] for layer in geometry.layers}
        if self.hold == "budget" and (self.scope == "layer" or len(sizes) == 1):
            return (BOUND,)
        return (CLAIRVOYANT.format("batches that stay whole" if self.hold == "batch" else "experts of unequal bytes"),)

    def start(self, geometry: Geometry, layer: int | None) -> Any:
        """State of a run that needs nothing."""
        return self.fit((), geometry, layer)

    def fit(
        self, streams: Iterable[ExpertStream], geometry: Geometry, layer: int | None
    ) -> tuple[Resident, np.ndarray, np.ndarray, tuple[LookAhead, ...]]:
        """Empty caches, their capacities, the sizes of experts, and what each stream needs to know of those after it.

        Takes four bytes an expert and stream. The streams must then be placed as they are, one by one.
        """
        capacity, sizes = self.capacity_and_sizes(geometry, layer)
        keys = geometry.num_experts * len(sizes)
        several = geometry.num_experts if layer is None else 0
        found: list[LookAhead] = []
        cells = 0
        for stream in streams:
            first = np.full(keys, NEVER, np.uint32)
            note_first(stream.offsets, stream.experts, stream.cell_layer, several, cells, first)
            found.append(LookAhead(len(stream.experts), first))
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
        cache, (capacity, sizes, ahead) = Resident(*(a.copy() for a in state[0])), state[1:]
        keys, number = len(cache.inside), len(stream.experts)
        known = ahead[0] if ahead else LookAhead(0, np.full(keys, NEVER, np.uint32))
        if known.lookups != number:
            raise ValueError(f"The state knows the next use of {known.lookups} lookups, the stream has {number}.")
        whole = self.hold == "batch"
        # After the stream: what is needed last goes first, ties to the lowest key of whole batches, else to the highest.
        later = known.later.reshape(len(capacity), -1)
        order = np.argsort(~later if whole else later, axis=1, kind="stable")
        place_of = np.argsort(order if whole else order[:, ::-1], axis=1).reshape(-1).astype(np.uint32)
        places, after = np.empty(number, np.uint32), np.empty(len(stream.cell_forward), np.int64)
        cells = stream.offsets, stream.experts, stream.cell_layer, sizes
        lookups = note_places(*cells, whole, len(capacity), place_of, places, after)
        known_places = places, after, place_of, queues(lookups, keys)
        placement = self.served(serve, stream, sizes, *known_places, capacity, cache)
        return placement, (cache, capacity, sizes, ahead[1:])
