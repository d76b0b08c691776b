"""What verbs show of their results, one function a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from analysis import figures
from analysis.curves import null_words
from analysis.figures import BY_RANK, WRITTEN, Figure
from analysis.tables import TEXT, Column, Sheet

if TYPE_CHECKING:
    import polars as pl

RUN_KEYS = ("trace", "routing", "residency", "hardware", "kernel")
_FASTEST = ("refresh_interval", "latency_s", "slowdown", "objective")
_REPLAYED = (figure.name for figure in BY_RANK if "interval" in figure.shown and figure.name not in _FASTEST)
INTERVAL_ORDER = (*_FASTEST, *_REPLAYED, "extra_misses", "promotions", "objective_memoryless")
SWEEP_KEYS = ("routing", "residency", "hardware", "kernel", "estimate")
# In a column of the terminal amounts are to be compared at a glance: one unit in all rows.
IN_COLUMNS = WRITTEN | {
    "text": str,
    "word": str,
    "times": WRITTEN["two"],
    "size": lambda value: f"{value / 1e6:.1f} MB",
    "MB": lambda value: f"{value / 1e6:,.2f}",
}
"""How values are written; "word" is a text that is set to the right and never folded."""


def facts_table(facts: Mapping[str, Any]) -> Sheet:
    """Sections of named facts, as ``moetrace info`` has them."""
    rows: list[Sequence[str]] = []
    for section, values in facts.items():
        named = values.items() if isinstance(values, Mapping) else [("", values)]
        rows += [(section if index == 0 else "", str(key), plain(value)) for index, (key, value) in enumerate(named)]
    return Sheet([Column("section"), Column("fact"), Column("value", folds=TEXT)], rows, head=False)


def run_table(results: Sequence[tuple[str, Sequence[tuple[str, ...]], Any]]) -> Sheet:
    """The figures people compare, one row a run, estimates in italics.

    Parameters
    ----------
    results : sequence
        (trace name, specs of each run as typed, ReplayResult).
    """
    shown = figures.shown_in("terminal")
    rows, estimates = [], []
    for trace, names, result in results:
        for specs, run in zip(names, result.runs, strict=True):
            values = figures.values(run.summary)
            told = (figures.cell(stand_in(figure, values), values) for figure in shown)
            rows.append((trace, *specs, run.hardware, run.kernel, *told))
            estimates.append(run.estimate)
    columns = dict.fromkeys(RUN_KEYS, "text") | {figure.heading: figure.written for figure in shown}
    order = (
        "residency",
        "routing",
        *(figure.heading for figure in BY_RANK if figure in shown),
        "kernel",
        "hardware",
        "trace",
    )
    return sheet(columns, rows, RUN_KEYS, order, estimates)


def stand_in(figure: Figure, values: Mapping[str, Any]) -> str:
    """The figure to show in a figure's place: another where nothing denoises."""
    absent = values.get(figure.name) is None and values.get(figure.instead) is not None
    return figure.instead if absent else figure.name


def stood_in(summary: Mapping[str, Any]) -> list[str]:
    """Headings of the figures in whose place :func:`run_table` shows another."""
    return [f.heading for f in figures.shown_in("terminal") if stand_in(f, summary) != f.name]


def front_table(front: pl.DataFrame) -> Sheet:
    """The Pareto front of a sweep, one row a run, figures that none of them has left out."""
    known = {name for name in front.columns if front[name].null_count() < front.height}
    shown = figures.shown_in("sweep")
    spare = {figure.instead for figure in shown if figure.name in known}
    columns = [name for name in (*SWEEP_KEYS, *(figure.name for figure in shown)) if name in known - spare]
    order = ("residency", "routing", *(figure.name for figure in BY_RANK), "estimate", "kernel", "hardware")
    rows = [[_front_cell(name, row) for name in columns] for row in front.iter_rows(named=True)]
    return frame_table(columns, rows, SWEEP_KEYS[:4], order)


def _front_cell(name: str, row: Mapping[str, Any]) -> Any:
    """A figure of a sweep's row, a band as a text."""
    value = figures.cell(name, row)
    return figures.band(value) if isinstance(value, tuple) else value


def headline_table(rows: Iterable[Mapping[str, Any]]) -> Sheet:
    """Consistency figures with their interval and the null hardest to beat."""
    columns = {
        "figure": "text", "value": "three", "95% interval": "word", "null": "three", "beats it": "word", "null is": "text",
    }  # fmt: skip
    told = [
        (
            row["figure"],
            row["value"],
            None if row["low"] is None else f"{row['low']:.3f} .. {row['high']:.3f}",
            row["null"],
            {True: "yes", False: "no"}.get(row["beats_null"]),
            null_words(row["frame"], row["null_name"]) if row["null_name"] else None,
        )
        for row in rows
    ]
    return sheet(columns, told, ("figure",), ("figure", "value", "null", "95% interval", "beats it", "null is"))


def parallel_table(specs: Iterable[str], runs: Sequence[Mapping[str, Any]], kinds: str = "") -> Sheet:
    """Loads of expert-parallel groups, one row a group, estimates in italics; bytes of weights read a forward and layer.

    ``specs`` are the routing policies as typed, ``kinds`` the suffix of the figures to show.
    """
    columns = {
        "routing": "text", "GPUs": "count", "placement": "text", "imbalance": "two", "busy": "percent", "MB a GPU": "MB",
        "MB the fullest": "MB",
    }  # fmt: skip
    figures = [f"{name}{kinds}" for name in ("imbalance", "busy", "mean_bytes", "max_bytes")]
    rows = [
        (spec, run["gpus"], run["placement"], *(run[figure] for figure in figures))
        for spec, run in zip(specs, runs, strict=True)
    ]
    keys = ("routing", "GPUs", "placement")
    order = (*keys[::-1], "imbalance", "busy", "MB the fullest", "MB a GPU")
    return sheet(columns, rows, keys, order, [run["estimate"] for run in runs])


def sheet(
    columns: Mapping[str, str],
    rows: Iterable[Sequence[Any]],
    keys: Sequence[str],
    order: Sequence[str],
    estimates: Sequence[bool] = (),
) -> Sheet:
    """A table of values; ``columns`` says how those under each heading are written, a key of :data:`IN_COLUMNS`.

    Rows that are estimates are set in italics; ``keys`` and ``order`` as of a ``Sheet``.
    """
    heads = [Column(name, right=how != "text", folds=TEXT if how == "text" else 0) for name, how in columns.items()]
    texts: list[Sequence[str]] = [
        ["-" if value is None else IN_COLUMNS[how](value) for how, value in zip(columns.values(), row, strict=True)]
        for row in rows
    ]
    return Sheet(heads, texts, keys, order, ["italic" if estimate else None for estimate in estimates])


def frame_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    keys: Sequence[str] = (),
    order: Sequence[str] = (),
    folds: int = TEXT,
) -> Sheet:
    """Any small table; numbers to the right, texts folded to ``folds`` cells. ``keys`` and ``order`` as of a ``Sheet``."""
    values = list(rows)
    made = []
    for index, name in enumerate(columns):
        given = [row[index] for row in values if row[index] is not None]
        numbers = bool(given) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in given)
        made.append(Column(name, right=numbers, folds=0 if numbers else folds))
    return Sheet(made, [[plain(value) for value in row] for row in values], keys, order)


def plain(value: Any) -> str:
    """One value as people read it."""
    if isinstance(value, bool) or value is None:
        return "-" if value is None else str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(str(v) for v in value)
    return str(value)
