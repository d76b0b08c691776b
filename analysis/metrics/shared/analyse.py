"""All consistency figures of a trace in one pass over its segments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import polars as pl

from analysis.metrics.shared.bootstrap import Bootstrap
from analysis.metrics.shared.load import Load
from analysis.metrics.shared.metric import Metric, metrics
from analysis.metrics.shared.result import ConsistencyResult
from analysis.metrics.shared.seeds import popularity_of
from analysis.metrics.shared.settings import UNITS, Settings
from analysis.metrics.shared.study import Study, Trace
from tracer.errors import UserError


def consistency(
    trace: Trace,
    progress: Callable[[int], Any] | None = None,
    *,
    settings: Settings | None = None,
    only: Iterable[str] | None = None,
) -> ConsistencyResult:
    """Every consistency figure of a trace beside its nulls, in one pass over the segments.

    Parameters
    ----------
    trace : Trace
        What :func:`tracer.parquet.open_trace` returns.
    progress : callable, optional
        Called after each segment with the number of model calls read so far.
    settings : Settings, optional
        Distances, budgets, bootstrap and sample sizes.
    only : iterable of str, optional
        Names of metrics; all by default.

    Returns
    -------
    ConsistencyResult
        A frame per name, with the columns of its metric; one without rows has its reason in ``reasons``.

    Raises
    ------
    UserError
        ``only`` names a figure that does not exist.
    """
    settings, known = settings or Settings(), metrics()
    wanted = {name: known.get(name) for name in (known if only is None else only)}
    for name, metric in wanted.items():
        if metric is None:
            raise UserError(f"There is no consistency figure {name!r}; choose among {', '.join(known)}.")
    chosen = [known[name] for name in wanted]
    study = Study(trace, settings)
    usable = [metric for metric in chosen if study.has_blocks or not metric.by_position]
    load = study.watch(Load) if any(metric.routed for metric in usable) else None
    measured = {
        metric.name: [study.watch(metric, scope) for scope in (study.scopes if metric.by_scope else study.scopes[:1])]
        for metric in usable
    }
    study.run(progress)
    units, routed = study.units.count, study.totals.denoise and study.totals.decisions
    bootstrap = Bootstrap(units, settings.replicates, settings.level, settings.seed)
    frames = {metric.name: pl.DataFrame(schema=dict(metric.columns)) for metric in chosen}
    if routed:
        frames |= {name: pl.concat([one.frame(bootstrap) for one in ones]) for name, ones in measured.items()}
    reasons = {metric.name: _reason(metric, study) for metric in chosen if not frames[metric.name].height}
    if units < 2:
        reasons["intervals"] = "Intervals resample requests, and there are fewer than two with denoise forwards."
    popularity = popularity_of(study, load.load) if load is not None and study.totals.decisions and units else None
    return ConsistencyResult(frames, reasons, _summary(study), _notes(study), popularity)


def _reason(metric: type[Metric], study: Study) -> str:
    """Why a frame has no rows, in a sentence."""
    if study.totals.denoise == 0:
        return "The trace has no denoise forwards."
    if study.totals.decisions == 0:
        return "No row of the trace is routed in any MoE layer."
    if metric.by_position and not study.has_blocks:
        if study.has_tokens:
            return "The trace has no blocks: decoding.block_length is missing or 0 in meta.json."
        return "The trace has no tokens table, which says position and state of each row."
    return metric.reason


def _summary(study: Study) -> dict[str, Any]:
    totals, shape = study.totals, study.shape
    return {
        "requests": len(study.units.number),
        "segments": totals.segments,
        "forwards": totals.forwards,
        "denoise_forwards": totals.denoise,
        "blocks": totals.blocks,
        "decisions": totals.decisions,
        "accepted_per_step": totals.accepted / totals.denoise if totals.denoise and totals.accepted_known else None,
        "steps_per_block": totals.denoise / totals.blocks if totals.blocks else None,
        "layers": len(shape.layers),
        "num_experts": shape.experts,
        "top_k": max(shape.top_k, default=0),
        "block_length": shape.block_length,
    }


def _notes(study: Study) -> list[str]:
    requests = len(study.units.number)
    notes = [
        *getattr(study.trace, "notes", ()),
        "Overlap depends on how many tokens a step accepts; read it beside the tokens accepted a step.",
        "Intervals are 95% percentile bootstrap intervals over requests unless asked otherwise.",
    ]
    if requests > UNITS:
        notes.append(f"The {requests} requests are resampled in {UNITS} groups.")
    return notes
