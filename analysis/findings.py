"""The report's opening sentences. Every figure in them is computed from the traces and replays passed in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from analysis import theme
from analysis.aggregate import one_run_a_series, runs_frame
from analysis.figures import band, cell, size
from analysis.summary import TraceSummary

MAX_COMPARED = 3
VANILLA = "vanilla"


def trace_findings(trace: TraceSummary) -> list[str]:
    """What was recorded, in one or two sentences."""
    calls = trace.calls
    model = trace.model
    layers = len(model.get("moe_layers") or [])
    sentences = [
        f"{trace.requests:,} {_plural('prompt', trace.requests)}, {sum(calls.values()):,} model calls "
        f"({calls.get('denoise', 0):,} of them denoise forwards), {trace.decisions:,} routing decisions in {layers} "
        f"{_plural('layer', layers)} of {model.get('num_experts', '?')} experts, {model.get('top_k', '?')} a token."
    ]
    denoise = trace.forwards.filter(pl.col("kind") == "denoise")
    steps = denoise.height
    if steps:
        accepted = denoise["num_accepted"]
        blocks = denoise.select("request_id", "block").n_unique()
        sentences.append(
            f"A block takes {steps / blocks:.1f} denoise forwards on average."
            if accepted.null_count()
            else f"A denoise forward accepts {int(accepted.sum()) / steps:.2f} tokens on average, and a block takes "
            f"{steps / blocks:.1f} of them."
        )
    return sentences


def replay_findings(document: Mapping[str, Any]) -> list[str]:
    """What the replay says about routing, residency and cost; estimates are called that, runs over budget never best."""
    runs = runs_frame(document)
    within = runs.filter(~pl.col("over_budget"))
    return _routing(runs, document) + _residency(within) + _cost(runs)


def _routing(runs: pl.DataFrame, document: Mapping[str, Any]) -> list[str]:
    series = one_run_a_series(runs).drop_nulls("unique_experts")
    if series.is_empty():
        return []
    rows = list(series.iter_rows(named=True))
    base = next((row for row in rows if row["routing_policy"] == "vanilla"), rows[0])
    experts = (document.get("trace") or {}).get("num_experts")
    among = f" of {experts}" if experts else ""
    sentences = [
        f"Under {base['series']} routing a denoise forward touches {base['unique_experts']:.1f}{among} experts a layer"
        + (f" and gains {base['tokens_per_forward']:.2f} tokens." if base["tokens_per_forward"] is not None else ".")
    ]
    others = [row for row in rows if row is not base and row["routing_policy"] not in theme.BOUNDS]
    for row in sorted(others, key=lambda row: row["unique_experts"])[:MAX_COMPARED]:
        change = row["unique_experts"] / base["unique_experts"] - 1 if base["unique_experts"] else 0.0
        sentence = f"Under {row['series']} it touches {row['unique_experts']:.1f}, {_change(change)}"
        if row["gate_retained"] is not None:
            sentence += f", and keeps {100 * row['gate_retained']:.1f}% of the vanilla gate weight"
        if row["tokens_per_forward"] is not None and row["tokens_per_forward"] != base["tokens_per_forward"]:
            sentence += f", at {row['tokens_per_forward']:.2f} tokens a denoise forward"
        sentences.append(sentence + _estimate(row))
    return sentences


def _residency(runs: pl.DataFrame) -> list[str]:
    first = runs["series"].head(1).to_list()
    held = runs.filter(pl.col("series").is_in(first) & ~pl.col("residency_policy").is_in(list(theme.BOUNDS)))
    held = held.drop_nulls("hit_rate").sort("hit_rate", descending=True, maintain_order=True)
    best = held.unique("residency_policy", keep="first", maintain_order=True).head(MAX_COMPARED)
    sentences = []
    for row in best.iter_rows(named=True):
        holding = f", holding {size(row['resident_bytes'])} of weights," if row["resident_bytes"] is not None else ""
        sentence = (
            f"With {row['series']} routing, {row['residency']} residency{holding} finds the expert in fast memory for "
            f"{100 * row['hit_rate']:.1f}% of the token-slots"
        )
        if row["bytes_to_gpu"] is not None and row["forwards"]:
            sentence += f" and moves {size(row['bytes_to_gpu'] / row['forwards'])} to the GPU a forward"
        sentences.append(sentence + _estimate(row))
    return sentences


def _cost(runs: pl.DataFrame) -> list[str]:
    costed = runs.drop_nulls(["tokens_per_s", "hardware"])
    runnable = costed.filter(~pl.col("residency_policy").is_in(list(theme.BOUNDS)) & ~pl.col("over_budget"))
    if runnable.is_empty():
        return []
    best = runnable.sort("tokens_per_s", descending=True, maintain_order=True).row(0, named=True)
    through = f" with the kernel {best['kernel']}" if best["kernel"] else ""
    sentence = (
        f"On {best['hardware']}{through}, {best['label']} is the fastest of the runs that do not hold every expert, at "
        f"{best['tokens_per_s']:,.0f} tokens a second"
    )
    ends = cell("speedup", best)
    if ends is not None and best["series"] != VANILLA:
        sentence += f", {band(ends)} vanilla routing with the same residency"
    return [sentence + " (estimate)."]


def _change(share: float) -> str:
    if abs(share) < 0.0005:
        return "as many"
    return f"{abs(100 * share):.1f}% {'fewer' if share < 0 else 'more'}"


def _estimate(row: Mapping[str, Any]) -> str:
    return " (estimate)." if row["estimate"] else "."


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"
