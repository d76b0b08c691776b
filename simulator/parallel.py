"""Expert parallelism: how evenly a group of GPUs that share the experts of every layer is loaded, and what each of them reads.

Every expert lies on one GPU. In a (forward, layer) a GPU computes the tokens of its own experts and reads the weights
of those that any token uses; the layer waits for the slowest. Which GPU that is: ``expert_placement.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.experiment import Experiment, make_experiments
from simulator.expert_placement import PLACEMENTS, place_experts
from simulator.policy import ExpertStream, Geometry
from simulator.registry import describe, name_of
from simulator.runs import trusted
from simulator.streams.loads import add_loads
from simulator.streams.routed import RoutedLayer, View
from simulator.walk import Walk, Watcher
from tracer.jit import njit
from tracer.schema import KINDS

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True, slots=True)
class ParallelLoad:
    """Loads of an expert-parallel group.

    ``frame`` has one row per (forward, layer) that used an expert: forward_id u32, kind str, layer u16, assignments u32
    (token-slot pairs), mean_tokens f64 and max_tokens u32 over GPUs, imbalance f64 (max / mean), mean_bytes f64 and
    max_bytes u64 of expert weights read, and gpu_tokens u32, gpu_bytes u64 as arrays [G]. ``summary`` holds means over
    denoise forwards and, suffixed ``_all_forwards``, over all: imbalance, busy (mean over max tokens, summed: the share
    of the group's time that is not waiting, were time to follow tokens), mean_bytes, max_bytes, gpu_tokens and
    gpu_bytes (totals, [G]); None where there are none.
    """

    frame: pl.DataFrame
    summary: dict[str, Any]
    gpu_of_expert: np.ndarray  # int64 [L, E]


@njit
def _gpu_loads(offsets, cell_layer, experts, tokens, gpu_of_expert, gpu_tokens, gpu_experts):
    """Tokens and distinct experts of every cell on every GPU, int64 [C, G] each, both 0 before."""
    for c in range(len(offsets) - 1):
        at = cell_layer[c]
        for i in range(offsets[c], offsets[c + 1]):
            gpu = gpu_of_expert[at, experts[i]]
            gpu_tokens[c, gpu] += np.int64(tokens[i])
            gpu_experts[c, gpu] += 1


def expert_parallel(
    trace: Any, gpus: int, placement: str = "contiguous", routing: Any = "vanilla", threads: int | None = None
) -> ParallelLoad:
    """The load of a group of GPUs that share every layer's experts.

    Parameters
    ----------
    trace
        An opened trace; "balanced" goes through it twice.
    gpus : int
        G, 1 to E.
    placement : str
        One of :data:`PLACEMENTS`.
    routing
        The routing policy, a spec or an object.
    threads : int, optional
        As of :func:`simulator.replay`.

    Raises
    ------
    UserError
        Unknown placement or routing, or G out of range.
    """
    return _watched(trace, [routing], [(gpus, placement)], None, threads)[0][1].result()


def parallel_runs(
    trace: Any,
    routings: Sequence[Any] = ("vanilla",),
    gpus: Sequence[int] = (8,),
    placements: Sequence[str] = PLACEMENTS,
    progress: Callable[[int, int | None], None] | None = None,
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """The loads of every routing policy x number of GPUs x placement, routing outermost.

    A trace is read once, twice where a placement is balanced.

    Parameters
    ----------
    trace
        An opened trace.
    routings : sequence
        Specs or policy objects.
    gpus : sequence of int
        Sizes of groups.
    placements : sequence of str
        Of :data:`PLACEMENTS`.
    progress, threads
        As of :func:`simulator.replay`.

    Returns
    -------
    list of dict
        ``routing`` {"name", "parameters"}, :class:`ParallelLoad`'s summary, ``estimate`` and ``notes`` as a replay's runs.

    Raises
    ------
    UserError
        As :func:`expert_parallel`.
    """
    groups, answers = list(product(gpus, placements)), []
    for one, watcher in _watched(trace, routings, groups, progress, threads):
        simulated = name_of(one.acceptance) != "recorded"
        estimate, trust = trusted(one.routing, watcher.geometry, simulated)
        notes = [trust, *getattr(trace, "notes", ()), *getattr(one.routing, "notes", ())]
        load = watcher.result()
        answers.append({"routing": describe(one.routing), **load.summary, "estimate": estimate, "notes": notes})
    return answers


def _watched(
    trace: Any,
    routings: Sequence[Any],
    groups: Sequence[tuple[int, str]],
    progress: Callable[[int, int | None], None] | None,
    threads: int | None,
) -> list[tuple[Experiment, GroupLoads]]:
    """What watched a walk for every routing policy x group."""
    geometry, experiments = make_experiments(trace, routings, ["all_resident"])
    walk = Walk(trace, geometry, threads)
    watched = [
        (one, walk.watch(GroupLoads(geometry, *group), (one.acceptance, one.routing)))
        for one, group in product(experiments, groups)
    ]
    walk.run(progress)
    return watched


class GroupLoads(Watcher):
    """The load of one group of GPUs, cell by cell.

    Raises
    ------
    UserError
        Unknown placement, or G out of range.
    """

    def __init__(self, geometry: Geometry, gpus: int, placement: str) -> None:
        self.geometry, self.gpus, self.placement = geometry, gpus, placement
        every = place_experts(geometry.num_experts, gpus, placement)
        self.gpu_of_expert = np.tile(every, (len(geometry.layers), 1))
        self.passes = 2 if placement == "balanced" else 1
        self._cells: list[pl.DataFrame] = []

    def scopes(self, layers: int, slots: int) -> Sequence[int | None]:
        """Layers are balanced one by one."""
        return range(layers) if self.passes == 2 else ()

    def prepare(self, at: int | None, streams: Iterable[ExpertStream]) -> None:
        """Place a layer's experts by their load."""
        loads = np.zeros((len(self.geometry.layers), self.geometry.num_experts), np.int64)
        for stream in streams:
            add_loads(stream, loads)
        self.gpu_of_expert[at] = place_experts(self.geometry.num_experts, self.gpus, self.placement, loads[at])

    def begin(self, view: View) -> None:
        """A segment starts."""
        self._view = view

    def layer(self, at: int, routed: RoutedLayer) -> None:
        """Add a layer's cells."""
        stream, forwards = routed.stream, self._view.trajectory.forwards
        tokens = np.zeros((len(stream.cell_forward), self.gpus), np.int64)
        unique = np.zeros_like(tokens)
        _gpu_loads(stream.offsets, stream.cell_layer, stream.experts, stream.tokens, self.gpu_of_expert, tokens, unique)
        used = tokens.any(axis=1)
        tokens, unique, forward = tokens[used], unique[used], stream.cell_forward[used]
        number = self.geometry.layers[at]
        read = unique * self.geometry.expert_bytes[number]
        columns = {
            "forward_id": self._view.forward_ids[forward],
            "kind": np.array(KINDS)[forwards.forward_kind[forward]],
            "layer": np.full(len(forward), number),
            "assignments": tokens.sum(axis=1),
            "mean_tokens": tokens.mean(axis=1),
            "max_tokens": tokens.max(axis=1),
            "imbalance": tokens.max(axis=1) / tokens.mean(axis=1),
            "mean_bytes": read.mean(axis=1),
            "max_bytes": read.max(axis=1),
            "gpu_tokens": tokens,
            "gpu_bytes": read,
        }
        self._cells.append(_frame(columns, self.gpus))

    def result(self) -> ParallelLoad:
        """Everything served so far."""
        import polars as pl

        frame = pl.concat([_frame({}, self.gpus), *self._cells]).sort("forward_id", "layer")
        summary: dict[str, Any] = {"gpus": self.gpus, "placement": self.placement}
        summary |= _summary(frame.filter(pl.col("kind") == "denoise"), "")
        summary |= _summary(frame, "_all_forwards")
        return ParallelLoad(frame, summary, self.gpu_of_expert)


def _frame(columns: dict[str, np.ndarray], gpus: int) -> pl.DataFrame:
    import polars as pl

    schema: dict[str, pl.DataType | type[pl.DataType]] = {
        "forward_id": pl.UInt32,
        "kind": pl.String,
        "layer": pl.UInt16,
        "assignments": pl.UInt32,
        "mean_tokens": pl.Float64,
        "max_tokens": pl.UInt32,
        "imbalance": pl.Float64,
        "mean_bytes": pl.Float64,
        "max_bytes": pl.UInt64,
        "gpu_tokens": pl.Array(pl.UInt32, gpus),
        "gpu_bytes": pl.Array(pl.UInt64, gpus),
    }
    if not columns or not len(columns["forward_id"]):
        return pl.DataFrame(schema=schema)
    return pl.DataFrame([pl.Series(name, columns[name]).cast(dtype) for name, dtype in schema.items()])


def _summary(frame: pl.DataFrame, suffix: str) -> dict[str, Any]:
    if frame.is_empty():
        found: dict[str, Any] = dict.fromkeys(
            ("imbalance", "busy", "mean_bytes", "max_bytes", "gpu_tokens", "gpu_bytes")
        )
    else:
        found = {
            "imbalance": float(frame["imbalance"].to_numpy().mean()),
            "busy": float(frame["mean_tokens"].to_numpy().sum() / frame["max_tokens"].to_numpy().sum()),
            "mean_bytes": float(frame["mean_bytes"].to_numpy().mean()),
            "max_bytes": float(frame["max_bytes"].to_numpy().mean()),
            "gpu_tokens": frame["gpu_tokens"].to_numpy().sum(axis=0, dtype=np.int64).tolist(),
            "gpu_bytes": frame["gpu_bytes"].to_numpy().sum(axis=0, dtype=np.int64).tolist(),
        }
    return {f"{key}{suffix}": value for key, value in found.items()}
