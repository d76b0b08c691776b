"""The runs of a sweep that no other run beats: fast, small and faithful at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from analysis.figures import FIGURES, shown_in
from tracer.errors import UserError, unknown

if TYPE_CHECKING:
    import polars as pl

SIGNS = {"less": 1.0, "more": -1.0}


def pareto(
    frame: pl.DataFrame, figures: Sequence[str] | None = None, by: Sequence[str] = ("trace", "hardware")
) -> pl.DataFrame:
    """The Pareto front of a sweep, by group: rows than which no other row is at least as good in all and better in one figure.

    Rows that equal each other in every figure are all kept, in the order they came; a null figure is the worst there is. Runs
    that held more than their budget (``over_budget``) are left out: what they reach takes a larger one.

    Parameters
    ----------
    frame : pl.DataFrame
        A sweep's rows.
    figures : sequence of str, optional
        The objectives; each figure says whether less or more of it is better. By default those of the front of
        :mod:`analysis.figures`: latency, resident bytes and gate weight kept; without latencies unique experts, bytes moved to
        the GPU, tokens left to the CPU, resident bytes and gate weight kept.
    by : sequence of str
        Rows are held against rows of the same group only; columns the frame lacks are left out.

    Raises
    ------
    UserError
        The frame lacks a figure, one is not a number, or neither less nor more of it is better.
    """
    if "over_budget" in frame.columns:
        frame = frame.filter(~frame["over_budget"].fill_null(False))
    groups = [name for name in by if name in frame.columns]
    if groups and frame.height:
        parts = frame.with_row_index("_row").partition_by(groups, maintain_order=True)
        kept = [part["_row"].to_numpy()[_front(_costs(part, figures))] for part in parts]
        return frame[np.sort(np.concatenate(kept))]
    return frame[_front(_costs(frame, figures))]


def _costs(frame: pl.DataFrame, figures: Sequence[str] | None) -> np.ndarray:
    """float64 [rows, figures], smaller is better, what is unknown is infinite."""
    if figures is None:
        timed = "latency_s" in frame.columns and frame["latency_s"].is_not_null().any()
        figures = [figure.name for figure in shown_in("front" if timed else "bare front")]
    columns = []
    for name in figures:
        if name not in frame.columns:
            raise unknown("figure", name, frame.columns, " in this sweep")
        if not (frame[name].dtype.is_numeric() or frame[name].null_count() == frame.height):
            raise UserError(f"The sweep's column {name} holds no numbers; choose a figure.")
        sign = SIGNS.get(FIGURES[name].better) if name in FIGURES else None
        if sign is None:
            raise UserError(f"Neither less nor more of {name} is better; choose another figure.")
        values = sign * np.array([np.nan if v is None else v for v in frame[name].to_list()], np.float64)
        columns.append(np.where(np.isnan(values), np.inf, values))
    return np.stack(columns, axis=1) if columns else np.zeros((frame.height, 0))


def _front(figures: np.ndarray) -> np.ndarray:
    """Rows that no other row dominates, ascending."""
    # In lexicographic order a row is dominated by earlier ones only, and then by one that is itself on the front.
    order = np.lexsort(figures.T[::-1]) if figures.shape[1] else np.arange(len(figures))
    front: list[int] = []
    best = np.empty_like(figures)
    for row in order.tolist():
        own, others = figures[row], best[: len(front)]
        if not ((others <= own).all(axis=1) & (others < own).any(axis=1)).any():
            best[len(front)] = own
            front.append(row)
    return np.sort(np.array(front, np.int64))
