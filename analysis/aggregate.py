"""From replay documents, replay cells and trace tables to the small frames that charts draw.

Nothing here draws. Every function ends with at most :data:`MAX_ROWS` rows, whatever the size of what it was given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from analysis import figures

MAX_ROWS = 2000
MAX_SERIES = 12
MAX_BARS = 36
RECORDED = "recorded"
TIMES = " × "


def policy_of(run: Mapping[str, Any], axis: str) -> tuple[str, dict[str, Any]]:
    """Name and parameters of a run's policy on one axis; without one, the recorded forwards, vanilla, all resident."""
    policy = run.get(axis) or {"acceptance": RECORDED, "routing": "vanilla", "residency": "all_resident"}[axis]
    if isinstance(policy, str):
        return policy, {}
    return str(policy["name"]), dict(policy.get("parameters") or {})


def hardware_of(run: Mapping[str, Any]) -> str | None:
    """Name of the hardware a run was costed on, None without one."""
    hardware = run.get("hardware")
    found = hardware.get("name") if isinstance(hardware, Mapping) else hardware
    return str(found) if found else None


def labels(policies: Sequence[tuple[str, Mapping[str, Any]]], without: frozenset[str] = frozenset()) -> list[str]:
    """The shortest names that tell policies apart: the name, and those parameters that differ among policies of that name.

    Parameters in ``without`` are never shown.
    """
    seen: dict[tuple[str, str], set[str]] = {}
    for name, parameters in policies:
        for key, value in parameters.items():
            seen.setdefault((name, key), set()).add(str(value))
    shown = []
    for name, parameters in policies:
        told = [f"{k}={v}" for k, v in parameters.items() if k not in without and len(seen[name, k]) > 1]
        shown.append(f"{name} {', '.join(told)}" if told else name)
    return shown


def runs_frame(document: Mapping[str, Any], without: frozenset[str] = frozenset()) -> pl.DataFrame:
    """One row a run of a replay document, in its order.

    Columns: ``run`` i64; ``series`` (acceptance and routing), ``residency``, ``hardware``, ``kernel``, ``label`` (the first
    two, and the third where it differs among the runs); ``routing_policy``, ``residency_policy``, ``acceptance_policy`` (bare
    names, for colours); ``estimate``, ``over_budget``; ``unique_low``, ``unique_high`` (scenario bounds); every figure that is
    a number, and the ends of bands, as f64. Parameters named in ``without`` are left out of the names.
    """
    runs = list(document.get("runs") or [])
    axes = {axis: [policy_of(run, axis) for run in runs] for axis in ("acceptance", "routing", "residency")}
    named = {axis: labels(policies, without) for axis, policies in axes.items()}
    machines = [hardware_of(run) for run in runs]
    pairs: dict[str, set[str]] = {}
    for acceptance, routing in zip(named["acceptance"], named["routing"], strict=True):
        pairs.setdefault(routing, set()).add(acceptance)
    rows = []
    for i, run in enumerate(runs):
        acceptance, routing, residency = named["acceptance"][i], named["routing"][i], named["residency"][i]
        brought = axes["acceptance"][i][0] in (RECORDED, axes["routing"][i][0])
        series = routing if brought and len(pairs[routing]) == 1 else f"{acceptance} + {routing}"
        low, high = ((run.get("bounds") or {}).get("unique_experts")) or (None, None)
        machine = machines[i]
        rows.append(
            {
                "run": int(run.get("run", i)),
                "series": series,
                "residency": residency,
                "label": TIMES.join([series, residency, *([str(machine)] if len(set(machines)) > 1 else [])]),
                "hardware": machine,
                "kernel": run.get("kernel"),
                "routing_policy": axes["routing"][i][0],
                "residency_policy": axes["residency"][i][0],
                "acceptance_policy": axes["acceptance"][i][0],
                "estimate": bool(run.get("estimate")),
                "over_budget": bool(run.get("over_budget")),
                "unique_low": low,
                "unique_high": high,
                **figures.values(run.get("summary") or {}),
            }
        )
    policies = ("routing_policy", "residency_policy", "acceptance_policy")
    names = ("series", "residency", "label", "hardware", "kernel", *policies)
    schema: dict[str, Any] = {"run": pl.Int64} | dict.fromkeys(names, pl.String)
    schema |= dict.fromkeys(("estimate", "over_budget"), pl.Boolean)
    schema |= dict.fromkeys(("unique_low", "unique_high", *figures.COLUMNS), pl.Float64)
    return pl.DataFrame(rows, schema=schema, strict=False)


def one_run_a_series(runs: pl.DataFrame) -> pl.DataFrame:
    """The first run of each series, :data:`MAX_SERIES` at most: residency changes neither forwards nor experts."""
    return runs.unique("series", keep="first", maintain_order=True).head(MAX_SERIES)


