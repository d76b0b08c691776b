"""What a consistency analysis hands back: frames, why some are empty, a summary, and its headline figures."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

_NULLS = ("null_hot", "null_independent", "null_shuffle")
_SMALLER = frozenset({"drift", "missed", "unique", "unique_mean", "unique_sample_mean", "working_set"})

_HEADLINE: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("same position, next step: Jaccard", "overlap", {"metric": "jaccard", "state": "all", "distance": 1}),
    ("  still masked", "overlap", {"metric": "jaccard", "state": "masked", "distance": 1}),
    ("  accepted in between", "overlap", {"metric": "jaccard", "state": "accepted", "distance": 1}),
    ("  known before and after", "overlap", {"metric": "jaccard", "state": "decoded", "distance": 1}),
    ("  share of sets that stay the same", "overlap", {"metric": "unchanged", "state": "all", "distance": 1}),
    ("same position, farthest step: Jaccard", "overlap", {"metric": "jaccard", "state": "all", "distance": "last"}),
    ("expert counts, next step: cosine", "cosine", {"distance": 1}),
    ("wanted set, share that changes a step", "drift", {"metric": "drift", "distance": 1, "budget": "middle"}),
    ("active expert still active next step", "survival", {"metric": "survival", "distance": 1}),
    ("wanted expert still wanted next step", "survival", {"metric": "residency", "distance": 1, "budget": "middle"}),
    ("distinct experts over 8 forwards", "working_set", {"window": 8}),
    ("neighbouring positions: Jaccard", "spatial", {"metric": "jaccard", "state": "all", "distance": 1}),
    ("  both masked", "spatial", {"metric": "jaccard", "state": "masked", "distance": 1}),
    ("  one masked, one known", "spatial", {"metric": "jaccard", "state": "mixed", "distance": 1}),
    ("unique experts of a block, a layer", "unique", {"metric": "unique_mean", "state": "all"}),
    ("  their coefficient of variation", "unique", {"metric": "unique_cv", "state": "all"}),
    ("next layer's experts foretold", "predictability", {"metric": "recall"}),
    ("load skew: Gini", "balance", {"metric": "gini"}),
    ("experts never used, a layer", "balance", {"metric": "dead_experts"}),
    ("popularity across requests: cosine", "agreement", {"metric": "cosine", "between": "requests"}),
    ("tokens accepted a step", "acceptance", {"metric": "accepted_per_step", "step": None}),
    ("acceptance order: rank correlation", "order", {"metric": "rank_correlation"}),
    ("confidence: calibration error", "calibration", {"metric": "calibration_error", "rows": "all"}),
)


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
        for text, name, wanted in _HEADLINE:
            frame = self.frames.get(name)
            if frame is not None and frame.height:
                found = _pick(frame, wanted)
                if found:
                    rows.append({"figure": text, **_row(found), "frame": name})
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


def _pick(frame: pl.DataFrame, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The row of a frame for all layers together with the wanted values; block rows before whole forwards."""
    if "layer" in frame.columns:
        frame = frame.filter(pl.col("layer").is_null())
    for column, value in wanted.items():
        if value == "last":
            value = frame[column].max()
        elif value == "middle":
            values = frame[column].drop_nulls().unique().sort()
            value = values[(len(values) - 1) // 2] if len(values) else None
        frame = frame.filter(pl.col(column).eq_missing(pl.lit(value)))
    return frame.row(0, named=True) if frame.height else None


def _row(found: dict[str, Any]) -> dict[str, Any]:
    known = {name: found[name] for name in _NULLS if found.get(name) is not None}
    choose = min if found["metric"] in _SMALLER else max
    hardest = choose(known, key=lambda name: known[name]) if known else None
    return {
        "value": found["value"],
        "low": found["low"],
        "high": found["high"],
        "null": known[hardest] if hardest else None,
        "null_name": hardest.removeprefix("null_") if hardest else None,
        "beats_null": found.get("beats_null"),
        "n": found["n"],
    }
