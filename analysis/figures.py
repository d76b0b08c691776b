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
    """A figure: its name and unit, what it means, which way is better, how it is written and where it is shown.

    ``written`` is a key of :data:`WRITTEN`, or :data:`IN_PARTS`; a "band" is a number with two ends. ``shown`` names tables:
    "terminal", "page", "sweep", "interval", and as objectives of the Pareto front "front" (on a machine) and "bare front"
    (without); ``heading`` is what stands over its column, ``axis`` its title in a chart where the heading does not say
    enough. ``rank`` is its importance, 1 first: the last goes first where a terminal is narrow. ``instead`` names the figure
    that stands in for it in runs that denoise nothing.
    """

    name: str
    unit: str
    meaning: str
    better: Better = "neither"
    written: str = "count"
    shown: tuple[str, ...] = ()
    rank: int = 99
    heading: str = ""
    axis: str = ""
    instead: str = ""

    @property
    def title(self) -> str:
        """What a chart's axis says."""
        return self.axis or self.heading or self.name.replace("_", " ")


_ALL = (
    Figure("unique_experts", "experts", "unique experts a layer, mean over denoise forwards and layers", "less", "two",
           ("terminal", "page", "sweep", "bare front"), 3, "experts/layer", "unique experts a layer",
           instead="unique_experts_all_forwards"),
    Figure("unique_experts_all_forwards", "experts", "the same over forwards of every kind", "less", "two", ("sweep",), 4),
    Figure("tokens_per_forward", "tokens", "accepted tokens over denoise forwards", "more", "two",
           ("terminal", "page", "sweep"), 5, "tokens/forward"),
    Figure("resident_bytes", "bytes", "expert weights in fast memory at most, the staging slot apart", "less", "size",
           ("terminal", "page", "sweep", "front", "bare front"), 9, "held"),
    Figure("hit_rate", "share", "token-slots whose expert was in fast memory when needed", "more", "percent",
           ("terminal", "page", "sweep", "interval"), 6, "hit rate", "hit rate, token-slots"),
    Figure("bytes_to_gpu", "bytes", "expert weights copied to the GPU, all forwards", "less", "size",
           ("terminal", "page", "sweep", "interval", "bare front"), 11, "to GPU", "moved to the GPU, bytes"),
    Figure("cpu_tokens", "token-slots", "token-slots whose expert ran on the CPU", "less",
           shown=("sweep", "bare front"), rank=12),
    Figure("working_set_bytes", "bytes", "expert weights a forward needs, mean", "less", "size",
           ("page",), heading="working set"),
    Figure("gate_retained", "share", "share of the vanilla gate weight still selected; not accuracy", "more", "percent",
           ("terminal", "page", "sweep", "front", "bare front"), 8, "gate kept", "gate weight retained"),
    Figure("latency_s", "seconds", "estimate, all forwards", "less", "three",
           ("sweep", "interval", "front"), 2, "latency, s", "latency, seconds (estimate)"),
    Figure("ms_per_forward", "milliseconds", "estimate, mean over all forwards", "less", "three",
           ("terminal", "page"), 10, "ms/forward"),
    Figure("tokens_per_s", "tokens a second", "estimate", "more", "count",
           ("terminal", "page", "sweep"), 7, "tokens/s", "tokens a second (estimate)"),
    Figure("speedup", "ratio", "estimate, against vanilla routing on the recorded forwards with the same residency, "
           "machine and kernel; low and high: over the kernels grouped_mm and vllm_fused", "more", "band",
           ("terminal", "page", "sweep"), 1, "speed-up"),
    Figure("speedup_residency", "ratio", "estimate, against the better of lru and static of the same bytes under the same "
           "routing", "more", "times", ("terminal", "page", "sweep"), 13, "over lru and static"),
    Figure("forwards", "model calls", "forwards of every kind"),
    Figure("denoise_forwards", "model calls", "forwards that denoise"),
    Figure("tokens_per_forward_with_commit", "tokens", "accepted tokens over denoise and commit forwards", "more", "two"),
    Figure("unique_experts_block", "experts", "unique experts of the current block's rows, mean as above", "less", "two"),
    Figure("unique_experts_block_all_forwards", "experts", "the same over forwards of every kind", "less", "two"),
    Figure("unique_experts_per_request", "experts", "mean over requests of what their own block takes", "less", "two"),
    Figure("unique_experts_ci95", "experts", "95% interval of unique_experts over requests", written=IN_PARTS),
    Figure("assignments", "token-slots", "(row, layer, slot) triples in which an expert ran"),
    Figure("experts_retained", "share", "share of a row's recorded experts still selected, mean", "more", "percent"),
    Figure("load_skew", "ratio", "largest over mean load of a layer's experts, mean over denoise forwards", "less", "two"),
    Figure("working_set_experts", "experts", "distinct experts of a layer in 1, 2, .. forwards, mean", written=IN_PARTS),
    Figure("gpu_tokens", "token-slots", "token-slots whose expert ran on the GPU", "more"),
    Figure("promotions", "experts", "experts brought into fast memory", "less"),
    Figure("demotions", "experts", "experts that left fast memory"),
    Figure("expert_hit_rate", "share", "experts of a batch in fast memory when needed", "more", "percent",
           axis="hit rate, experts"),
    Figure("expert_hit_rate_by_kind", "share", "the same by kind of forward", written=IN_PARTS),
    Figure("bytes_to_host", "bytes", "expert weights copied back to the host", "less", "size"),
    Figure("staging_bytes", "bytes", "slot that experts missing from a cache pass through, outside its budget", "less", "size"),
    Figure("gpu_tokens_per_promotion", "token-slots", "token-slots on the GPU over promotions", "more", "two"),
    Figure("refreshes", "refreshes", "refreshes of the resident sets, layers summed"),
    Figure("surplus_refreshes", "share", "refreshes with fewer active experts than the budget", "less", "percent"),
    Figure("hit_rate_by_lag", "share", "hit_rate by forwards since the last refresh", written=IN_PARTS),
    Figure("latency", "seconds", "latency_s by part; parts may overlap in time", written=IN_PARTS),
)  # fmt: skip

