"""All consistency figures of a trace in one pass over its segments, and each of them alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import polars as pl

from analysis.metrics import decoding, dynamics, expert_load, layers, popularity, positions, temporal
from analysis.metrics.bootstrap import Bootstrap, empty
from analysis.metrics.nulls import forward_nulls, neighbour_nulls, row_nulls
from analysis.metrics.result import ConsistencyResult
from analysis.metrics.samples import ForwardSample, NeighbourBlocks, RowSample
from analysis.metrics.seeds import popularity_of
from analysis.metrics.settings import UNITS, Settings
from analysis.metrics.stream import Shape, Totals, Trace, mean_rows, shape_of, sweep
from analysis.metrics.timeline import Units
from tracer.errors import UserError

SCHEMAS: dict[str, dict[str, Any]] = {
    "overlap": temporal.OVERLAP_COLUMNS,
    "settling": temporal.SETTLING_COLUMNS,
    "cosine": dynamics.COSINE_COLUMNS,
    "drift": dynamics.DRIFT_COLUMNS,
    "survival": dynamics.SURVIVAL_COLUMNS,
    "working_set": dynamics.WORKING_SET_COLUMNS,
    "spatial": positions.SPATIAL_COLUMNS,
    "growth": positions.GROWTH_COLUMNS,
    "unique": expert_load.UNIQUE_COLUMNS,
    "load": expert_load.LOAD_COLUMNS,
    "balance": expert_load.BALANCE_COLUMNS,
    "predictability": layers.PREDICTABILITY_COLUMNS,
    "agreement": popularity.AGREEMENT_COLUMNS,
    "acceptance": decoding.ACCEPTANCE_COLUMNS,
    "order": decoding.ORDER_COLUMNS,
    "confidence": decoding.CONFIDENCE_COLUMNS,
    "calibration": decoding.CALIBRATION_COLUMNS,
}
"""Columns and polars types of every frame, by name."""

_BY_POSITION = frozenset(
    {"overlap", "settling", "spatial", "growth", "predictability", "order", "confidence", "calibration"}
)
_PAIRED = frozenset({"overlap", "settling", "spatial"})
_COMPARED = frozenset({"cosine", "drift"})
_DYNAMIC = _COMPARED | {"survival", "working_set"}
_DECODED = frozenset({"acceptance", "order", "confidence", "calibration"})

_REASONS = {
    "overlap": "No block has two denoise forwards that route the same position.",
    "settling": "No block has a denoise forward after one that accepts a position.",
    "cosine": "No block has two denoise forwards with routed rows.",
    "drift": "No block has two denoise forwards with routed rows.",
    "survival": "No block has two denoise forwards with routed rows.",
    "working_set": "No request has as many denoise forwards as the smallest window.",
    "spatial": "No denoise forward routes two positions of its block.",
    "predictability": "Needs routed rows of two adjacent MoE layers in at least two requests: one half predicts the other.",
    "agreement": "Needs at least two requests or two datasets with routed rows.",
    "order": "No token is accepted in these forwards, as far as the tokens table says.",
    "confidence": "No masked row has a confidence and a final token.",
    "calibration": "No masked row has a confidence and a final token.",
}


def consistency(
    trace: Trace,
    progress: Callable[[int], Any] | None = None,
    *,
    settings: Settings | None = None,
    only: Iterable[str] | None = None,
) -> ConsistencyResult:
    """Every consistency figure of a trace beside its nulls, in one pass over the segments.

    Parameters
    ----------
    trace : Trace
        What :func:`tracer.parquet.open_trace` returns.
    progress : callable, optional
        Called after each segment with the number of model calls read so far.
    settings : Settings, optional
        Distances, budgets, bootstrap and sample sizes.
    only : iterable of str, optional
        Names out of :data:`SCHEMAS`; all by default.

    Returns
    -------
    ConsistencyResult
        A frame per name, with the columns of :data:`SCHEMAS`; one without rows has its reason in ``reasons``.

    Raises
    ------
    UserError
        ``only`` names a figure that does not exist.
    """
    settings = settings or Settings()
    wanted = tuple(SCHEMAS if only is None else dict.fromkeys(only))
    for name in wanted:
        if name not in SCHEMAS:
            raise UserError(f"There is no consistency figure {name!r}; choose among {', '.join(SCHEMAS)}.")
    shape, units = shape_of(trace.meta), Units()
    notes = list(getattr(trace, "notes", ()))
    positions = "tokens" in trace.meta.tables and shape.block_length > 0
    usable = frozenset(name for name in wanted if positions or name not in _BY_POSITION)
    families = _families(trace, shape, settings, usable, "block" if positions else "forward")
    totals: Totals = families["totals"]
    sweep(trace, shape, units, list(families.values()), progress)
    bootstrap = Bootstrap(units.count, settings.replicates, settings.level, settings.seed)
    frames = {name: empty(SCHEMAS[name]) for name in wanted}
    if totals.denoise and totals.decisions:
        made = _frames(families, bootstrap, shape, settings, units)
        frames |= {name: frame for name, frame in made.items() if name in frames}
    reasons = {
        name: _reason(name, totals, positions, "tokens" in trace.meta.tables)
        for name, frame in frames.items()
        if not frame.height
    }
    if units.count < 2:
        reasons["intervals"] = "Intervals resample requests, and there are fewer than two with denoise forwards."
    load = families.get("load")
    popularity = None
    if load is not None and totals.decisions and units.count:
        counted = load.load[: units.count].copy()
        popularity = popularity_of(trace.meta.model.id, shape.layers, load.scope, counted, trace.requests, units.number)
    notes += _notes(units)
    return ConsistencyResult(frames, reasons, _summary(totals, shape, units), notes, popularity)


def _families(trace: Trace, shape: Shape, settings: Settings, usable: frozenset[str], scope: str) -> dict[str, Any]:
    """What has to watch the trace for the wanted figures. ``scope``: rows popularity is counted over."""
    made: dict[str, Any] = {"totals": Totals()}
    scopes = ("block", "forward") if scope == "block" else ("forward",)
    if usable - _DECODED:
        made["load"] = expert_load.Load(shape, scope)
    if scope == "block" and usable & (_PAIRED | _COMPARED | {"predictability"}):
        made["rows"] = RowSample(shape, settings.sample_rows, settings.seed)
    if usable & _PAIRED:
        made["neighbours"] = NeighbourBlocks(shape, settings.seed)
    for name, family in (
        ("overlap", temporal.StepOverlap),
        ("settling", temporal.Settling),
        ("spatial", positions.PositionOverlap),
        ("growth", positions.Growth),
    ):
        if name in usable:
            made[name] = family(shape, settings)
    if "predictability" in usable:
        made["predictability"] = layers.Predictability(shape)
    if "agreement" in usable:
        made["agreement"] = popularity.DatasetLoad(shape, scope, trace.requests)
    if usable & _DECODED:
        made["decoding"] = decoding.Decoding(shape, settings)
    for each in scopes:
        if "unique" in usable:
            made[f"unique {each}"] = expert_load.Unique(shape, each)
        if usable & _DYNAMIC:
            made[f"dynamics {each}"] = dynamics.LoadDynamics(shape, settings, each)
        if usable & _COMPARED:
            made[f"sample {each}"] = ForwardSample(shape, settings.sample_forwards, settings.seed, each)
    return made


def _frames(
    families: dict[str, Any], bootstrap: Bootstrap, shape: Shape, settings: Settings, units: Units
) -> dict[str, pl.DataFrame]:
    """The frames the families' sums give."""
    out: dict[str, pl.DataFrame] = {}
    load: Any = families.get("load")
    if "neighbours" in families:
        nulls = row_nulls(families["rows"], load.total, shape, settings.pairs, settings.seed)
        nulls["shuffle"] = neighbour_nulls(families["neighbours"])
        for name in _PAIRED & set(families):
            out[name] = families[name].frame(bootstrap, nulls)
    if "growth" in families:
        out["growth"] = families["growth"].frame(bootstrap, load)
    if load is not None:
        out["load"], out["balance"] = load.load_frame(), load.balance_frame(bootstrap)
    if "predictability" in families and bootstrap.units > 1:
        out["predictability"] = families["predictability"].frame(bootstrap, families["rows"], load, settings)
    if "agreement" in families:
        out["agreement"] = popularity.agreement_frame(bootstrap, shape, load, families["agreement"], units.number)
    if "decoding" in families:
        out |= families["decoding"].frames(bootstrap)
    by_scope = [_scope_frames(families, each, bootstrap, shape, settings) for each in ("block", "forward")]
    for name in sorted({name for made in by_scope for name in made}):
        out[name] = pl.concat([made[name] for made in by_scope if name in made])
    return out


