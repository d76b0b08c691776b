"""The recorded experts of a trace as streams, layer by layer and segment by segment, for curves over many budgets at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from simulator.policy import ExpertStream, Selection
from simulator.streams.gather import geometry_of, recorded_layer
from simulator.streams.stream import build_stream
from tracer.trace import ForwardTable

MAX_THREADS = 16

Answer = TypeVar("Answer")


def serve_recorded(
    trace: Any,
    begin: Callable[[ForwardTable], Callable[[int, ExpertStream], Answer]],
    weights: bool = True,
    ordered: bool = True,
) -> Iterator[tuple[ForwardTable, list[Answer]]]:
    """Serve a trace segment by segment, the layers of a segment side by side in threads.

    Parameters
    ----------
    trace
        An opened trace: ``meta``, ``first_block`` and ``segments()``.
    begin : callable
        ``begin(forwards)`` is called once a segment and gives what serves a layer: ``serve(at, stream)``, ``at`` an index into
        ``Geometry.layers``.
    weights : bool
        Whether gate weights order a row's experts; without, the lowest id goes first and reading is faster.
    ordered : bool
        Whether streams have an order at all; without, building them is faster.

    Yields
    ------
    tuple
        A segment's forwards and what serving gave, a list over layers.

    Raises
    ------
    UserError
        A row of the trace lists an expert twice.
    """
    geometry = geometry_of(trace)
    layers = range(len(geometry.layers))
    with ThreadPoolExecutor(max(1, min(os.cpu_count() or 1, MAX_THREADS, len(layers)))) as pool:
        for segment in trace.segments():
            serve = begin(segment.forwards)

            def job(at: int, segment: Any = segment, serve: Callable[[int, ExpertStream], Answer] = serve) -> Answer:
                layer = recorded_layer(segment, at, geometry, with_weights=weights)
                selection = Selection(layer.expert_ids, layer.count, layer.gate_weights if weights else None)
                offsets = segment.forwards.row_offsets
                stream = build_stream(selection, offsets, at, geometry.num_experts, layer.present, ordered=ordered)
                return serve(at, stream)

            yield segment.forwards, list(pool.map(job, layers))
