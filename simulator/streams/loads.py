"""How many recorded tokens each expert of a trace has: its popularity."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from simulator.policy import ExpertStream, Geometry
from simulator.streams.gather import geometry_of
from simulator.streams.routed import RoutedLayer
from simulator.walk import Walk, Watcher
from tracer.jit import njit


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
    walk = Walk(trace, geometry_of(trace), weights=False)
    loads: np.ndarray = walk.watch(Loads(walk.geometry)).loads
    walk.run()
    return loads


class Loads(Watcher):
    """Tokens of every expert; each layer adds to a row of its own."""

    def __init__(self, geometry: Geometry) -> None:
        self.loads = np.zeros((len(geometry.layers), geometry.num_experts), np.int64)

    def layer(self, at: int, routed: RoutedLayer) -> None:
        """Add a layer."""
        add_loads(routed.stream, self.loads)


def loaded_geometry(trace: Any) -> Geometry:
    """The geometry of an opened trace with the recorded loads of its experts, in one pass over it."""
    return replace(geometry_of(trace), loads=tuple(tuple(of_layer) for of_layer in recorded_loads(trace).tolist()))


def add_loads(stream: ExpertStream, loads: np.ndarray) -> None:
    """Add a stream's tokens to ``loads``, int64 [L, E]."""
    _add(stream.offsets, stream.cell_layer, stream.experts, stream.tokens, loads)


@njit
def _add(offsets, cell_layer, experts, tokens, loads):
    for c in range(len(offsets) - 1):
        for i in range(offsets[c], offsets[c + 1]):
            loads[cell_layer[c], experts[i]] += np.int64(tokens[i])
