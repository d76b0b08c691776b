"""Working sets: how many distinct experts a layer needs over windows of consecutive forwards.

Source: P. J. Denning, "The working set model for program behavior", CACM 11(5), 1968. Every window of w forwards in which the
layer ran counts once, whichever requests and kinds of forward it spans, because fast memory sees them all.
"""

from __future__ import annotations

import numpy as np

from tracer.jit import njit

WINDOWS = (1, 2, 4, 8, 16)
LONGEST = WINDOWS[-1]


class WorkingSets:
    """Sums over all windows so far, by layer. L layers, E experts."""

    def __init__(self, layers: int, experts: int) -> None:
        self._last = np.full((layers, experts), -1, np.int64)
        self._forwards = np.zeros(layers, np.int64)
        # By forwards from one use of an expert to the next, at most the longest window: one count serves every window.
        self._gaps = np.zeros((layers, LONGEST + 1), np.int64)
        # Of uses before the first longest window is full, by window.
        self._early = np.zeros((layers, len(WINDOWS)), np.int64)

    def add(self, layer: int, offsets: np.ndarray, experts: np.ndarray) -> None:
        """Add a layer's cells, as a stream holds them; layers may be added side by side."""
        _note_uses(offsets, experts, self._forwards[layer], self._last[layer], self._gaps[layer], self._early[layer])
        self._forwards[layer] += len(offsets) - 1

    def means(self) -> dict[str, float | None]:
        """Distinct experts by window, mean over windows and layers; None where the run is shorter than the window."""
        found: dict[str, float | None] = {}
        for j, window in enumerate(WINDOWS):
            windows = int(np.maximum(self._forwards - window + 1, 0).sum())
            distinct = int(self._early[:, j].sum()) + int(
                self._gaps.sum(axis=0) @ np.minimum(np.arange(LONGEST + 1), window)
            )
            # The last use of each expert reaches to the run's end.
            end = np.minimum(self._last + window, self._forwards[:, None])
            reach = np.maximum(end - np.maximum(self._last, window - 1), 0)
            distinct += int(reach[self._last >= 0].sum())
            found[str(window)] = distinct / windows if windows else None
        return found


@njit
def _note_uses(offsets, experts, now, last, gaps, early):
    """A use at p with the next one at t puts its expert into the windows that end at p .. min(p + w, t) - 1."""
    for c in range(len(offsets) - 1):
        for i in range(offsets[c], offsets[c + 1]):
            e = experts[i]
            p = last[e]
            last[e] = now
            if p >= LONGEST - 1:
                gaps[min(now - p, LONGEST)] += 1
            elif p >= 0:
                for j, window in enumerate(WINDOWS):
                    # Windows are full from forward w - 1 on.
                    early[j] += max(min(p + window, now) - max(p, window - 1), 0)
        now += 1
