"""The placement of a resident set that is chosen anew in some model calls, by the load of that very call.

Source: the refresh inside a layer of arXiv 2605.20179 (TIDE) and its released code, as ``residency/tide.py`` describes it.
"""

from __future__ import annotations

import numpy as np

from simulator.policy import ExpertStream, Placement
from tracer.jit import njit


def refreshed_placement(stream: ExpertStream, refresh: np.ndarray, resident: np.ndarray, copy_back: bool) -> Placement:
    """Residents hit and run on the GPU, the others on the CPU; refreshes come before the experts of their call run.

    Parameters
    ----------
    stream : ExpertStream
        Of one layer.
    refresh : np.ndarray
        bool [F], which model calls choose anew; one without active experts leaves the set as it is.
    resident : np.ndarray
        bool [E], brought up to date; it keeps its size.
    copy_back : bool
        Whether a demoted expert crosses the bus.
    """
    cells = len(stream.cell_forward)
    hit = np.empty(len(stream.experts), bool)
    moved = np.zeros(cells, np.int64)
    held = int(resident.sum())
    refreshed = refresh[stream.cell_forward] & (np.diff(stream.offsets) > 0)
    _serve(stream.offsets, stream.experts, stream.tokens, refreshed, held, resident, hit, moved)
    back = moved if copy_back else np.zeros(cells, np.int64)
    return Placement(hit, hit, moved, moved, back, np.full(cells, held, np.int64), None, refreshed)


@njit
def _serve(offsets, experts, tokens, refresh, budget, resident, hit, moved):
    target = np.zeros(len(resident), np.bool_)
    load = np.zeros(len(resident), np.int64)
    for c in range(len(offsets) - 1):
        first, stop = offsets[c], offsets[c + 1]
        if refresh[c] and stop > first:
            largest = 0
            for i in range(first, stop):
                load[experts[i]] = tokens[i]
                largest = max(largest, int(tokens[i]))
            # The B-th largest load: the most any load can be with at least B experts as loaded.
            low, high = 0, largest
            while low < high:
                middle = (low + high + 1) // 2
                as_loaded = 0
                for i in range(first, stop):
                    as_loaded += tokens[i] >= middle
                if as_loaded >= budget:
                    low = middle
                else:
                    high = middle - 1
            ties = budget
            for i in range(first, stop):
                ties -= tokens[i] > low
            promoted = 0
            for e in range(len(resident)):
                target[e] = load[e] > low
                if load[e] == low and low > 0 and ties > 0:
                    target[e] = True
                    ties -= 1
                promoted += target[e] and not resident[e]
                load[e] = 0
            demote = promoted
            for e in range(len(resident)):
                if target[e]:
                    resident[e] = True
                elif resident[e] and demote > 0:
                    resident[e] = False
                    demote -= 1
            moved[c] = promoted
        for i in range(first, stop):
            hit[i] = resident[experts[i]]
