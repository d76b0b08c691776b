"""What the report needs of a trace and of a replay, as plain documents and small frames."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from simulator.replay_files import CELLS, DOCUMENT, FORWARDS
from simulator.streams.loads import recorded_loads
from tracer.errors import UserError

if TYPE_CHECKING:
    from analysis.metrics.shared.result import ConsistencyResult
    from simulator.interval import IntervalResult


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """A trace as the report shows it.

    ``meta`` is meta.json as a dict. ``forwards`` has the columns of the trace's forwards table (``kind`` as a string), one
    row a (call, request). ``load``: ``layer``, ``expert_id``, ``tokens`` (rows that the expert was selected for, all
    forwards; experts never selected may be absent). ``bytes_on_disk``: bytes of each table's parts; ``cell_bytes``: of the
    compressed columns ``expert_ids``, keys with it, and ``gate_weights``. ``notes``: what every figure of the trace
    needs. ``consistency``, if given: what ``analysis.metrics.consistency`` found; ``intervals``: what
    ``simulator.interval.find_interval`` found, one a budget and machine.
    """

    name: str
    meta: Mapping[str, Any]
    requests: int
    forwards: pl.DataFrame
    load: pl.DataFrame
    bytes_on_disk: Mapping[str, int] = field(default_factory=dict)
    cell_bytes: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()
    consistency: ConsistencyResult | None = None
    intervals: Sequence[IntervalResult] = ()

    @property
    def decisions(self) -> int:
        """Routing decisions: (row, layer, slot) triples in which an expert was selected."""
        return int(self.load["tokens"].sum() or 0)

    @property
    def calls(self) -> dict[str, int]:
        """Model calls by kind."""
        counted = self.forwards.group_by("kind").agg(pl.col("forward_id").n_unique()).sort("kind")
        return dict(counted.iter_rows())

    @property
    def model(self) -> Mapping[str, Any]:
        """The model section of meta.json."""
        return self.meta.get("model") or {}


@dataclass(frozen=True, slots=True)
class ReplaySummary:
    """A replay as the report shows it.

    ``document`` is what ``replay --json`` prints. ``cells`` has the columns of replay.parquet, one row a (run, forward, layer).
    ``forwards``, if given, holds the forwards of each run: ``run``, ``forward_id``, ``kind``, ``step``; without it the trace's
    own place the cells of the runs that kept to them.
    """

    document: Mapping[str, Any]
    cells: pl.DataFrame | None = None
    forwards: pl.DataFrame | None = None


def summarise_trace(trace: Any, name: str | None = None) -> TraceSummary:
    """Read a trace once, segment by segment, layer by layer, into what the report needs.

    Parameters
    ----------
    trace
        What ``tracer.parquet.open_trace`` returns.
    name : str, optional
        What to call it; its folder's name otherwise.
    """
    layers, counts = np.array(trace.meta.model.moe_layers, np.int64), recorded_loads(trace)
    load = pl.DataFrame(
        {
            "layer": np.repeat(layers, counts.shape[1]),
            "expert_id": np.tile(np.arange(counts.shape[1]), len(layers)),
            "tokens": counts.reshape(-1),
        }
    )
    cell_bytes = dict.fromkeys(("expert_ids", "gate_weights"), 0)
    for part in trace.parts("routing"):
        cell_bytes["expert_ids"] += sum(map(part.compressed_bytes, ("forward_id", "layer", "row", "expert_ids")))
        cell_bytes["gate_weights"] += part.compressed_bytes("gate_weights")
    path = Path(trace.path)
    return TraceSummary(
        name=name or path.name.removesuffix(".trace"),
        meta=trace.meta.raw,
        requests=len(trace.requests),
        forwards=trace.scan("forwards").collect(),
        load=load,
        bytes_on_disk=trace.bytes_on_disk(),
        cell_bytes=cell_bytes,
        notes=tuple(trace.notes),
    )


def summarise_replay(result: Any) -> ReplaySummary:
    """Document, cells and forwards of what ``simulator.replay`` returns."""
    return ReplaySummary(document=result.to_json(), cells=result.cells, forwards=result.forwards)


def read_replay(folder: str | Path) -> ReplaySummary:
    """A replay that ``replay --out`` wrote: ``replay.json``, ``replay.parquet`` and, where it is there, ``forwards.parquet``.

    Raises
    ------
    UserError
        A file is missing or is not what its name says.
    """
    folder = Path(folder)
    told, cells, ran = (folder / name for name in (DOCUMENT, CELLS, FORWARDS))
    for path in (told, cells):
        if not path.is_file():
            raise UserError(f"{folder} holds no {path.name}; name a folder that moetrace replay --out wrote.")
    try:
        document = json.loads(told.read_text(encoding="utf-8"))
        frame = pl.read_parquet(cells)
        forwards = pl.read_parquet(ran) if ran.is_file() else None
    except (ValueError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{folder} is not a replay that can be read ({error}); replay the trace again.") from None
    if not isinstance(document, dict) or not isinstance(document.get("runs"), list):
        raise UserError(f"{told} lists no runs; replay the trace again.")
    needed = {cells: (frame, ("run", "forward_id", "layer", "unique_experts"))}
    if forwards is not None:
        needed[ran] = forwards, ("run", "forward_id", "kind", "step")
    for path, (found, columns) in needed.items():
        missing = set(columns) - set(found.columns)
        if missing:
            raise UserError(f"{path} lacks {', '.join(sorted(missing))}; replay the trace again.")
    return ReplaySummary(document=document, cells=frame, forwards=forwards)
