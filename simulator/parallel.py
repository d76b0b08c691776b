"""Expert parallelism: how evenly a group of GPUs that share the experts of every layer is loaded, and what each of them reads.

Every expert lies on one GPU. In a (forward, layer) a GPU computes the tokens of its own experts and reads the weights
of those that any token uses; the layer waits for the slowest. Which GPU that is: ``expert_placement.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from simulator.expert_placement import PLACEMENTS, place_experts
from simulator.plan import make_plan
from simulator.policy import ExpertStream, Geometry
from simulator.registry import describe
from simulator.runs import trusted
from simulator.streams.gather import geometry_of
from simulator.streams.loads import add_loads
from simulator.streams.routed import Router
from tracer.errors import UserError
from tracer.jit import njit
from tracer.schema import KINDS

if TYPE_CHECKING:
    import polars as pl


class RoutedStream(NamedTuple):
    """What a segment asks for, in one layer or, with a stream over all of them, in several. F forwards."""

    forward_ids: np.ndarray  # uint32 [F]
    kinds: np.ndarray  # uint8 [F], codes of schema.KINDS
    stream: ExpertStream


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


def routed_streams(trace: Any, routing: Any = "vanilla") -> Iterator[RoutedStream]:
    """What each segment and layer of a trace asks for under a routing policy, one layer at a time.

    Parameters
    ----------
    trace
        An opened trace.
    routing
        A spec or a policy object.

    Raises
    ------
    UserError
        A spec that does not load, or a policy that needs what the trace does not hold.
    """
    # Loads are counted, whatever the order, and all_resident asks for none.
    plan = make_plan(trace, [routing], ["all_resident"], None)
    router = Router(plan)
    for segment in trace.segments():
        routed = router.begin(segment)
        view = routed.views[0]
        for at in range(len(plan.geometry.layers)):
            for layer in router.layers(routed, at):
                yield RoutedStream(view.forward_ids, view.trajectory.forwards.forward_kind, layer.stream)


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
    source: Any,
    gpus: int,
    placement: str = "contiguous",
    routing: Any = "vanilla",
    geometry: Geometry | None = None,
) -> ParallelLoad:
    """The load of a group of GPUs that share every layer's experts.

    Parameters
    ----------
    source
        An opened trace, or :class:`RoutedStream` after RoutedStream; "balanced" goes through them twice.
    gpus : int
        G, 1 to E.
    placement : str
        One of :data:`PLACEMENTS`.
    routing
        With a trace: the routing policy, a spec or an object.
    geometry : Geometry, optional
        With streams: theirs.

    Raises
    ------
    UserError
        Unknown placement or routing, G out of range, streams without a geometry or that cannot be read twice.
    """
    is_trace = hasattr(source, "segments")
    if is_trace:
        geometry = geometry_of(source)
    elif geometry is None:
        raise UserError("expert_parallel needs the geometry its streams belong to; give geometry.")
    elif placement == "balanced" and iter(source) is source:
        raise UserError("The placement balanced reads the streams twice; give them as a list.")

    def streams() -> Iterable[RoutedStream]:
        return routed_streams(source, routing) if is_trace else source

    return _groups(streams, geometry, [(gpus, placement)])[0]


def parallel_runs(
    trace: Any,
    routings: Sequence[Any] = ("vanilla",),
    gpus: Sequence[int] = (8,),
    placements: Sequence[str] = PLACEMENTS,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """The loads of every routing policy x number of GPUs x placement, routing outermost.

    A trace is read once a policy, twice where a placement is balanced.

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
    progress : callable, optional
        ``progress(done, total)`` after every routing policy.

    Returns
    -------
    list of dict
        ``routing`` {"name", "parameters"}, :class:`ParallelLoad`'s summary, ``estimate`` and ``notes`` as a replay's runs.

    Raises
    ------
    UserError
        As :func:`expert_parallel`.
    """
    geometry, found = geometry_of(trace), []
    groups = list(product(gpus, placements))
    for size, placement in groups:
        place_experts(geometry.num_experts, size, placement)
    plan = make_plan(trace, routings, ["all_resident"], None)
    for done, policy in enumerate(plan.routings, 1):
        simulated = describe(plan.acceptances[plan.acceptance_of[done - 1]])["name"] != "recorded"
        estimate, trust = trusted(policy, geometry, simulated)
        told = {"estimate": estimate, "notes": [trust, *getattr(trace, "notes", ()), *getattr(policy, "notes", ())]}
        for load in _groups(partial(routed_streams, trace, policy), geometry, groups):
            found.append({"routing": describe(policy), **load.summary, **told})
        if progress is not None:
            progress(done, len(plan.routings))
    return found


def _groups(
    streams: Callable[[], Iterable[RoutedStream]], geometry: Geometry, groups: Sequence[tuple[int, str]]
) -> list[ParallelLoad]:
    """Several groups of GPUs over the same streams; those are gone through twice where any placement is balanced."""
    import polars as pl

    layers, experts = len(geometry.layers), geometry.num_experts
    # Refuse before reading anything.
    for gpus, placement in groups:
        place_experts(experts, gpus, placement)
    loads = np.zeros((layers, experts), np.int64)
    if any(placement == "balanced" for _, placement in groups):
        for _, _, stream in streams():
            add_loads(stream, loads)
    lying = [np.stack([place_experts(experts, *group, loads[at]) for at in range(layers)]) for group in groups]
    cells: list[list[pl.DataFrame]] = [[] for _ in groups]
    for routed in streams():
        for (gpus, _), gpu_of_expert, kept in zip(groups, lying, cells, strict=True):
            kept.append(_cells(routed, geometry, gpu_of_expert, gpus))
    found = []
    for (gpus, placement), gpu_of_expert, kept in zip(groups, lying, cells, strict=True):
        frame = (pl.concat(kept) if kept else _frame({}, gpus)).sort("forward_id", "layer", maintain_order=True)
        summary: dict[str, Any] = {"gpus": gpus, "placement": placement}
        summary |= _summary(frame.filter(pl.col("kind") == "denoise"), "")
        summary |= _summary(frame, "_all_forwards")
        found.append(ParallelLoad(frame, summary, gpu_of_expert))
    return found


def _cells(routed: RoutedStream, geometry: Geometry, gpu_of_expert: np.ndarray, gpus: int) -> pl.DataFrame:
    stream = routed.stream
    tokens = np.zeros((len(stream.cell_forward), gpus), np.int64)
    unique = np.zeros_like(tokens)
    _gpu_loads(stream.offsets, stream.cell_layer, stream.experts, stream.tokens, gpu_of_expert, tokens, unique)
    used = tokens.any(axis=1)
    tokens, unique = tokens[used], unique[used]
    forward, layer = stream.cell_forward[used], stream.cell_layer[used]
    size = np.array([geometry.expert_bytes[one] for one in geometry.layers], np.int64)[layer]
    read = unique * size[:, None]
    return _frame(
        {
            "forward_id": routed.forward_ids[forward],
            "kind": np.array(KINDS)[routed.kinds[forward]],
            "layer": np.array(geometry.layers)[layer],
            "assignments": tokens.sum(axis=1),
            "mean_tokens": tokens.mean(axis=1),
            "max_tokens": tokens.max(axis=1),
            "imbalance": tokens.max(axis=1) / tokens.mean(axis=1),
            "mean_bytes": read.mean(axis=1),
            "max_bytes": read.max(axis=1),
            "gpu_tokens": tokens,
            "gpu_bytes": read,
        },
        gpus,
    )


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
