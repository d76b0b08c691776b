"""The report's sections, one function each: it puts tables, charts and sentences about what was passed in on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from analysis import aggregate, charts, figures, findings
from analysis.figures import size
from analysis.findings_consistency import consistency_findings
from analysis.page import Column, Page, bullets, facts, heading, pair, paragraph, table
from analysis.sections_seeds import Recordings
from analysis.sections_seeds import findings as across
from analysis.summary import ReplaySummary, TraceSummary
from simulator.presets import BAND

OPEN_LOOP = (
    "Rows in italics and figures marked as estimates come from an open-loop replay: it takes the hidden states and the "
    "predictions that were recorded. Another choice of experts, or other accepted tokens, would have changed both, and the "
    "routing of every later layer and step with them."
)
GATE = "The share of gate weight kept says how much of the recorded mixture of experts is left. It is not an accuracy."
COSTED = (
    "Latency, tokens a second and speed-up are computed from a hardware preset, not measured. A speed-up is against vanilla "
    "routing on the recorded forwards with the same residency, machine and kernel: a band over the kernels "
    f"{' and '.join(BAND)}."
)
NO_RUNS = "No replay was passed to this report, so there is nothing to compare."

RUN_COLUMNS = (
    (
        "series",
        Column("routing", meaning="routing policy, with the acceptance policy where it is not the recorded one"),
    ),
    ("residency", Column("residency", meaning="which experts are in fast memory")),
    ("hardware", Column("hardware", meaning="preset the latency is estimated on")),
    ("kernel", Column("kernel", meaning="what runs a layer's experts on its GPU")),
    *((figure.name, Column(figure.heading, figure.written, figure.meaning)) for figure in figures.shown_in("page")),
)


@dataclass(frozen=True, slots=True)
class Replayed:
    """A replay, what to call it, and the trace it replays where that was passed too."""

    name: str
    result: ReplaySummary
    trace: TraceSummary | None = None

    @property
    def runs(self) -> pl.DataFrame:
        """One row a run."""
        return aggregate.runs_frame(self.result.document)

    @property
    def forwards(self) -> pl.DataFrame | None:
        """The forwards its cells lie on, its own before the trace's."""
        if self.result.forwards is not None:
            return self.result.forwards
        return self.trace.forwards if self.trace else None


def summary(
    out: Page, traces: Sequence[TraceSummary], replayed: Sequence[Replayed], recordings: Sequence[Recordings]
) -> None:
    """The opening sentences."""
    found: dict[str, list[str]] = {}
    for trace in traces:
        measured = consistency_findings(trace.consistency) if trace.consistency is not None else []
        found.setdefault(trace.name, []).extend([*findings.trace_findings(trace), *measured])
    for r in replayed:
        found.setdefault(r.trace.name if r.trace else r.name, []).extend(findings.replay_findings(r.result.document))
    found |= {several.title: across(several) for several in recordings}
    told = [heading(name) + bullets(sentences) for name, sentences in found.items() if sentences]
    shown = pair(*(f"<div>{group}</div>" for group in told))
    if not told:
        shown = paragraph("Neither a trace nor a replay was passed to this report.", "empty")
    estimated = any(r.runs["estimate"].any() for r in replayed)
    out.section("summary", "Summary", shown, paragraph(OPEN_LOOP, "note") if estimated else "")


def recorded(out: Page, traces: Sequence[TraceSummary]) -> None:
    """What each trace holds."""
    if not traces:
        out.section("recorded", "What was recorded", paragraph("No trace was passed to this report.", "empty"))
        return
    columns = [
        Column("trace"),
        Column("model"),
        Column("experts E", "count"),
        Column("a token K", "count"),
        Column("MoE layers", "count"),
        Column("prompts", "count"),
        Column("model calls", "count"),
        Column("decisions", "count", "(row, layer, slot) triples in which an expert was selected"),
        Column("on disk", "size", "all tables"),
        Column("bytes a decision", "two", "compressed expert ids and gate weights over decisions"),
        Column("ids alone", "two", "compressed expert ids over decisions"),
        Column("level", meaning="capture level: ids, active or scores"),
    ]
    rows = [
        [
            trace.name,
            str(trace.model.get("id", "–")),
            trace.model.get("num_experts"),
            trace.model.get("top_k"),
            len(trace.model.get("moe_layers") or []),
            trace.requests,
            sum(trace.calls.values()),
            trace.decisions,
            sum(trace.bytes_on_disk.values()) or None,
            _share(sum(trace.cell_bytes.values()), trace.decisions),
            _share(trace.cell_bytes.get("expert_ids"), trace.decisions),
            trace.meta.get("capture_level"),
        ]
        for trace in traces
    ]
    panels = [part for trace in traces for part in _trace_panel(out, trace)]
    out.section("recorded", "What was recorded", table(columns, rows), *panels)