def _scope_frames(
    families: dict[str, Any], scope: str, bootstrap: Bootstrap, shape: Shape, settings: Settings
) -> dict[str, pl.DataFrame]:
    """Frames about the rows of one scope."""
    out = {}
    if f"unique {scope}" in families:
        out["unique"] = families[f"unique {scope}"].frame(bootstrap, families["load"])
    watched: dynamics.LoadDynamics | None = families.get(f"dynamics {scope}")
    if watched is not None:
        out |= {"survival": watched.survival_frame(bootstrap), "working_set": watched.working_set_frame(bootstrap)}
    sample = families.get(f"sample {scope}")
    if watched is not None and sample is not None:
        totals: Totals = families["totals"]
        # Rows are sampled from blocks: they stand for a whole forward only where forwards hold nothing else.
        fair = scope == "block" or totals.block_rows == totals.forward_rows
        nulls = forward_nulls(
            sample,
            families.get("rows") if fair else None,
            mean_rows(totals, scope),
            watched.load,
            shape,
            watched.budgets,
            settings.pairs,
            settings.seed,
        )
        out |= {"cosine": watched.cosine_frame(bootstrap, nulls), "drift": watched.drift_frame(bootstrap, nulls)}
    return out


def _reason(name: str, totals: Totals, positions: bool, tokens: bool) -> str:
    """Why a frame has no rows, in a sentence."""
    if totals.denoise == 0:
        return "The trace has no denoise forwards."
    if totals.decisions == 0:
        return "No row of the trace is routed in any MoE layer."
    if name in _BY_POSITION and not positions:
        if tokens:
            return "The trace has no blocks: decoding.block_length is missing or 0 in meta.json."
        return "The trace has no tokens table, which says position and state of each row."
    return _REASONS.get(name, "No denoise forward has routed rows.")


def _summary(totals: Totals, shape: Shape, units: Units) -> dict[str, Any]:
    return {
        "requests": len(units.number),
        "segments": totals.segments,
        "forwards": totals.forwards,
        "denoise_forwards": totals.denoise,
        "blocks": totals.blocks,
        "decisions": totals.decisions,
        "accepted_per_step": totals.accepted / totals.denoise if totals.denoise and totals.accepted_known else None,
        "steps_per_block": totals.denoise / totals.blocks if totals.blocks else None,
        "layers": len(shape.layers),
        "num_experts": shape.experts,
        "top_k": max(shape.top_k, default=0),
        "block_length": shape.block_length,
    }


def _notes(units: Units) -> list[str]:
    notes = [
        "Overlap depends on how many tokens a step accepts; read it beside the tokens accepted a step.",
        "Intervals are 95% percentile bootstrap intervals over requests unless asked otherwise.",
    ]
    if len(units.number) > UNITS:
        notes.append(f"The {len(units.number)} requests are resampled in {UNITS} groups.")
    return notes
