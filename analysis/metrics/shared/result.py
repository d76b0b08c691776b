"""What a consistency analysis hands back: frames, why some are empty, a summary, and its headline figures."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from analysis.metrics.shared.metric import Metric, metrics
from analysis.metrics.shared.settings import NULLS


@dataclass(frozen=True, slots=True)
class Popularity:
    """How often each expert is used, to hold against another recording of the same model.

    ``model`` is its name, ``layers`` are numbered as in the model. ``scope``: the rows counted, "block" or "forward".
    ``prompts`` identify the requests in order of appearance, None where unknown. ``load`` int64 [G, L, E]: token-slots
    of each bootstrap unit; request number r is in unit r modulo G.
    """

    model: str
    layers: tuple[int, ...]
    scope: str
    prompts: tuple[Hashable, ...]
    load: np.ndarray


@dataclass(frozen=True, slots=True)
class ConsistencyResult:
    """Frames by name; ``reasons`` says of each frame without rows why it has none, and of missing intervals why they
    are.

    ``summary`` holds sizes of the trace (requests, denoise_forwards, blocks, decisions, accepted_per_step, ...),
    ``notes`` what a reader of the figures should know. ``popularity`` is what another recording is compared with.
    """

    frames: dict[str, pl.DataFrame]
    reasons: dict[str, str]
    summary: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    popularity: Popularity | None = None

    def headline(self) -> list[dict[str, Any]]:
        """One row per headline figure, all layers together: figure, value, low, high, null, null_name, beats_null, n,
        frame.

        ``null`` is the one hardest to beat. Figures of frames that are empty are left out.
        """
        rows = []
        for metric in sorted(metrics().values(), key=lambda m: m.headline_place or m.place):
            frame = self.frames.get(metric.name)
            if frame is not None and frame.height:
                chosen = ((text, _pick(frame, where)) for text, where in metric.headline.items())
                rows += [{"figure": text, **_row(row, metric), "frame": metric.name} for text, row in chosen if row]
        return rows

    def to_json(self) -> dict[str, Any]:
        """A document of plain types, for ``json.dumps``: summary, notes, reasons, headline, frames (columns as
        lists)."""
        return {
            "summary": self.summary,
            "notes": self.notes,
            "reasons": self.reasons,
            "headline": self.headline(),
            "frames": {name: frame.to_dict(as_series=False) for name, frame in self.frames.items()},
        }


def _pick(frame: pl.DataFrame, where: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row of a frame for all layers together with the wanted values; block rows before whole forwards."""
    if "layer" in frame.columns:
        frame = frame.filter(pl.col("layer").is_null())
    for column, value in where.items():
        if value == "last":
            value = frame[column].max()
        elif value == "middle":
            values = frame[column].drop_nulls().unique().sort()
            value = values[(len(values) - 1) // 2] if len(values) else None
        frame = frame.filter(pl.col(column).eq_missing(pl.lit(value)))
    return frame.row(0, named=True) if frame.height else None


def _row(row: dict[str, Any], metric: type[Metric]) -> dict[str, Any]:
    known = {name: row[name] for name in NULLS if row.get(name) is not None}
    choose = min if row["metric"] in metric.smaller else max
    hardest = choose(known, key=lambda name: known[name]) if known else None
    return {
        "value": row["value"],
        "low": row["low"],
        "high": row["high"],
        "null": known[hardest] if hardest else None,
        "null_name": hardest.removeprefix("null_") if hardest else None,
        "beats_null": row.get("beats_null"),
        "n": row["n"],
    }