def _share(part: float | None, whole: int) -> float | None:
    return part / whole if part and whole else None


def _trace_panel(out: Page, trace: TraceSummary) -> list[str]:
    progress = aggregate.block_progress(trace.forwards)
    if progress.is_empty():
        filled = paragraph("This trace holds no denoise forward in a block, so there is no block to watch.", "empty")
    else:
        filled = out.chart(charts.block_progress(progress))
    experts = int(trace.model.get("num_experts") or 1 + max(trace.load["expert_id"].to_list(), default=0))
    if trace.decisions:
        loaded = out.chart(charts.load_by_rank(aggregate.load_by_rank(trace.load, experts)))
    else:
        loaded = paragraph("This trace holds no routing decision, so no expert has a load.", "empty")
    return [heading(trace.name), pair(filled, loaded)]


def policies(out: Page, replayed: Sequence[Replayed]) -> None:
    """Every run in a table, and what routing does."""
    if not any(r.runs.height for r in replayed):
        out.section("policies", "Policies", paragraph(NO_RUNS, "empty"))
        return
    parts = [paragraph("A click on a heading sorts the table. Italics mark estimates.", "note")]
    for r in replayed:
        machines = r.runs.select("hardware", "kernel").unique(maintain_order=True).rows()
        costed = []
        if len(machines) == 1 and machines[0][0]:
            machine, kernel = machines[0]
            through = f" with the kernel {kernel}" if kernel else ""
            costed = [paragraph(f"Latency is estimated on {machine}{through}. {COSTED}", "note")]
        parts += [heading(r.name), *costed, _run_table(r.runs), *_routing_charts(out, r)]
    out.section("policies", "Policies", *parts)


def _run_table(runs: pl.DataFrame) -> str:
    if runs.is_empty():
        return paragraph("This replay holds no run.", "empty")
    told = [key for key, _ in RUN_COLUMNS if runs[key].null_count() < runs.height]
    told = [key for key in told if key not in ("hardware", "kernel") or runs[key].n_unique() > 1]
    shown = [(key, column) for key, column in RUN_COLUMNS if key in told]
    rows = [[figures.cell(key, row) for key, _ in shown] for row in runs.iter_rows(named=True)]
    return table([column for _, column in shown], rows, marked=runs["estimate"].to_list())


def _routing_charts(out: Page, r: Replayed) -> list[str]:
    runs = r.runs
    if runs.is_empty():
        return []
    drawn = []
    series = runs["series"].n_unique()
    note = f"The first {aggregate.MAX_SERIES} of {series} are drawn." if series > aggregate.MAX_SERIES else ""
    if r.result.cells is None or r.forwards is None or r.result.cells.is_empty():
        why = "The cells of this replay or the trace they belong to were not passed, so nothing is drawn by step or layer."
        drawn.append(paragraph(why, "empty"))
    else:
        absent = aggregate.left_out(r.forwards, runs)
        if absent:
            note += f" Not drawn, as their forwards are not the recorded ones: {', '.join(absent)}."
        for draw, gather in (
            (charts.unique_by_step, aggregate.unique_by_step),
            (charts.unique_by_layer, aggregate.unique_by_layer),
        ):
            frame = gather(r.result.cells, r.forwards, runs)
            if frame.height:
                drawn.append(out.chart(draw(frame), note))
        if not drawn:
            drawn.append(paragraph("No cell of this replay lies in a recorded denoise forward.", "empty"))
    choice = aggregate.one_run_a_series(runs).drop_nulls(["unique_experts", "gate_retained"])
    if choice["series"].n_unique() > 1:
        drawn.append(out.chart(charts.tradeoff(choice)))
    return [pair(*drawn)]


def residency(out: Page, replayed: Sequence[Replayed]) -> None:
    """Hit rates, traffic, and what budget and interval do."""
    parts = []
    for r in replayed:
        runs = aggregate.whole_groups(r.runs)
        hits = runs.drop_nulls("hit_rate")
        if hits.is_empty():
            continue
        some, every = (frame.select("series", "residency").n_unique() for frame in (runs, r.runs))
        note = f"{some} of {every} pairs are drawn; the table lists all." if some < every else ""
        drawn = [out.chart(charts.bars(hits, "hit_rate", "expert_hit_rate"), note)]
        if runs["bytes_to_gpu"].sum():
            drawn.append(out.chart(charts.traffic(runs), note))
        else:
            drawn.append(paragraph("No run of this replay moves weights to the GPU.", "empty"))
        for parameter in ("budget", "refresh_interval"):
            lines = aggregate.by_parameter(r.result.document, parameter)
            if lines.height:
                drawn.append(out.chart(charts.by_parameter(lines, parameter, "hit_rate")))
        parts += [heading(r.name), pair(*drawn)]
    why = "No run of the replays passed reports hit rates." if replayed else NO_RUNS
    out.section("residency", "Residency", *(parts or [paragraph(why, "empty")]))