def denoise_cells(cells: pl.DataFrame, forwards: pl.DataFrame, runs: pl.DataFrame) -> pl.LazyFrame:
    """Cells of denoise forwards with their ``step``, ``series`` and ``policy``, one run a series.

    ``forwards`` is the trace's forwards table (``forward_id``, ``kind``, ``step``, ..), or the replays' own with a ``run``
    column beside. The trace's table says nothing about runs whose acceptance policy makes its own forwards: those are left
    out (:func:`left_out` names them). So are calls that batch requests at different steps.
    """
    series = one_run_a_series(runs)
    keys = ["forward_id"]
    if "run" in forwards.columns:
        keys.append("run")
    else:
        series = series.filter(pl.col("acceptance_policy") == RECORDED)
    kinds = (
        forwards.lazy()
        .filter(pl.col("kind") == "denoise")
        .group_by(keys)
        .agg(pl.col("step").min(), (pl.col("step").min() == pl.col("step").max()).alias("together"))
        .filter("together")
        .with_columns(pl.col(keys).cast(pl.Int64))
    )
    chosen = series.lazy().select("run", "series", "estimate", pl.col("routing_policy").alias("policy"))
    # One run a series: what the others ran need not be looked at.
    kinds = kinds.join(chosen, on="run", how="semi") if "run" in keys else kinds
    wanted = cells.lazy().with_columns(pl.col("run", "forward_id").cast(pl.Int64)).join(chosen, on="run")
    return wanted.join(kinds, on=keys)


def left_out(forwards: pl.DataFrame, runs: pl.DataFrame) -> list[str]:
    """Series that :func:`denoise_cells` cannot place on the trace's forwards."""
    if "run" in forwards.columns:
        return []
    return one_run_a_series(runs).filter(pl.col("acceptance_policy") != RECORDED)["series"].to_list()


def _in_order(frame: pl.DataFrame, runs: pl.DataFrame, then: str) -> pl.DataFrame:
    series = one_run_a_series(runs)["series"].to_list()
    first = pl.col("series").replace_strict(series, range(len(series)), return_dtype=pl.Int64)
    return frame.sort(first, then)


def _last(column: pl.Series) -> int:
    return int(column.to_numpy().max(initial=0))


