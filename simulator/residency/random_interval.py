"""TIDE with refreshes at random steps of a block instead of every few.

Source: the random-interval row of the ablation in arXiv 2605.20179 (TIDE), which does not say how it draws. Here the lag from
one refresh to the next is uniform over 1 .. max_interval steps; everything else is as in ``residency/tide.py``: all layers
refresh in the same forwards, a prefill and the first block always do, a commit never does, and each block begins with one.
A lag is a hash of seed, request, block and step, so it depends on nothing else, how the trace is cut and the machine included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from simulator.budget import Budgeted
from simulator.caching.refresh import refreshed_placement
from simulator.policy import ExpertStream, Geometry, Placement
from tracer.errors import UserError
from tracer.jit import njit
from tracer.schema import COMMIT, DECODE, PREFILL
from tracer.trace import ForwardTable

# Of a request nothing has been seen of: no block, no decode forwards, next refresh at once.
NEW = (np.iinfo(np.int64).min, 0, 0)


@dataclass(frozen=True)
class RandomInterval(Budgeted):
    """Refresh the resident set to the most loaded experts after random lags, and all through the first block.

    Parameters
    ----------
    max_interval : int
        Largest lag in steps; by default that of a block of 32 steps.
    seed : int
        Of the lags.
    copy_back : bool
        Whether a demoted expert crosses the bus again, as in the released code of TIDE.
    """

    max_interval: int = 31
    seed: int = 0
    copy_back: bool = True

    requires: ClassVar[frozenset[str]] = frozenset()
    passes: ClassVar[int] = 1
    scope: ClassVar[str] = "layer"
    ordered: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_interval < 1:
            raise UserError(f"max_interval={self.max_interval} is no interval; give 1 or more steps.")
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"seed={self.seed} is no seed; give a number from 0 to 2 ** 63 - 1.")

    def start(self, geometry: Geometry, layer: int | None) -> tuple[np.ndarray, dict[int, tuple[int, int, int]]]:
        """The first B experts by index, bool [E], and of each request its block, decode forwards and next refresh."""
        return np.arange(geometry.num_experts) < self.experts_per_layer(geometry, layer or 0), {}

    def place(
        self, stream: ExpertStream, forwards: ForwardTable, geometry: Geometry, state: Any
    ) -> tuple[Placement, Any]:
        """Serve one layer's cells in order; the resident set persists over blocks and requests."""
        resident, seen = state[0].copy(), dict(state[1])
        refresh = self.refreshes(forwards, geometry.first_block, seen)
        return refreshed_placement(stream, refresh, resident, self.copy_back), (resident, seen)

    def refreshes(
        self, forwards: ForwardTable, first_block: dict[int, int], seen: dict[int, tuple[int, int, int]]
    ) -> np.ndarray:
        """Which model calls refresh, bool [F]: any request in it would.

        Parameters
        ----------
        forwards : ForwardTable
            Of the segment.
        first_block : dict
            Request to its first generated block; the first-block rule holds only where that is >= 0.
        seen : dict
            Request to its block, decode forwards so far and the step of its next refresh; brought up to date.
        """
        requests, of_part = np.unique(forwards.request_id, return_inverse=True)
        first = np.array([first_block.get(int(r), -1) for r in requests], np.int64)
        known = np.array([seen.get(int(r), NEW) for r in requests], np.int64).reshape(-1, 3)
        flags = np.zeros(forwards.num_forwards, bool)
        _draw(
            forwards.part_offsets,
            forwards.kind,
            forwards.block,
            forwards.step,
            of_part.reshape(-1),
            requests.astype(np.uint64),
            first,
            np.uint64(self.seed),
            np.uint64(self.max_interval),
            known,
            flags,
        )
        seen.update(
            (request, (block, calls, due)) for request, (block, calls, due) in zip(requests.tolist(), known.tolist())
        )
        return flags


@njit
def _draw(part_offsets, kind, block, step, of_part, requests, first, seed, longest, known, flags):
    """Fill the calls' flags; ``known`` [requests, 3] holds block, decode forwards and next refresh of each."""
    for f in range(len(flags)):
        for n in range(part_offsets[f], part_offsets[f + 1]):
            if kind[n] == PREFILL:
                flags[f] = True
            if kind[n] == PREFILL or kind[n] == COMMIT:
                continue
            r = of_part[n]
            now = np.int64(step[n])
            if kind[n] == DECODE:
                now = known[r, 1]
                known[r, 1] += 1
            in_first = first[r] >= 0 and block[n] == first[r]
            if not in_first and now > 0 and block[n] == known[r, 0] and now < known[r, 2]:
                continue
            flags[f] = True
            known[r, 0] = block[n]
            drawn = _mix(_mix(_mix(seed) ^ requests[r]) ^ np.uint64(block[n])) ^ np.uint64(now)
            known[r, 2] = now + 1 + np.int64(_mix(drawn) % longest)


@njit
def _mix(number):
    """The output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) on a uint64."""
    number += np.uint64(0x9E3779B97F4A7C15)
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))
