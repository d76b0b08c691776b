"""Consistency metrics of a trace: one figure each, or all of them in one pass with :func:`consistency`.

Each metric of the files in this folder is a function of its name, such as ``overlap``. It takes an open trace and the
fields of :class:`Settings` as keywords, and returns a tidy polars frame with the columns and types of ``SCHEMAS[name]``;
without anything to measure it is empty, and :func:`consistency` says why. A null ``layer`` stands for all layers. ``low``
and ``high`` are a percentile bootstrap interval over requests; ``beats_null`` says whether it lies wholly on the
consistent side of every null.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import polars as pl

from analysis.metrics.shared.analyse import consistency
from analysis.metrics.shared.metric import metrics
from analysis.metrics.shared.result import ConsistencyResult
from analysis.metrics.shared.seeds import SEEDS_COLUMNS, across
from analysis.metrics.shared.settings import Settings
from analysis.metrics.shared.study import Trace
from tracer.errors import UserError

__all__ = ["SCHEMAS", "SEEDS_COLUMNS", "ConsistencyResult", "Settings", "across_seeds", "consistency"]


def __getattr__(name: str) -> Any:
    """``SCHEMAS``, columns and polars types of every frame by name; and the function of each metric."""
    if name == "SCHEMAS":
        return {name: dict(metric.columns) for name, metric in metrics().items()}
    if name.startswith("_") or name not in metrics():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def alone(trace: Trace, **parameters: Any) -> pl.DataFrame:
        return consistency(trace, settings=Settings(**parameters), only=(name,)).frames[name]

    alone.__name__ = alone.__qualname__ = name
    alone.__doc__ = inspect.getdoc(metrics()[name])
    return alone


def __dir__() -> list[str]:
    return [*__all__, *metrics()]


def across_seeds(recordings: Mapping[str, Trace | ConsistencyResult], **parameters: Any) -> pl.DataFrame:
    """Whether expert popularity agrees across recordings of one model, such as runs with different seeds.

    Metrics as in ``agreement``, of every two recordings (``first``, ``second``) and, where both are null, mean over
    pairs. ``between`` whole ``traces``, or each of the ``prompts`` that two recordings share against itself. Nulls:
    permuted expert labels (shuffle), another prompt of the other recording (independent), the popularity over its other
    prompts (hot). A recording is an open trace or what :func:`consistency` made of it.

    Raises
    ------
    UserError
        Fewer than two recordings, a recording that routes nothing in a denoise forward, or different models.
    """
    settings = Settings(**parameters)
    popularities = {}
    for name, recording in recordings.items():
        if not isinstance(recording, ConsistencyResult):
            recording = consistency(recording, settings=settings, only=("load",))
        if recording.popularity is None:
            raise UserError(f"{name} routes nothing in a denoise forward; leave it out of the comparison.")
        popularities[name] = recording.popularity
    return across(popularities, settings)
