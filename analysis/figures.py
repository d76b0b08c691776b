"""The figures of a run, each said once: tables, charts, the front of a sweep and the README read what is written here.

To add one: a line here, and where it is computed. The names are the keys of a run's ``summary`` in ``replay --json``, and the
columns of a sweep's file; ``ms_per_forward`` alone is worked out here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Better = Literal["less", "more", "neither"]
IN_PARTS = "parts"
"""How a figure is written that is no number: an interval, or one number for each kind, window, lag or part."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure: its name, heading and unit, what it means, which way is better, how it is written and where it is shown.

    ``written`` is a key of :data:`WRITTEN`, or :data:`IN_PARTS`. ``axis`` is its title in a chart, where the heading does not
    say enough. ``shown`` names tables: "terminal", "page", "sweep", "interval", and as objectives of the Pareto front "front"
    (on a machine) and "bare front" (without). ``rank`` is its importance, 1 first: the last goes first where a terminal is
    narrow. ``instead`` names the figure that stands in for it in runs that denoise nothing.
    """

    name: str
    heading: str
    unit: str
    meaning: str
    better: Better = "neither"
    written: str = "count"
    axis: str = ""
    shown: tuple[str, ...] = ()
    rank: int = 99
    instead: str = ""

    @property
    def title(self) -> str:
        """What a chart's axis says."""
        return self.axis or self.heading


FIGURES = {
    figure.name: figure
    for figure in (
        Figure(
            "unique_experts", "experts/layer", "experts", "unique experts a layer, mean over denoise forwards and layers",
            "less", "two", "unique experts a layer", ("terminal", "page", "sweep", "bare front"), 3,
            instead="unique_experts_all_forwards",
        ),
        Figure(
            "unique_experts_all_forwards", "experts/layer, all", "experts", "the same over forwards of every kind",
            "less", "two", shown=("sweep",), rank=4,
        ),
        Figure(
            "tokens_per_forward", "tokens/forward", "tokens", "accepted tokens over denoise forwards",
            "more", "two", shown=("terminal", "page", "sweep"), rank=5,
        ),
        Figure(
            "resident_bytes", "held", "bytes", "expert weights in fast memory, at most",
            "less", "size", shown=("terminal", "page", "sweep", "front", "bare front"), rank=9,
        ),
        Figure(
            "hit_rate", "hit rate", "share", "token-slots whose expert was in fast memory when needed",
            "more", "percent", "hit rate, token-slots", ("terminal", "page", "sweep", "interval"), 6,
        ),
        Figure(
            "bytes_to_gpu", "to GPU", "bytes", "expert weights copied to the GPU, all forwards",
            "less", "size", "moved to the GPU, bytes", ("terminal", "page", "sweep", "interval", "bare front"), 11,
        ),
        Figure(
            "cpu_tokens", "on the CPU", "token-slots", "token-slots whose expert ran on the CPU",
            "less", shown=("sweep", "bare front"), rank=12,
        ),
        Figure(
            "working_set_bytes", "working set", "bytes", "expert weights a forward needs, mean",
            "less", "size", shown=("page",),
        ),
        Figure(
            "gate_retained", "gate kept", "share", "share of the vanilla gate weight still selected; not accuracy",
            "more", "percent", "gate weight retained", ("terminal", "page", "sweep", "front", "bare front"), 8,
        ),
        Figure(
            "latency_s", "latency, s", "seconds", "estimate, all forwards",
            "less", "three", "latency, seconds (estimate)", ("sweep", "interval", "front"), 2,
        ),
        Figure(
            "ms_per_forward", "ms/forward", "milliseconds", "estimate, mean over all forwards",
            "less", "three", shown=("terminal", "page"), rank=10,
        ),
        Figure(
            "tokens_per_s", "tokens/s", "tokens a second", "estimate",
            "more", "count", "tokens a second (estimate)", ("terminal", "page", "sweep"), 7,
        ),
        Figure(
            "speedup", "speed-up", "ratio", "estimate, against the first run",
            "more", "times", shown=("terminal", "page", "sweep"), rank=1,
        ),
        Figure("forwards", "forwards", "model calls", "forwards of every kind"),
        Figure("denoise_forwards", "denoise forwards", "model calls", "forwards that denoise"),
        Figure(
            "tokens_per_forward_with_commit", "tokens/forward, commits too", "tokens",
            "accepted tokens over denoise and commit forwards", "more", "two",
        ),
        Figure(
            "unique_experts_block", "experts/layer of the block", "experts",
            "unique experts that rows of the current block take, mean over denoise forwards and layers", "less", "two",
        ),
        Figure(
            "unique_experts_block_all_forwards", "experts/layer of the block, all", "experts",
            "the same over forwards of every kind", "less", "two",
        ),
        Figure(
            "unique_experts_per_request", "experts/layer of a request", "experts",
            "mean over requests of the unique experts of their own block", "less", "two",
        ),
        Figure(
            "unique_experts_ci95", "experts/layer, interval", "experts",
            "95% interval of unique_experts over requests, low and high", written=IN_PARTS,
        ),
        Figure("assignments", "assignments", "token-slots", "(row, layer, slot) triples in which an expert ran"),
        Figure(
            "experts_retained", "experts kept", "share", "share of a row's recorded experts still selected, mean over rows",
            "more", "percent",
        ),
        Figure(
            "load_skew", "skew", "ratio", "largest over mean load of a layer's experts, mean over denoise forwards and layers",
            "less", "two",
        ),
        Figure(
            "working_set_experts", "working sets", "experts", "experts of a layer in the last 1, 2, .. forwards, by window",
            written=IN_PARTS,
        ),
        Figure("gpu_tokens", "on the GPU", "token-slots", "token-slots whose expert ran on the GPU", "more"),
        Figure("promotions", "promotions", "experts", "experts brought into fast memory", "less"),
        Figure("demotions", "demotions", "experts", "experts that left fast memory"),
        Figure(
            "expert_hit_rate", "hit rate, experts", "share", "experts of a batch that were in fast memory when needed",
            "more", "percent",
        ),
        Figure(
            "expert_hit_rate_by_kind", "hit rate, by kind", "share", "the same by kind of forward", written=IN_PARTS
        ),
        Figure("bytes_to_host", "to host", "bytes", "expert weights copied back to the host", "less", "size"),
        Figure(
            "gpu_tokens_per_promotion", "tokens a promotion", "token-slots", "token-slots on the GPU over promotions",
            "more", "two",
        ),
        Figure("refreshes", "refreshes", "refreshes", "refreshes of the resident sets, layers summed"),
        Figure(
            "surplus_refreshes", "surplus refreshes", "share", "refreshes that met fewer active experts than the budget",
            "less", "percent",
        ),
        Figure(
            "hit_rate_by_lag", "hit rate, by lag", "share", "hit_rate by forwards since the last refresh", written=IN_PARTS
        ),
        Figure("latency", "latency, parts", "seconds", "latency_s by part; parts may overlap in time", written=IN_PARTS),
    )
}  # fmt: skip
"""All figures by name, in the order of columns."""

