"""Tables for terminals, one function a verb; off a terminal they are as wide as they need to be."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from analysis.curves import null_words

RUN_FIGURES = (
    "experts/layer",
    "tokens/forward",
    "held",
    "hit rate",
    "to GPU",
    "gate kept",
    "ms/forward",
    "tokens/s",
    "speed-up",
)


def show(table: Table) -> None:
    """Print a table; in a pipe or a log file nothing is cut."""
    Console(width=None if sys.stdout.isatty() else 1000).print(table)


def facts_table(facts: Mapping[str, Any]) -> Table:
    """Sections of named facts, as ``moetrace info`` has them."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for section, values in facts.items():
        rows = values.items() if isinstance(values, Mapping) else [("", values)]
        for index, (key, value) in enumerate(rows):
            table.add_row(section if index == 0 else "", str(key), plain(value))
    return table


def run_table(results: Sequence[tuple[str, Sequence[tuple[str, ...]], Any]]) -> Table:
    """The figures people compare, one row a run, estimates in italics.

    Parameters
    ----------
    results : sequence
        (trace name, specs of each run as typed, ReplayResult).
    """
    table = Table(box=None, pad_edge=False)
    for name in ("trace", "routing", "residency", "hardware"):
        table.add_column(name)
    for name in RUN_FIGURES:
        table.add_column(name, justify="right")
    for trace, names, result in results:
        for specs, run in zip(names, result.to_json()["runs"], strict=True):
            summary = run["summary"]
            latency = summary["latency_s"]
            table.add_row(
                trace,
                *specs,
                run["hardware"] or "-",
                figure(summary["unique_experts"], 2),
                figure(summary["tokens_per_forward"], 2),
                f"{summary['resident_bytes'] / 1e6:.1f} MB",
                percent(summary["hit_rate"]),
                f"{summary['bytes_to_gpu'] / 1e6:.1f} MB",
                percent(summary["gate_retained"]),
                "-" if latency is None else f"{latency / max(summary['forwards'], 1) * 1e3:.3f}",
                figure(summary["tokens_per_s"], 0),
                figure(summary["speedup"], 2),
                style="italic" if run["estimate"] else None,
            )
    return table


def headline_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Consistency figures with their interval and the null hardest to beat."""
    table = Table(box=None, pad_edge=False)
    table.add_column("figure")
    for name in ("value", "95% interval", "null", "beats it"):
        table.add_column(name, justify="right")
    table.add_column("null is")
    for row in rows:
        low, high = row["low"], row["high"]
        beats = row["beats_null"]
        table.add_row(
            row["figure"],
            figure(row["value"], 3),
            "-" if low is None else f"{low:.3f} .. {high:.3f}",
            figure(row["null"], 3),
            "-" if beats is None else "yes" if beats else "no",
            null_words(row["frame"], row["null_name"]) if row["null_name"] else "-",
        )
    return table


def parallel_table(specs: Iterable[str], runs: Iterable[Mapping[str, Any]], kinds: str = "") -> Table:
    """Loads of expert-parallel groups, one row a group, estimates in italics; megabytes of weights read a forward and layer.

    ``specs`` are the routing policies as typed, ``kinds`` the suffix of the figures to show.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("routing")
    table.add_column("GPUs", justify="right")
    table.add_column("placement")
    for name in ("imbalance", "busy", "MB a GPU", "MB the fullest"):
        table.add_column(name, justify="right")
    for spec, run in zip(specs, runs, strict=True):
        sizes = [run[f"{key}{kinds}"] for key in ("mean_bytes", "max_bytes")]
        table.add_row(
            spec,
            str(run["gpus"]),
            run["placement"],
            figure(run[f"imbalance{kinds}"], 2),
            percent(run[f"busy{kinds}"]),
            *(figure(None if size is None else size / 1e6, 2) for size in sizes),
            style="italic" if run["estimate"] else None,
        )
    return table


def frame_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """Any small table; numbers to the right."""
    table = Table(box=None, pad_edge=False)
    rows = list(rows)
    for index, name in enumerate(columns):
        numeric = bool(rows) and isinstance(rows[0][index], int | float)
        table.add_column(name, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(plain(value) for value in row))
    return table


def plain(value: Any) -> str:
    """One value as people read it."""
    if isinstance(value, bool) or value is None:
        return "-" if value is None else str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(str(v) for v in value)
    return str(value)


def figure(value: float | None, digits: int) -> str:
    """A number with a fixed number of digits, "-" for None."""
    return "-" if value is None else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    """A share as percent, "-" for None."""
    return "-" if value is None else f"{100 * value:.1f}%"
