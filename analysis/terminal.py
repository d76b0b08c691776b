"""What verbs show of their results, one function a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from analysis.curves import null_words
from analysis.tables import TEXT, Column, Sheet

ALL_KINDS = "_all_forwards"
"""Ending of figures over forwards of every kind; those without it are over denoise forwards."""
RUN_KEYS = ("trace", "routing", "residency", "hardware")
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
RUN_ORDER = (
    "residency", "routing", "speed-up", "experts/layer", "tokens/forward", "hit rate", "tokens/s", "gate kept", "held",
    "ms/forward", "to GPU", "hardware", "trace",
)  # fmt: skip
INTERVAL_ORDER = (
    "refresh_interval", "latency_s", "slowdown", "objective", "hit_rate", "extra_misses", "bytes_to_gpu", "promotions",
    "objective_memoryless", "expert_hit_rate", "extra_misses_memoryless", "bytes_to_host",
)  # fmt: skip
SWEEP_COLUMNS = (
    "routing", "residency", "hardware", "estimate", "unique_experts", "unique_experts_all_forwards",
    "tokens_per_forward", "hit_rate", "bytes_to_gpu",
    "cpu_tokens", "resident_bytes", "gate_retained", "latency_s", "tokens_per_s", "speedup",
)  # fmt: skip
SWEEP_ORDER = (
    "residency", "routing", "speedup", "latency_s", "hit_rate", "unique_experts", "unique_experts_all_forwards",
    "tokens_per_forward", "gate_retained",
    "resident_bytes", "tokens_per_s", "bytes_to_gpu", "cpu_tokens", "estimate", "hardware",
)  # fmt: skip


def facts_table(facts: Mapping[str, Any]) -> Sheet:
    """Sections of named facts, as ``moetrace info`` has them."""
    rows: list[Sequence[str]] = []
    for section, values in facts.items():
        named = values.items() if isinstance(values, Mapping) else [("", values)]
        rows += [(section if index == 0 else "", str(key), plain(value)) for index, (key, value) in enumerate(named)]
    return Sheet([Column("section"), Column("fact"), Column("value", folds=TEXT)], rows, head=False)


def run_table(results: Sequence[tuple[str, Sequence[tuple[str, ...]], Any]]) -> Sheet:
    """The figures people compare, one row a run, estimates in italics; see :func:`every_kind` for runs that denoise nothing.

    Parameters
    ----------
    results : sequence
        (trace name, specs of each run as typed, ReplayResult).
    """
    rows: list[Sequence[str]] = []
    styles = []
    for trace, names, result in results:
        for specs, run in zip(names, result.to_json()["runs"], strict=True):
            summary = run["summary"]
            latency = summary["latency_s"]
            rows.append(
                (
                    trace,
                    *specs,
                    run["hardware"] or "-",
                    figure(summary[f"unique_experts{ALL_KINDS if every_kind(summary) else ''}"], 2),
                    figure(summary["tokens_per_forward"], 2),
                    f"{summary['resident_bytes'] / 1e6:.1f} MB",
                    percent(summary["hit_rate"]),
                    f"{summary['bytes_to_gpu'] / 1e6:.1f} MB",
                    percent(summary["gate_retained"]),
                    "-" if latency is None else f"{latency / max(summary['forwards'], 1) * 1e3:.3f}",
                    figure(summary["tokens_per_s"], 0),
                    figure(summary["speedup"], 2),
                )
            )
            styles.append("italic" if run["estimate"] else None)
    columns = [Column(name, folds=TEXT) for name in RUN_KEYS] + [Column(name, right=True) for name in RUN_FIGURES]
    return Sheet(columns, rows, RUN_KEYS, RUN_ORDER, styles)


def every_kind(summary: Mapping[str, Any]) -> bool:
    """Whether experts a layer are to be told over forwards of every kind, as none of a run's denoises."""
    return summary["unique_experts"] is None and summary.get(f"unique_experts{ALL_KINDS}") is not None


def headline_table(rows: Iterable[Mapping[str, Any]]) -> Sheet:
    """Consistency figures with their interval and the null hardest to beat."""
    found: list[Sequence[str]] = []
    for row in rows:
        low, high = row["low"], row["high"]
        beats = row["beats_null"]
        found.append(
            (
                row["figure"],
                figure(row["value"], 3),
                "-" if low is None else f"{low:.3f} .. {high:.3f}",
                figure(row["null"], 3),
                "-" if beats is None else "yes" if beats else "no",
                null_words(row["frame"], row["null_name"]) if row["null_name"] else "-",
            )
        )
    figures = [Column(name, right=True) for name in ("value", "95% interval", "null", "beats it")]
    columns = [Column("figure", folds=TEXT), *figures, Column("null is", folds=TEXT)]
    order = ("figure", "value", "null", "95% interval", "beats it", "null is")
    return Sheet(columns, found, ("figure",), order)


def parallel_table(specs: Iterable[str], runs: Iterable[Mapping[str, Any]], kinds: str = "") -> Sheet:
    """Loads of expert-parallel groups, one row a group, estimates in italics; megabytes of weights read a forward and layer.

    ``specs`` are the routing policies as typed, ``kinds`` the suffix of the figures to show.
    """
    rows: list[Sequence[str]] = []
    styles = []
    for spec, run in zip(specs, runs, strict=True):
        sizes = [run[f"{key}{kinds}"] for key in ("mean_bytes", "max_bytes")]
        rows.append(
            (
                spec,
                str(run["gpus"]),
                run["placement"],
                figure(run[f"imbalance{kinds}"], 2),
                percent(run[f"busy{kinds}"]),
                *(figure(None if size is None else size / 1e6, 2) for size in sizes),
            )
        )
        styles.append("italic" if run["estimate"] else None)
    figures = [Column(name, right=True) for name in ("imbalance", "busy", "MB a GPU", "MB the fullest")]
    columns = [Column("routing", folds=TEXT), Column("GPUs", right=True), Column("placement"), *figures]
    keys = ("routing", "GPUs", "placement")
    order = (*keys[::-1], "imbalance", "busy", "MB the fullest", "MB a GPU")
    return Sheet(columns, rows, keys, order, styles)


def frame_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    keys: Sequence[str] = (),
    order: Sequence[str] = (),
    folds: int = TEXT,
) -> Sheet:
    """Any small table; numbers to the right, texts folded to ``folds`` cells. ``keys`` and ``order`` as of a ``Sheet``."""
    values = list(rows)
    made = []
    for index, name in enumerate(columns):
        given = [row[index] for row in values if row[index] is not None]
        numbers = bool(given) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in given)
        made.append(Column(name, right=numbers, folds=0 if numbers else folds))
    return Sheet(made, [[plain(value) for value in row] for row in values], keys, order)


def plain(value: Any) -> str:
    """One value as people read it."""
    if isinstance(value, bool) or value is None:
        return "-" if value is None else str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
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