NUMBERS = tuple(name for name, figure in FIGURES.items() if figure.written != IN_PARTS)
BY_RANK = tuple(sorted(FIGURES.values(), key=lambda figure: figure.rank))


def shown_in(table: str) -> list[Figure]:
    """The figures of a table, in order."""
    return [figure for figure in FIGURES.values() if table in figure.shown]


def values(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Every figure of a run's summary that is a number, None where it has none."""
    seconds, forwards = summary.get("latency_s"), summary.get("forwards")
    each = None if seconds is None or not forwards else 1e3 * seconds / forwards
    return {name: summary.get(name) for name in NUMBERS} | {"ms_per_forward": each}


def size(count: float) -> str:
    """Bytes with a decimal unit, 1 MB = 10^6 bytes."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:,.0f} bytes" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


WRITTEN = {
    "count": lambda value: f"{value:,.0f}",
    "two": lambda value: f"{value:,.2f}",
    "three": lambda value: f"{value:,.3f}",
    "percent": lambda value: f"{100 * value:.1f}%",
    "size": size,
    "times": lambda value: f"{value:.2f}×",
}
"""How numbers are written."""


def figures_markdown() -> str:
    """The table of figures in the README."""
    lines = ["| figure | unit | better | meaning |", "|---|---|---|---|"]
    lines += [f"| `{f.name}` | {f.unit} | {f.better} | {f.meaning} |" for f in FIGURES.values()]
    return "\n".join(lines) + "\n"
