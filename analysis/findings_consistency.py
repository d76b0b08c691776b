"""What a consistency analysis says, in sentences. Every figure in them is computed from the result passed in."""

from __future__ import annotations

import polars as pl

from analysis.curves import hardest, null_of, null_words
from analysis.metrics import ConsistencyResult
from analysis.metrics.shared.metric import metrics


def consistency_findings(result: ConsistencyResult) -> list[str]:
    """How stable routing is, against its nulls; what each metric has to say, then what does not beat its null."""
    rows = {row["figure"]: row for row in result.headline()}
    said = [sentence for metric in metrics().values() for sentence in metric.findings(result, rows)]
    return said + unbeaten_findings(result)


def agreement_sentences(seeds: pl.DataFrame) -> list[str]:
    """How well expert popularity agrees across recordings, as :func:`analysis.metrics.across_seeds` measured it."""
    cosine = (pl.col("metric") == "cosine") & pl.col("layer").is_null() & pl.col("first").is_null()
    pooled = {row["between"]: row for row in hardest(seeds.filter(cosine)).iter_rows(named=True)}
    words = {
        "traces": "The popularity of a layer's experts agrees with a cosine of",
        "prompts": "For the same prompt its cosine is",
    }
    sentences = []
    for between, start in words.items():
        if between in pooled:
            row = pooled[between]
            told = "" if row["null"] is None else f" ({null_words('agreement', row['null_name'])}: {row['null']:.3f})"
            lost = ", which does not beat its null" if row["beats_null"] is False else ""
            sentences.append(f"{start} {row['value']:.3f}{told}{lost}.")
    return sentences


def unbeaten_findings(result: ConsistencyResult) -> list[str]:
    """A sentence for each headline figure that does not beat its null."""
    sentences, whole = [], ""
    for row in result.headline():
        figure = row["figure"]
        if figure.startswith(" "):
            # A part of the figure above it says nothing alone.
            figure = f"{whole}, {figure.strip()}"
        else:
            whole = figure
        if row["beats_null"] is False and row["null"] is not None and row["low"] is not None:
            sentences.append(
                f"{figure[:1].upper()}{figure[1:]} ({row['value']:.3f}) does not beat its null: {null_of(row)} has "
                f"{row['null']:.3f}, and the interval is {row['low']:.3f} to {row['high']:.3f}."
            )
    return sentences
