"""What a metric is, and which there are: those that the files of ``analysis/metrics`` define.

A file defines a metric as a subclass of :class:`Metric`: its columns, what it sums (a watcher), its nulls, its frame, its
headline, its charts and its sentences. Nothing else names it. A file may hold several that read the same sums. Files and
folders whose names start with an underscore, and folders, hold none.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import polars as pl

import analysis.metrics
from analysis.curves import Chart
from analysis.metrics.shared.bootstrap import Bootstrap
from analysis.metrics.shared.frames import Grid, tidy
from analysis.metrics.shared.study import Study, Watcher

if TYPE_CHECKING:
    from analysis.metrics.shared.result import ConsistencyResult

Row = Mapping[str, Any]
"""One headline figure, as :meth:`~analysis.metrics.shared.result.ConsistencyResult.headline` has it."""


class LayerColumn(NamedTuple):
    """A column of the page's table by layer: heading, how it is written (as a page's column), what it means, and the
    rows of the frame it shows; ``column`` "null" is the null hardest to beat."""

    heading: str
    written: str
    meaning: str
    where: Mapping[str, Any]
    column: str = "value"


class Metric(Watcher):
    """A figure of consistency, or several in one frame, and everything that is said of it.

    The docstring is that of the function of its name. ``place`` orders the frames, headlines, charts and sentences of all
    metrics, lowest first. ``by_position``: it needs token states and positions of blocks. ``by_scope``: it is measured
    once for the rows of the block and once for all rows of a forward, and has one frame of both. ``routed``: it looks at
    experts. ``reason``: why there may be no rows. ``smaller``: its metrics of which less is more consistent. ``nulls``:
    each of them in words. ``headline``: figures by text, each with the values of its row; a number may be "last" or
    "middle" of those there are. A text led by spaces belongs to the one above. They stand at
    ``headline_place`` where that is not ``place``.
    """

    name: ClassVar[str]
    place: ClassVar[int]
    columns: ClassVar[Mapping[str, Any]]
    by_position: ClassVar[bool] = False
    by_scope: ClassVar[bool] = False
    routed: ClassVar[bool] = True
    reason: ClassVar[str] = "No denoise forward has routed rows."
    smaller: ClassVar[Sequence[str]] = ()
    nulls: ClassVar[Mapping[str, str]] = {}
    headline: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    headline_place: ClassVar[int | None] = None
    by_layer: ClassVar[Sequence[LayerColumn]] = ()
    charts: ClassVar[Sequence[Chart]] = ()

    def __init__(self, study: Study, scope: str) -> None:
        self.study, self.scope = study, scope
        self.shape, self.settings = study.shape, study.settings

    def frame(self, bootstrap: Bootstrap) -> pl.DataFrame:
        """The figures, with the columns of ``columns``, once the whole trace has been seen."""
        raise NotImplementedError

    def tidy(self, *grids: Grid) -> pl.DataFrame:
        """A frame of some grids, see :func:`~analysis.metrics.shared.frames.tidy`."""
        return tidy(self.columns, grids, self.smaller)

    @staticmethod
    def findings(result: ConsistencyResult, rows: Mapping[str, Row]) -> list[str]:
        """Sentences on a result; ``rows`` is its headline by figure."""
        return []


def metrics() -> dict[str, type[Metric]]:
    """Every metric by name, in the order of their places."""
    classes = []
    for info in pkgutil.iter_modules(analysis.metrics.__path__):
        if not info.ispkg and not info.name.startswith("_"):
            module = importlib.import_module(f"analysis.metrics.{info.name}")
            defined = (c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__)
            classes += [c for c in defined if issubclass(c, Metric) and "name" in vars(c)]
    return {metric.name: metric for metric in sorted(classes, key=lambda metric: (metric.place, metric.name))}