def unique_by_step(cells: pl.DataFrame, forwards: pl.DataFrame, runs: pl.DataFrame) -> pl.DataFrame:
    """Mean unique experts a layer, by denoise step inside the block and series.

    Returns ``series``, ``policy``, ``estimate``, ``step``, ``unique_experts``, ``forwards`` (calls averaged). Steps are
    binned where there would be more than :data:`MAX_ROWS` rows; ``step`` is then the first of its bin.
    """
    found = denoise_cells(cells, forwards, runs)
    width = 1 + (_last(forwards["step"]) + 1) * MAX_SERIES // MAX_ROWS
    return (
        found.with_columns(pl.col("step") // width * width)
        .group_by("series", "policy", "estimate", "step")
        .agg(pl.col("unique_experts").mean(), pl.col("forward_id").n_unique().alias("forwards"))
        .collect()
        .pipe(_in_order, runs, "step")
    )


def unique_by_layer(cells: pl.DataFrame, forwards: pl.DataFrame, runs: pl.DataFrame) -> pl.DataFrame:
    """Mean unique experts over denoise forwards: ``series``, ``policy``, ``estimate``, ``layer``, ``unique_experts``."""
    return (
        denoise_cells(cells, forwards, runs)
        .group_by("series", "policy", "estimate", "layer")
        .agg(pl.col("unique_experts").mean())
        .collect()
        .pipe(_in_order, runs, "layer")
    )


def block_progress(forwards: pl.DataFrame) -> pl.DataFrame:
    """How a block fills up: tokens masked before a denoise step and accepted by it, mean over all blocks.

    A block that is finished counts as 0 masked and 0 accepted from there on, so the accepted column adds up to the mean
    number of tokens decoded a block. Returns ``step``, ``masked``, ``accepted`` (null where the trace does not say),
    ``blocks`` (still running).
    """
    steps = forwards.filter((pl.col("kind") == "denoise") & (pl.col("block") >= 0))
    total = max(1, steps.select("request_id", "block").n_unique())
    width = 1 + _last(steps["step"]) // MAX_ROWS
    sums = (
        steps.group_by(pl.col("step") // width * width)
        .agg(
            _known_sum("num_masked").alias("masked"),
            _known_sum("num_accepted").alias("accepted"),
            pl.struct("request_id", "block").n_unique().alias("blocks"),
        )
        .sort("step")
    )
    # Divided in NumPy: polars multiplies by the reciprocal of a scalar, which is off by a bit.
    return sums.with_columns(
        pl.Series("masked", sums["masked"].to_numpy() / (total * width), pl.Float64).fill_nan(None),
        pl.Series("accepted", sums["accepted"].to_numpy() / total, pl.Float64).fill_nan(None),
    )


def _known_sum(column: str) -> pl.Expr:
    return pl.when(pl.col(column).null_count() == 0).then(pl.col(column).cast(pl.Int64).sum())


def load_by_rank(load: pl.DataFrame, num_experts: int) -> pl.DataFrame:
    """Expert load of each layer, busiest expert first, as a multiple of an even share.

    ``load`` holds ``layer``, ``expert_id``, ``tokens``; experts it does not list have none. Returns ``layer``, ``rank``,
    ``rank_end`` (1-based, of the bin) and ``relative`` (1 = the layer's tokens spread evenly); ranks are binned where layers
    times experts exceed :data:`MAX_ROWS`.
    """
    layers = load.select(pl.col("layer").unique().sort().cast(pl.Int64))
    width = -(-layers.height * num_experts // MAX_ROWS) or 1
    every = layers.join(pl.DataFrame({"expert_id": range(num_experts)}, schema={"expert_id": pl.Int64}), how="cross")
    known = load.select(pl.col("layer", "expert_id").cast(pl.Int64), pl.col("tokens").cast(pl.Float64))
    share = pl.col("tokens") * num_experts / pl.col("tokens").sum().over("layer")
    return (
        every.join(known, on=["layer", "expert_id"], how="left")
        .with_columns(pl.col("tokens").fill_null(0.0))
        .with_columns(share.fill_nan(0.0).alias("relative"))
        .with_columns(pl.col("relative").rank("ordinal", descending=True).over("layer").cast(pl.Int64).alias("order"))
        .group_by("layer", ((pl.col("order") - 1) // width).alias("bin"))
        .agg(pl.col("relative").mean(), pl.col("order").min().alias("rank"), pl.col("order").max().alias("rank_end"))
        .sort("layer", "rank")
        .select("layer", "rank", "rank_end", "relative")
    )


def latency_parts(document: Mapping[str, Any]) -> pl.DataFrame:
    """Estimated latency of each run by part, milliseconds an accepted token: ``label``, ``part``, ``ms``, ``total_ms``.

    Parts that overlap in time add up to more than ``total_ms``. Runs without hardware are absent.
    """
    rows = []
    runs = runs_frame(document)
    for row, run in zip(runs.iter_rows(named=True), document.get("runs") or [], strict=True):
        parts = (run.get("summary") or {}).get("latency")
        tokens = (row["tokens_per_forward"] or 0) * (row["denoise_forwards"] or 0)
        if not parts or not tokens or row["latency_s"] is None:
            continue
        total = 1e3 * row["latency_s"] / tokens
        rows += [
            {"label": row["label"], "part": str(part), "ms": 1e3 * seconds / tokens, "total_ms": total}
            for part, seconds in parts.items()
            if isinstance(seconds, int | float) and seconds > 0
        ]
    schema = {"label": pl.String, "part": pl.String, "ms": pl.Float64, "total_ms": pl.Float64}
    kept = list(dict.fromkeys(r["label"] for r in rows))[:MAX_BARS]
    return pl.DataFrame([r for r in rows if r["label"] in kept], schema=schema, strict=False)


def by_parameter(document: Mapping[str, Any], parameter: str) -> pl.DataFrame:
    """Runs that differ in one residency parameter: :func:`runs_frame` named without it, plus ``value`` (f64), sorted by it.

    Only series with two or more values are kept; ``line`` names them.
    """
    values = [policy_of(run, "residency")[1].get(parameter) for run in document.get("runs") or []]
    numbers = [float(v) if isinstance(v, int | float) else None for v in values]
    runs = runs_frame(document, without=frozenset({parameter})).with_columns(pl.Series("value", numbers, pl.Float64))
    lines = runs.drop_nulls("value").with_columns(pl.col("label").alias("line"))
    lines = lines.filter(pl.col("value").n_unique().over("line") > 1)
    kept = lines["line"].unique(maintain_order=True).head(MAX_SERIES).to_list()
    lines = lines.filter(pl.col("line").is_in(kept))
    return lines.sort(pl.col("line").replace_strict(kept, range(len(kept)), return_dtype=pl.Int64), "value")


def whole_groups(runs: pl.DataFrame) -> pl.DataFrame:
    """One run a pair of series and residency, with as many whole residencies as :data:`MAX_BARS` bars have room for."""
    pairs = runs.unique(["series", "residency"], keep="first", maintain_order=True)
    pairs = pairs.filter(pl.col("series").is_in(one_run_a_series(runs)["series"].to_list()))
    room = max(1, MAX_BARS // max(1, pairs["series"].n_unique()))
    return pairs.filter(pl.col("residency").is_in(pairs["residency"].unique(maintain_order=True).head(room).to_list()))
