"""What the consistency figures may be asked with, and the names of their columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from tracer.errors import UserError

UNITS = 256
"""Bootstrap units at most; the requests of a longer trace are dealt to them in turn, so memory does not grow with
it."""

_TEXTS = ("metric", "scope", "state", "reference", "order", "between", "first", "second")
_WHOLE = ("layer", "distance", "budget", "window", "lag", "rows", "expert", "rank", "step", "steps_before", "bin")
_WIDE = ("n", "load")
VALUE, NULLS, VERDICT = ("value", "low", "high"), ("null_hot", "null_independent", "null_shuffle"), ("n", "beats_null")
"""Columns most frames end in: a figure and its interval, its nulls, how much it averages and what the nulls make of it."""


def columns(*names: str) -> dict[str, Any]:
    """Columns of a frame with their polars types: shares and figures are float64. A null ``layer`` = all layers."""
    known: dict[str, Any] = (
        dict.fromkeys(_TEXTS, pl.String) | dict.fromkeys(_WHOLE, pl.Int32) | dict.fromkeys(_WIDE, pl.Int64)
    )
    known["beats_null"] = pl.Boolean
    return {name: known.get(name, pl.Float64) for name in names}


@dataclass(frozen=True, slots=True)
class Settings:
    """Parameters of the figures.

    ``distances``: steps apart, at most. ``lags``: steps after an acceptance. ``positions``: positions apart.
    ``budgets``: sizes of the top-B set, None = an eighth, a quarter and a half of the experts. ``windows``:
    consecutive denoise forwards of a working set. ``replicates``, ``level``, ``seed``: of the bootstrap over requests.
    ``sample_rows``, ``sample_forwards``: rows and forwards kept for the nulls; ``pairs``: random pairs drawn from
    them. ``bins``: of confidence.
    """

    distances: int = 8
    lags: int = 8
    positions: int = 31
    budgets: tuple[int, ...] | None = None
    windows: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    replicates: int = 1000
    level: float = 0.95
    seed: int = 0
    sample_rows: int = 8192
    sample_forwards: int = 256
    pairs: int = 4096
    bins: int = 10

    def __post_init__(self) -> None:
        for name in ("distances", "lags", "positions", "replicates", "sample_rows", "sample_forwards", "pairs", "bins"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give a whole number from 1.")
        if not 0 < self.level < 1:
            raise UserError(f"level is {self.level}; give the share of an interval, between 0 and 1, such as 0.95.")
        for name in ("budgets", "windows"):
            if any(number < 1 for number in getattr(self, name) or ()):
                raise UserError(f"{name} are {getattr(self, name)}; give whole numbers from 1.")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; give a whole number from 0.")
