"""The placement of a resident set that never changes."""

from __future__ import annotations

import numpy as np

from simulator.policy import ExpertStream, Placement


def fixed(stream: ExpertStream, resident: np.ndarray) -> Placement:
    """Residents hit and run on the GPU, the others on the CPU; nothing moves.

    Parameters
    ----------
    stream : ExpertStream
        Of one layer.
    resident : np.ndarray
        bool [E].
    """
    hit = resident[stream.experts]
    cells = len(stream.cell_forward)
    nothing = np.zeros(cells, np.int64)
    held = np.full(cells, int(resident.sum()), np.int64)
    return Placement(hit, hit, nothing, nothing, nothing, held)