FIGURES = {figure.name: figure for figure in _ALL}
"""All figures by name, in the order of columns."""
NUMBERS = tuple(name for name, figure in FIGURES.items() if figure.written != IN_PARTS)
BANDS = tuple(name for name in NUMBERS if FIGURES[name].written == "band")
COLUMNS = (*NUMBERS, *(f"{name}.{end}" for name in BANDS for end in ("low", "high")))
"""Columns of figures in a table of runs."""
BY_RANK = tuple(sorted(FIGURES.values(), key=lambda figure: figure.rank))


def shown_in(table: str) -> list[Figure]:
    """The figures of a table, in order."""
    return [figure for figure in FIGURES.values() if table in figure.shown]


def values(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Every figure of a run's summary that is a number, and the ends of bands, None where it has none: :data:`COLUMNS`."""
    seconds, forwards = summary.get("latency_s"), summary.get("forwards")
    each = None if seconds is None or not forwards else 1e3 * seconds / forwards
    told = {name: summary.get(name) for name in NUMBERS} | {"ms_per_forward": each}
    for name in BANDS:
        parts = summary.get(name) or {}
        told |= {name: parts.get("value")} | {f"{name}.{end}": parts.get(end) for end in ("low", "high")}
    return told


def cell(name: str, row: Mapping[str, Any]) -> Any:
    """What a table shows of a figure in a row of :data:`COLUMNS`: its value, of a band both ends, None where they are."""
    ends = row.get(f"{name}.low"), row.get(f"{name}.high")
    return row[name] if name not in BANDS else None if None in ends else ends


def size(count: float) -> str:
    """Bytes with a decimal unit, 1 MB = 10^6 bytes."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:,.0f} bytes" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def band(ends: tuple[float, float]) -> str:
    """The two ends of a ratio, one where they read the same."""
    low, high = (f"{end:.1f}x" if end >= 1 else f"{end:.2f}x" for end in ends)
    return low if low == high else f"{low} to {high}"


WRITTEN = {
    "count": lambda value: f"{value:,.0f}",
    "two": lambda value: f"{value:,.2f}",
    "three": lambda value: f"{value:,.3f}",
    "percent": lambda value: f"{100 * value:.1f}%",
    "size": size,
    "times": lambda value: f"{value:.2f}×",
    "band": band,
}
"""How numbers are written."""


def figures_markdown() -> str:
    """The table of figures in the README."""
    lines = ["| figure | unit | better | meaning |", "|---|---|---|---|"]
    lines += [f"| `{f.name}` | {f.unit} | {f.better} | {f.meaning} |" for f in FIGURES.values()]
    return "\n".join(lines) + "\n"