def cost(out: Page, replayed: Sequence[Replayed]) -> None:
    """Latency estimates by part, and against the budget."""
    parts = []
    for r in replayed:
        frame = aggregate.latency_parts(r.result.document)
        if frame.is_empty():
            continue
        some, every = frame["label"].n_unique(), r.runs.drop_nulls("latency_s")["label"].n_unique()
        note = f"The first {some} of {every} runs are drawn; the table lists all." if some < every else ""
        drawn = [out.chart(charts.latency(frame), note)]
        lines = aggregate.by_parameter(r.result.document, "budget")
        if lines["tokens_per_s"].count():
            drawn.append(out.chart(charts.by_parameter(lines, "budget", "tokens_per_s")))
        parts += [heading(r.name), pair(*drawn) if len(drawn) > 1 else drawn[0]]
    if parts:
        parts.insert(0, paragraph(COSTED, "note"))
    why = "No run names a hardware preset, so nothing has a latency." if replayed else NO_RUNS
    out.section("cost", "Cost", *(parts or [paragraph(why, "empty")]))


def notes(out: Page, traces: Sequence[TraceSummary], replayed: Sequence[Replayed]) -> None:
    """Limits of the method, and every note of every run once."""
    limits = [GATE]
    if any(r.runs["estimate"].any() for r in replayed):
        limits.insert(0, OPEN_LOOP)
    if any(r.runs["tokens_per_s"].count() for r in replayed):
        limits.append(COSTED)
    parts = [bullets([*(note for trace in traces for note in trace.notes), *limits])]
    for r in replayed:
        told: dict[str, list[str]] = {}
        labels = r.runs["label"].to_list()
        for label, run in zip(labels, r.result.document.get("runs") or [], strict=True):
            for note in run.get("notes") or []:
                told.setdefault(str(note), []).append(label)
        if told:
            sentences = [n if len(on) == len(labels) else f"{n} ({_some(on)})" for n, on in told.items()]
            parts += [heading(r.name), bullets(sentences)]
    out.section("notes", "Notes and limits", *parts)


def _some(labels: list[str]) -> str:
    return "; ".join(labels[:4]) + (f"; and {len(labels) - 4} more" if len(labels) > 4 else "")


def provenance(out: Page, traces: Sequence[TraceSummary], replayed: Sequence[Replayed]) -> None:
    """Where the traces come from, how they were decoded, and the policies with every parameter."""
    sources, parts = [], []
    for trace in traces:
        told: dict[str, Any] = {"created": trace.meta.get("created"), "complete": trace.meta.get("complete")}
        told |= {f"model {key}": value for key, value in trace.model.items() if key != "expert_bytes"}
        told["model expert_bytes"] = _expert_bytes(trace.model.get("expert_bytes"))
        told |= {f"decoding {key}": value for key, value in (trace.meta.get("decoding") or {}).items()}
        told |= dict(trace.meta.get("provenance") or {})
        known = {key: value for key, value in told.items() if value is not None}
        sources.append(f"<div>{heading(trace.name)}{facts(known)}</div>")
    for r in replayed:
        axes = ("acceptance", "routing", "residency")
        full: dict[str, Mapping[str, Any]] = {}
        for run in r.result.document.get("runs") or []:
            for axis in axes:
                name, parameters = aggregate.policy_of(run, axis)
                full[f"{axis} {name} {sorted(parameters.items(), key=str)}"] = {
                    "axis": axis,
                    "name": name,
                    **parameters,
                }
        if full:
            rows = [
                [p["axis"], p["name"], ", ".join(f"{k}={v}" for k, v in p.items() if k not in ("axis", "name"))]
                for p in full.values()
            ]
            columns = [Column("axis"), Column("policy"), Column("parameters")]
            parts += [heading(f"Policies replayed on {r.name}"), table(columns, rows)]
    if sources:
        parts.insert(0, pair(*sources))
    out.section("provenance", "Provenance", *(parts or [paragraph("Nothing was passed to this report.", "empty")]))


def _expert_bytes(value: Any) -> str | None:
    if isinstance(value, Mapping):
        return ", ".join(f"layer {layer}: {size(count)}" for layer, count in value.items())
    return size(value) if value is not None else None
