"""Charts of the consistency analysis, as the metrics declare them: what they draw of a frame, and words. Nothing here draws.

A curve has the columns ``at`` (where on the x axis), ``value``, ``low``, ``high`` (interval), ``n``, ``beats_null``. Where
there are several series, it has ``series`` and the null hardest to beat, ``null`` and ``null_name``; where there is one,
every null is a ``line`` of its own, and ``is_null`` tells them apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl

NULLS = ("null_hot", "null_independent", "null_shuffle", "null_uniform")
MEASURED = "measured"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart of a metric's frame; its kinds say what they draw.

    ``where``: the rows drawn, out of those for all layers together, unless ``at``, the column on the x axis, is the layer;
    where there are two scopes, the block's. ``x``, ``y``: titles of the axes; y is a share from 0 to 1, shown as percent or
    not, or a number from ``zero`` up. ``noun``: what the x axis counts, where points are held against nulls. ``place``:
    where it stands among all charts, as that of its metric.
    """

    title: str
    subtitle: str
    at: str
    x: str
    y: str = "Jaccard of the K-sets"
    percent: bool = False
    zero: bool = False
    noun: str = ""
    where: Mapping[str, Any] = field(default_factory=dict)
    place: int | None = None
    alike: int | None = None
    """Points up to this one are what every null has by definition: they beat none."""

    def rows(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The rows of a frame that are drawn."""
        wanted = [pl.col("layer").is_not_null() if self.at == "layer" else pl.col("layer").is_null()]
        if "scope" in frame.columns:
            wanted.append(pl.col("scope") == ("block" if "block" in frame["scope"].to_list() else "forward"))
        frame = frame.filter(*wanted, *(pl.col(column) == value for column, value in self.where.items()))
        if self.alike is None:
            return frame
        return frame.with_columns(pl.when(pl.col(self.at) > self.alike).then(pl.col("beats_null")))

    def curve(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The small frame the chart draws, see the module."""
        raise NotImplementedError

    def draw(self, curve: pl.DataFrame) -> Any:
        """The Altair chart of :meth:`curve`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Series(Chart):
    """A line for each value of the column ``series``, each with its null hardest to beat.

    ``words`` names the values, in the order of the legend; without, ``word`` takes the number in. ``smaller``: less is more
    consistent.
    """

    series: str
    legend: str
    words: Mapping[str, str] = field(default_factory=dict)
    word: str = "{}"
    smaller: bool = False

    def curve(self, frame: pl.DataFrame) -> pl.DataFrame:
        """One row a series and point."""
        frame = self.rows(frame)
        words: dict[Any, str] = dict(self.words)
        if not words:
            words = {number: self.word.format(number) for number in sorted(frame[self.series].unique().to_list())}
        order = {name: number for number, name in enumerate(words)}
        frame = frame.filter(pl.col(self.series).is_in(list(words)))
        place = pl.col(self.series).replace_strict(order, return_dtype=pl.Int64)
        return hardest(frame.sort(place, self.at, maintain_order=True), self.smaller).select(
            pl.col(self.series).replace_strict(words, return_dtype=pl.String).alias("series"),
            pl.col(self.at).alias("at"),
            *("value", "low", "high", "null", "null_name", "n", "beats_null"),
        )

    def draw(self, curve: pl.DataFrame) -> Any:
        """Measured lines with their intervals, and their nulls dashed."""
        from analysis import charts_consistency

        return charts_consistency.series(self, curve)


@dataclass(frozen=True, kw_only=True)
class Beside(Chart):
    """One measured line or a few, and every null as a line.

    ``lines``: the measured ones in words, each with a column and its value; all rows are one without. ``nulls`` in words.
    ``grey`` says what the grey lines are.
    """

    nulls: Mapping[str, str] = field(default_factory=dict)
    lines: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    grey: str = "Grey: nulls."

    def curve(self, frame: pl.DataFrame) -> pl.DataFrame:
        """One row a line and point."""
        frame = self.rows(frame)
        wanted = {words: frame.filter(pl.col(c) == value) for words, (c, value) in self.lines.items()}
        lines = [line(words, rows, self.at) for words, rows in (wanted or {MEASURED: frame}).items()]
        once = frame.unique(self.at, keep="first", maintain_order=True)
        for null in (null for null in NULLS if null in frame.columns):
            rows = once.select(self.at, pl.col(null).alias("value")).drop_nulls("value")
            lines.append(line(f"{self.nulls[null.removeprefix('null_')]} (null)", rows, self.at, is_null=True))
        return pl.concat([one for one in lines if one.height])

    def draw(self, curve: pl.DataFrame) -> Any:
        """Measured lines in colour, nulls in grey."""
        from analysis import charts_consistency

        return charts_consistency.beside(self, curve)


def line(words: str, rows: pl.DataFrame, at: str, is_null: bool = False) -> pl.DataFrame:
    """Rows as a line of its own, sorted; columns that they lack are null."""
    kinds = {"value": pl.Float64, "low": pl.Float64, "high": pl.Float64, "n": pl.Int64, "beats_null": pl.Boolean}
    columns = [pl.col(name) if name in rows.columns else pl.lit(None, kind).alias(name) for name, kind in kinds.items()]
    named = pl.lit(words).alias("line"), pl.lit(is_null).alias("is_null"), pl.col(at).alias("at")
    return rows.select(*named, *columns).sort("at")


def hardest(frame: pl.DataFrame, smaller: bool = False) -> pl.DataFrame:
    """The frame with ``null`` and ``null_name`` of the null hardest to beat, both null where there is none."""
    names = [name for name in NULLS if name in frame.columns]
    pick = pl.min_horizontal(names) if smaller else pl.max_horizontal(names)
    frame = frame.with_columns(pick.alias("null"))
    first = [pl.when(pl.col(n) == pl.col("null")).then(pl.lit(n.removeprefix("null_"), dtype=pl.String)) for n in names]
    return frame.with_columns(pl.coalesce(first).alias("null_name"))


def null_words(frame: str, null: str) -> str:
    """What a null of a metric's frame is, in words."""
    from analysis.metrics.shared.metric import metrics

    return metrics()[frame].nulls[null]


def null_of(row: Mapping[str, Any]) -> str:
    """The null of a headline figure, in words."""
    return null_words(row["frame"], row["null_name"])


def against(row: Mapping[str, Any], digits: int = 2) -> str:
    """The null of a headline figure and its value, in brackets after a space; empty without one."""
    return "" if row["null"] is None else f" ({null_of(row)}: {row['null']:.{digits}f})"


def unbeaten(frame: pl.DataFrame, noun: str) -> str:
    """A sentence that names the points of a curve that do not beat their null; empty where all do.

    ``noun`` names the x axis. Points without a null or without an interval are neither beaten nor not.
    """
    series = "series" if "series" in frame.columns else "line"
    lost = frame.filter(~pl.col("beats_null")).sort("at", maintain_order=True)
    if lost.is_empty():
        return ""
    clauses = []
    for name in frame[series].unique(maintain_order=True).to_list():
        at = lost.filter(pl.col(series) == name)["at"].to_list()
        if at:
            every = len(at) == frame.filter(pl.col(series) == name).height
            where = f"at every {noun}" if every else f"at {noun} {spans(at)}"
            clauses.append(where if name == MEASURED else f"{name} ({where})")
    return f"Not beating {'the null' if series == 'series' else 'every null'}: {', '.join(clauses)}."


def spans(numbers: Iterable[int]) -> str:
    """Ascending whole numbers in words: "1, 3 to 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)
