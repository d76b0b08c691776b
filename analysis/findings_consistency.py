"""What a consistency analysis says, in sentences. Every figure in them is computed from the result passed in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from analysis.curves import hardest, null_words
from analysis.metrics.result import ConsistencyResult

STEP, FAR = "same position, next step: Jaccard", "same position, farthest step: Jaccard"
MASKED, KNOWN, FLIPPED = "  still masked", "  known before and after", "  accepted in between"
COUNTS, UNIQUE = "expert counts, next step: cosine", "unique experts of a block, a layer"
SPATIAL, NEXT = "neighbouring positions: Jaccard", "next layer's experts foretold"


def consistency_findings(result: ConsistencyResult) -> list[str]:
    """How stable routing is, against its nulls; one sentence a figure, those that do not beat their null last."""
    rows = {row["figure"]: row for row in result.headline()}
    sentences = []
    if STEP in rows:
        near = rows[STEP]
        sentence = (
            f"A position's experts overlap from step to step with a Jaccard of {near['value']:.2f}{_against(near)}"
        )
        if FAR in rows:
            apart = int(result.frames["overlap"]["distance"].to_numpy().max())
            sentence += f", and {rows[FAR]['value']:.2f} at {apart} steps" if apart > 1 else ""
        accepted = result.summary.get("accepted_per_step")
        sentences.append(sentence + (f", at {accepted:.2f} accepted tokens a step." if accepted is not None else "."))
    told = [(name, rows[name]["value"]) for name in (MASKED, KNOWN) if name in rows]
    if FLIPPED in rows and told:
        rest = " and ".join(f"{value:.2f} where it is {name.strip()}" for name, value in told)
        sentences.append(
            f"Where the token is accepted in between it is {rows[FLIPPED]['value']:.2f}{_against(rows[FLIPPED])}; {rest}."
        )
    if COUNTS in rows:
        row = rows[COUNTS]
        sentences.append(f"Expert counts of consecutive steps have a cosine of {row['value']:.3f}{_against(row, 3)}.")
    if UNIQUE in rows:
        row = rows[UNIQUE]
        sentences.append(
            f"The block's rows touch {row['value']:.1f} experts a layer in a denoise forward{_against(row, 1)}"
            f"{_formula(result)}."
        )
    if NEXT in rows:
        row = rows[NEXT]
        sentences.append(
            f"A layer foretells {100 * row['value']:.0f}% of the next one's experts"
            + (f", against {100 * row['null']:.0f}% by {_null(row)}." if row["null"] is not None else ".")
        )
    return sentences + unbeaten_findings(result)


def _formula(result: ConsistencyResult) -> str:
    """What independent routing without popularity, E (1 - (1 - K / E)^n), makes of the longest growth curve."""
    growth = result.frames.get("growth")
    if growth is None or growth.is_empty():
        return ""
    whole = growth.filter(pl.col("layer").is_null(), pl.col("order") == "position").sort("rows")
    last = whole.row(-1, named=True)
    times = last["null_uniform"] / last["value"]
    said = f"{last['null_uniform']:.1f} for {last['rows']} rows, {times:.2f} times as many"
    return f"; the formula of independent routing says {said}"


def agreement_sentences(seeds: pl.DataFrame) -> list[str]:
    """How well expert popularity agrees across recordings, as :func:`analysis.metrics.across_seeds` measured it."""
    cosine = (pl.col("metric") == "cosine") & pl.col("layer").is_null() & pl.col("first").is_null()
    found = {row["between"]: row for row in hardest(seeds.filter(cosine)).iter_rows(named=True)}
    words = {
        "traces": "The popularity of a layer's experts agrees with a cosine of",
        "prompts": "For the same prompt its cosine is",
    }
    sentences = []
    for between, start in words.items():
        if between in found:
            row = found[between]
            told = "" if row["null"] is None else f" ({null_words('seeds', row['null_name'])}: {row['null']:.3f})"
            lost = ", which does not beat its null" if row["beats_null"] is False else ""
            sentences.append(f"{start} {row['value']:.3f}{told}{lost}.")
    return sentences


def unbeaten_findings(result: ConsistencyResult) -> list[str]:
    """A sentence for each headline figure that does not beat its null."""
    found, whole = [], ""
    for row in result.headline():
        figure = row["figure"]
        if figure.startswith(" "):
            # A part of the figure above it says nothing alone.
            figure = f"{whole}, {figure.strip()}"
        else:
            whole = figure
        if row["beats_null"] is False and row["null"] is not None and row["low"] is not None:
            found.append(
                f"{_capital(figure)} ({row['value']:.3f}) does not beat its null: {_null(row)} has {row['null']:.3f}, and "
                f"the interval is {row['low']:.3f} to {row['high']:.3f}."
            )
    return found


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _null(row: Mapping[str, Any]) -> str:
    return null_words(row["frame"], row["null_name"])


def _against(row: Mapping[str, Any], digits: int = 2) -> str:
    if row["null"] is None:
        return ""
    return f" ({_null(row)}: {row['null']:.{digits}f})"
