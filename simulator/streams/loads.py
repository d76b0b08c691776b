"""How many recorded tokens each expert of a trace has: its popularity."""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.policy import ExpertStream
from simulator.streams.gather import geometry_of
from simulator.streams.recorded import serve_recorded
from tracer.trace import ForwardTable


def recorded_loads(trace: Any) -> np.ndarray:
    """Tokens of every expert over all model calls of a trace, in one pass over it.

    Parameters
    ----------
    trace
        An opened trace.

    Returns
    -------
    np.ndarray
        int64 [L, E], (row, expert) pairs; layers as in ``Geometry.layers``.

    Raises
    ------
    UserError
        A row of the trace lists an expert twice.
    """
    geometry = geometry_of(trace)
    loads = np.zeros((len(geometry.layers), geometry.num_experts), np.int64)

    def begin(forwards: ForwardTable) -> Any:
        def serve(at: int, stream: ExpertStream) -> None:
            # Sums of whole numbers below 2 ** 53 are exact as floats.
            counted = np.bincount(stream.experts, weights=stream.tokens, minlength=geometry.num_experts)
            loads[at] += counted.astype(np.int64)

        return serve

    for _ in serve_recorded(trace, begin, weights=False, ordered=False):
        pass
    return loads
