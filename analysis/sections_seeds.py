"""What the report says of several recordings of one model: where they differ, and whether their experts' popularity agrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from analysis.curves import Beside, hardest, null_words, unbeaten
from analysis.findings_consistency import agreement_sentences
from analysis.metrics import across_seeds
from analysis.metrics.shared.agreement import WORDS
from analysis.page import Column, Page, bullets, heading, paragraph, plain, table
from analysis.summary import TraceSummary

ROWS = 40
"""Pairs of recordings a table lists; the mean over all pairs always stands first."""
PROMPTS = (
    "The same prompt is one that has the same number, dataset, length and, where it was kept, text in both recordings. Its "
    "nulls are the hardest of: another prompt, the popularity over other prompts, shuffled expert labels."
)
BETWEEN = {"traces": "whole recordings", "prompts": "the same prompt"}
COLUMNS = (
    Column("recordings"),
    Column("compared", meaning="whole recordings, or each prompt with itself"),
    Column("cosine", "three", "of the loads of a layer's experts, mean over layers"),
    Column("null", "three", "the null hardest to beat"),
    Column("beaten", meaning="whether the whole interval lies above every null"),
    Column("95% interval", meaning="bootstrap over prompts"),
    Column("which null", meaning="what the null is"),
    Column("rank correlation", "three", "Spearman's, of the loads"),
    Column("busiest quarter shared", "percent", "experts that are in the busiest quarter of both"),
    Column("prompts", "count", "compared with themselves"),
)


class PooledCosine(Beside):
    """The mean over pairs of recordings, by layer."""

    def rows(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Prompts first: their nulls are the harder ones, and one line a null is drawn."""
        pooled = super().rows(frame).filter(pl.col("first").is_null())
        return pooled.sort(pl.col("between") == "traces", "layer", maintain_order=True)


CHART = PooledCosine(
    title="Popularity of experts across recordings",
    subtitle="Cosine of the loads of a layer's experts in two recordings, mean over their pairs.",
    where={"metric": "cosine"},
    at="layer",
    x="layer of the model",
    noun="layer",
    y="cosine of expert loads",
    grey="Grey: nulls of the same prompt.",
    nulls=WORDS,
    lines={words: ("between", name) for name, words in BETWEEN.items()},
)


@dataclass(frozen=True, slots=True)
class Recordings:
    """Traces of one model by name, and what :func:`analysis.metrics.across_seeds` says of them."""

    model: str
    traces: Mapping[str, TraceSummary]
    frame: pl.DataFrame

    @property
    def title(self) -> str:
        """What to call them."""
        return f"{len(self.traces)} recordings of {self.model}"

    @property
    def differing(self) -> dict[str, list[str]]:
        """Settings of decoding in which they differ: each one's value, in order."""
        told = [trace.meta.get("decoding") or {} for trace in self.traces.values()]
        keys = sorted({key for decoding in told for key in decoding})
        values = {key: [plain(decoding.get(key)) for decoding in told] for key in keys}
        return {key: found for key, found in values.items() if len(set(found)) > 1}


def gather(traces: Sequence[TraceSummary]) -> list[Recordings]:
    """Traces of one model, where there are several of it that were analysed."""
    groups: dict[Any, dict[str, TraceSummary]] = {}
    for trace in traces:
        held = trace.consistency.popularity if trace.consistency is not None else None
        if held is not None:
            group = groups.setdefault((held.model, held.layers, held.load.shape[2], held.scope), {})
            again = sum(other.name == trace.name for other in group.values())
            group[f"{trace.name} ({again + 1})" if again else trace.name] = trace
    made = []
    for key, group in groups.items():
        if len(group) > 1:
            results = {name: trace.consistency for name, trace in group.items() if trace.consistency is not None}
            made.append(Recordings(key[0], group, across_seeds(results)))
    return made


def findings(recordings: Recordings) -> list[str]:
    """How well popularity agrees, in sentences."""
    sentences = []
    if recordings.differing:
        told = [f"{name} ({', '.join(values)})" for name, values in recordings.differing.items()]
        sentences.append(f"They differ in {' and '.join(told)}.")
    return sentences + agreement_sentences(recordings.frame)


def panel(out: Page, recordings: Recordings) -> list[str]:
    """A heading, the sentences, the table of pairs and a chart by layer."""
    rows = [row for between in BETWEEN for row in _rows(recordings.frame, between)]
    parts = [heading(recordings.title), bullets(findings(recordings))]
    if not rows:
        return [*parts, paragraph("No layer is used in two of these recordings, so nothing can be compared.", "empty")]
    more = f" The first {ROWS} of {len(rows)} rows are listed." if len(rows) > ROWS else ""
    parts += [table(COLUMNS, rows[:ROWS]), paragraph(PROMPTS + more, "note")]
    lines = CHART.curve(recordings.frame)
    return [*parts, out.chart(CHART.draw(lines), unbeaten(lines, CHART.noun))]


def _rows(frame: pl.DataFrame, between: str) -> list[list[Any]]:
    """The mean over pairs, where there are several, and each pair."""
    found = hardest(frame.filter((pl.col("between") == between) & pl.col("layer").is_null()))
    rows: dict[Any, dict[str, dict[str, Any]]] = {}
    for row in found.iter_rows(named=True):
        rows.setdefault((row["first"], row["second"]), {})[row["metric"]] = row
    mean = rows.pop((None, None), {})
    pairs = [(f"{first} and {second}", figures) for (first, second), figures in rows.items()]
    told = [("mean over pairs", mean), *pairs] if len(pairs) > 1 else pairs
    return [_row(name, between, figures) for name, figures in told if "cosine" in figures]


def _row(name: str, between: str, figures: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    row = figures["cosine"]
    beaten = {True: "yes", False: "no", None: None}[row["beats_null"]]
    interval = f"{row['low']:,.3f} to {row['high']:,.3f}" if row["low"] is not None else None
    null = null_words("agreement", row["null_name"]) if row["null_name"] else None
    others = [figures.get(metric, {}).get("value") for metric in ("rank_correlation", "top_overlap")]
    prompts = row["n"] if between == "prompts" else None
    return [name, BETWEEN[between], row["value"], row["null"], beaten, interval, null, *others, prompts]
