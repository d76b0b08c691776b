"""The most used experts stay on the GPU; a miss runs on the CPU and nothing ever moves.

Source: Fiddler (arXiv 2402.07033), placement by popularity, as arXiv 2605.20179 (TIDE) uses it: static, every miss on the CPU.
Fiddler itself counts popularity on a calibration set, as ``fit_on`` does; without, it is counted on the replayed run, the best
case.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

import numpy as np

from simulator.budget import Budgeted
from simulator.caching.placement import fixed
from simulator.policy import ExpertStream, Geometry, Placement
from simulator.spec import split
from simulator.streams.loads import add_loads, loaded_geometry
from tracer.errors import UserError
from tracer.trace import ForwardTable

# Layers start side by side, and one of them reads for all.
_READING = Lock()


@dataclass(frozen=True)
class Static(Budgeted):
    """The experts of most tokens live on the GPU, those of the run itself (two passes over it) or of another trace.

    Parameters
    ----------
    fit_on : str, optional
        Path of another trace, relative to the working directory, without commas: popularity is counted on its recorded
        experts, all kinds of forwards alike, ``split`` goes by it too, and the replayed trace is read once. Without, on the
        replayed run itself.
    """

    fit_on: str | None = None

    requires: ClassVar[frozenset[str]] = frozenset()
    scope: ClassVar[str] = "layer"
    ordered: ClassVar[bool] = False

    @property
    def passes(self) -> int:
        """Passes over the replayed trace: two where popularity is counted on it."""
        return 2 if self.fit_on is None else 1

    @property
    def notes(self) -> tuple[str, ...]:
        """Where the popularity comes from."""
        if self.fit_on is None:
            return ("static knows the popularity of the replayed run itself: its best case.",)
        return (f"static takes the popularity of experts from {self.fit_on}.",)

    @cached_property
    def _fitted_on(self) -> Geometry:
        """Geometry of the trace to fit on, with the loads of its experts; read once."""
        from tracer.parquet import open_trace

        return loaded_geometry(open_trace(str(self.fit_on)))

    def start(self, geometry: Geometry, layer: int | None) -> np.ndarray:
        """bool [E]: the B experts of most tokens in the trace to fit on; without one the first experts by index.

        Raises
        ------
        UserError
            There is no such trace, or its model has other layers or another number of experts.
        """
        load = np.zeros(geometry.num_experts, np.int64)
        if self.fit_on is not None:
            with _READING:
                other = self._fitted_on
            theirs, ours = _experts(other), _experts(geometry)
            if theirs != ours:
                raise UserError(
                    f"static cannot be fitted on {self.fit_on}: its model has {theirs}, the replayed trace's has {ours}; "
                    "give a trace of the same model."
                )
            load = np.array((other.loads or ())[layer or 0], np.int64)
            geometry = replace(geometry, loads=other.loads)
        return self._most_used(load, geometry, layer)

    def fit(self, streams: Iterable[ExpertStream], geometry: Geometry, layer: int | None) -> np.ndarray:
        """bool [E]: the B experts of most tokens over all streams, ties to the lowest id."""
        loads = np.zeros((len(geometry.layers), geometry.num_experts), np.int64)
        for stream in streams:
            add_loads(stream, loads)
        return self._most_used(loads[layer or 0], geometry, layer)

    def _most_used(self, load: np.ndarray, geometry: Geometry, layer: int | None) -> np.ndarray:
        resident = np.zeros(geometry.num_experts, bool)
        resident[np.argsort(-load, kind="stable")[: self.experts_per_layer(geometry, layer or 0)]] = True
        return resident

    def place(
        self, stream: ExpertStream, forwards: ForwardTable, geometry: Geometry, state: Any
    ) -> tuple[Placement, Any]:
        """Residents hit and run on the GPU, the others on the CPU."""
        return fixed(stream, state), state


def fitted(specs: Sequence[str], trace: str | Path) -> list[str]:
    """Residency specs, those of static with the trace to fit it on.

    Raises
    ------
    UserError
        None of them is static's.
    """
    mine = [split(spec) if split(spec)[0] == "static" else None for spec in specs]
    if not any(mine):
        raise UserError("--fit names the trace that static counts popularity on; add --residency static:budget=N.")
    fit = f"fit_on={trace}"
    return [
        spec if parts is None else f"{parts[0]}:{parts[1]},{fit}" if parts[1] else f"{parts[0]}:{fit}"
        for spec, parts in zip(specs, mine, strict=True)
    ]


def _experts(geometry: Geometry) -> str:
    """Which layers have how many experts, in words; consecutive layers as a range."""
    runs: list[list[int]] = []
    for layer in geometry.layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    named = ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in runs)
    return f"{geometry.num_experts} experts in {'layer' if len(geometry.layers) == 1 else 'layers'} {named}"
