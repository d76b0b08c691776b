"""The report: one HTML file that needs nothing but a browser."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis import sections, sections_consistency, sections_interval
from analysis.aggregate import hardware_of, policy_of
from analysis.metrics import consistency as measure
from analysis.page import Page
from analysis.sections import Replayed
from analysis.sections_seeds import gather
from analysis.summary import ReplaySummary, TraceSummary, summarise_replay, summarise_trace
from simulator.interval import IntervalResult, find_interval
from tracer.errors import UserError

INTERVALS = 2
"""Pairs of budget and machine whose refresh intervals a report works out by itself, at most."""


def report(
    path: str | os.PathLike[str],
    traces: Sequence[Any] = (),
    results: Sequence[Any] = (),
    force: bool = False,
    consistency: Sequence[Any] | None = None,
    intervals: Sequence[Any] | None = None,
) -> Path:
    """Write one self-contained HTML page about traces, their consistency, replays and refresh intervals.

    Parameters
    ----------
    path
        File to write. The page needs no other file and no network.
    traces
        :class:`TraceSummary`, or open traces (``tracer.parquet.open_trace``), which are read once here.
    results
        :class:`ReplaySummary`, or what ``simulator.replay`` returns.
    force : bool
        Replace the file if it is there.
    consistency : sequence, optional
        For each trace, what ``analysis.metrics.consistency`` returns, or None to leave it out. Without, every open trace is
        analysed here.
    intervals : sequence, optional
        For each trace, what ``simulator.interval.find_interval`` returns, several of them, or None. Without, every open
        trace gets those of the budgets and machines that its replays under tide name, :data:`INTERVALS` of them at most.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    UserError
        The file is there and ``force`` is false, its folder is not, or a sequence has not one entry for each trace.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file to write the report to.")
    if path.exists() and not force:
        raise UserError(f"{path} is already there; name another file or pass --force to replace it.")
    if not path.parent.is_dir():
        raise UserError(f"The folder {path.parent} is not there; make it first or name another file.")
    for name, given in (("consistency", consistency or ()), ("intervals", intervals or ())):
        if given and len(given) != len(traces):
            raise UserError(
                f"{name} has {len(given)} entries for {len(traces)} traces; give one for each, None for nothing."
            )
    recorded = [_recorded(trace, i, consistency, intervals or ()) for i, trace in enumerate(traces)]
    replayed = [result if isinstance(result, ReplaySummary) else summarise_replay(result) for result in results]
    if intervals is None:
        opened = {id(summary): trace for summary, trace in zip(recorded, traces, strict=True) if summary is not trace}
        found = match(replayed, recorded)
        recorded = [
            replace(summary, intervals=_intervals(opened[id(summary)], [r for r in found if r.trace is summary]))
            if id(summary) in opened
            else summary
            for summary in recorded
        ]
    written = render(recorded, replayed)
    # Written beside and renamed, so that a reader never meets half a page.
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(written, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def _recorded(trace: Any, at: int, consistency: Sequence[Any] | None, intervals: Sequence[Any]) -> TraceSummary:
    """What the page says of the trace at that place."""
    summary = trace if isinstance(trace, TraceSummary) else summarise_trace(trace)
    if consistency:
        summary = replace(summary, consistency=consistency[at])
    elif consistency is None and summary is not trace:
        summary = replace(summary, consistency=measure(trace))
    if intervals and intervals[at] is not None:
        found = intervals[at]
        summary = replace(summary, intervals=tuple(found) if isinstance(found, Sequence) else (found,))
    return summary


def _intervals(trace: Any, replayed: Sequence[Replayed]) -> tuple[IntervalResult, ...]:
    """Refresh intervals of the budgets and machines of the replays under tide; none where the trace has no latency."""
    wanted: list[tuple[int, str, bool]] = []
    for run in (run for r in replayed for run in r.result.document.get("runs") or []):
        name, parameters = policy_of(run, "residency")
        budget, hardware = parameters.get("budget"), hardware_of(run)
        if name == "tide" and budget is not None and hardware is not None:
            wanted.append((int(budget), hardware, bool(parameters.get("copy_back", True))))
    found = []
    for budget, hardware, copy_back in list(dict.fromkeys(wanted))[:INTERVALS]:
        # A trace without blocks, or a machine that is here no more, has a page all the same.
        with suppress(UserError):
            found.append(find_interval(trace, budget, hardware, copy_back))
    return tuple(found)


def render(traces: Sequence[TraceSummary], results: Sequence[ReplaySummary]) -> str:
    """The whole page as one string."""
    out = Page("moetrace report")
    replayed, recordings = match(results, traces), gather(traces)
    sections.summary(out, traces, replayed, recordings)
    sections.recorded(out, traces)
    sections_consistency.consistency(out, traces, recordings)
    sections.policies(out, replayed)
    sections.residency(out, replayed)
    sections_interval.interval(out, traces)
    sections.cost(out, replayed)
    sections.notes(out, traces, replayed)
    sections.provenance(out, traces, replayed)
    return out.html()


def match(results: Sequence[ReplaySummary], traces: Sequence[TraceSummary]) -> list[Replayed]:
    """Each replay with its trace and a name: by the trace's name or path in the document, by place, or the only one."""
    found = []
    for i, result in enumerate(results):
        described = result.document.get("trace") or {}
        candidates = [t for t in traces if not described or _same_model(described, t)]
        label = _label(described)
        trace = next((t for t in candidates if t.name == label), None)
        if trace is None and len(results) == len(traces) and traces[i] in candidates:
            trace = traces[i]
        if trace is None and len(candidates) == 1:
            trace = candidates[0]
        found.append((trace.name if trace else label or f"replay {i + 1}", result, trace))
    names = [name for name, _, _ in found]
    return [
        Replayed(f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name, result, trace)
        for i, (name, result, trace) in enumerate(found)
    ]


def _label(described: Mapping[str, Any]) -> str:
    path = described.get("name") or described.get("path") or described.get("trace")
    if path:
        return Path(str(path)).name.removesuffix(".trace")
    return _model_id(described) or ""


def _model_id(described: Mapping[str, Any]) -> str | None:
    model = described.get("model")
    found = model.get("id") if isinstance(model, Mapping) else model
    return str(found) if found else None


def _same_model(described: Mapping[str, Any], trace: TraceSummary) -> bool:
    told = _model_id(described)
    return told is None or told == trace.model.get("id")
