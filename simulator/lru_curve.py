"""LRU at every budget in one pass over a trace, each equal to a replay of ``residency/lru.py`` of its own.

Source: stack distances of Mattson et al. (IBM Systems Journal 9(2), 1970), see ``stack_distance.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from simulator.caching.stack_distance import empty_stack, serve_stack
from simulator.policy import ExpertStream, Geometry
from simulator.residency.lru import Lru
from simulator.streams.gather import geometry_of
from simulator.streams.recorded import serve_recorded
from simulator.streams.stream import merge_streams
from tracer.errors import UserError
from tracer.trace import ForwardTable

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True, slots=True)
class LruCurve:
    """Totals of LRU over a trace. L layers, C budgets in the order asked for."""

    scope: str
    budgets: tuple[int, ...]
    unit: str  # "experts" a layer, or "bytes" over all layers
    expert_bytes: np.ndarray  # int64 [L]
    tokens: np.ndarray  # int64 [L], (row, expert) pairs
    lookups: np.ndarray  # int64 [L], distinct experts of each forward
    hit_tokens: np.ndarray  # int64 [L, C]
    hit_experts: np.ndarray  # int64 [L, C]

    @property
    def promotions(self) -> np.ndarray:
        """int64 [L, C]: every expert that misses is loaded."""
        return self.lookups[:, None] - self.hit_experts

    def frame(self) -> pl.DataFrame:
        """One row a budget, layers summed: hit_tokens, hit_experts, promotions, bytes_to_gpu, hit_rate, expert_hit_rate."""
        import polars as pl

        tokens, lookups = int(self.tokens.sum()), int(self.lookups.sum())
        columns = {
            "budget" if self.unit == "experts" else "budget_bytes": np.array(self.budgets, np.int64),
            "hit_tokens": self.hit_tokens.sum(axis=0),
            "hit_experts": self.hit_experts.sum(axis=0),
            "promotions": self.promotions.sum(axis=0),
            "bytes_to_gpu": self.expert_bytes @ self.promotions,
        }
        return pl.DataFrame(columns).with_columns(
            hit_rate=pl.col("hit_tokens") / tokens if tokens else pl.lit(None, pl.Float64),
            expert_hit_rate=pl.col("hit_experts") / lookups if lookups else pl.lit(None, pl.Float64),
        )


def lru_curve(
    trace: Any,
    scope: Literal["layer", "global"] = "layer",
    budgets: Sequence[int] | None = None,
    budget_bytes: Sequence[int] | None = None,
) -> LruCurve:
    """Replay LRU on a trace's recorded experts at many budgets.

    Parameters
    ----------
    trace
        An opened trace.
    scope : str
        "layer": each layer has a cache of its own, counted in experts; "global": one cache over all layers, in bytes.
    budgets : sequence of int, optional
        Experts per layer; 0 to E without.
    budget_bytes : sequence of int, optional
        Bytes over all layers, in place of ``budgets``.

    Raises
    ------
    UserError
        Both or no budgets are given, or one below 0, or an unknown scope.
    """
    geometry = geometry_of(trace)
    if scope not in ("layer", "global"):
        raise UserError(f"There is no scope {scope!r}; give layer or global.")
    if budgets is not None and budget_bytes is not None:
        raise UserError("lru_curve takes budgets or budget_bytes, not both; leave one out.")
    asked = budgets if budget_bytes is None else budget_bytes
    asked = tuple(range(geometry.num_experts + 1)) if asked is None else tuple(int(one) for one in asked)
    if not asked:
        raise UserError("lru_curve got an empty list of budgets; give at least one.")
    unit = "experts" if budget_bytes is None else "bytes"
    if unit == "experts":
        policies = [Lru(scope=scope, budget=one) for one in asked]
    else:
        policies = [Lru(scope=scope, budget_bytes=one) for one in asked]
    curves = _Curves(geometry, policies)
    for _, streams in serve_recorded(trace, curves.begin):
        curves.end(streams)
    return LruCurve(
        scope=scope,
        budgets=asked,
        unit=unit,
        expert_bytes=np.array([geometry.expert_bytes[layer] for layer in geometry.layers], np.int64),
        tokens=curves.tokens,
        lookups=curves.lookups,
        hit_tokens=curves.hits(0),
        hit_experts=curves.hits(1),
    )


class _Curves:
    """Stacks and counts between segments."""

    def __init__(self, geometry: Geometry, policies: list[Lru]) -> None:
        layers, experts = len(geometry.layers), geometry.num_experts
        self.shared = policies[0].scope == "global"
        self.experts = experts
        scopes: list[int | None] = [None] if self.shared else list(range(layers))
        # Layers of equal bytes have equal capacities.
        alike = [None if at is None else geometry.expert_bytes[geometry.layers[at]] for at in scopes]
        found = {
            key: [policy.capacity_and_sizes(geometry, at) for policy in policies]
            for key, at in dict(zip(alike, scopes, strict=True)).items()
        }
        capacities = np.array([[capacity[0] for capacity, _ in found[key]] for key in alike], np.int64)
        self.places = np.argsort(capacities, axis=1, kind="stable")
        self.capacities = np.take_along_axis(capacities, self.places, axis=1)
        self.stacks = [empty_stack(experts, found[key][0][1]) for key in alike]
        # By the place of the smallest capacity that hits; the last place is that of experts no capacity holds.
        self.counts = np.zeros((layers, len(policies) + 1, 2), np.int64)
        self.tokens = np.zeros(layers, np.int64)
        self.lookups = np.zeros(layers, np.int64)

    def begin(self, forwards: ForwardTable) -> Any:
        """What serves a layer: its own stack, or none where one stack takes all layers at the segment's end."""
        return self._take if self.shared else self._serve

    def _take(self, at: int, stream: ExpertStream) -> ExpertStream:
        self._count(at, stream)
        return stream

    def _count(self, at: int, stream: ExpertStream) -> None:
        self.tokens[at] += int(stream.tokens.sum(dtype=np.int64))
        self.lookups[at] += len(stream.experts)

    def _serve(self, at: int, stream: ExpertStream) -> None:
        self._count(at, stream)
        self._on_stack(at, stream, np.zeros(len(stream.cell_forward), np.int64), self.counts[at : at + 1])

    def end(self, streams: list[ExpertStream | None]) -> None:
        """Serve a segment's layers as one stream."""
        if self.shared:
            merged = merge_streams([stream for stream in streams if stream is not None])
            self._on_stack(0, merged, merged.cell_layer.astype(np.int64), self.counts)

    def _on_stack(self, scope: int, stream: ExpertStream, layer: np.ndarray, counts: np.ndarray) -> None:
        serve_stack(
            stream.offsets,
            stream.experts,
            stream.tokens,
            stream.last_touch,
            layer,
            self.experts,
            self.capacities[scope],
            self.stacks[scope],
            counts,
        )

    def hits(self, column: int) -> np.ndarray:
        """int64 [L, C] in the order the budgets were asked for."""
        below = np.cumsum(self.counts[:, :-1, column], axis=1)
        places = np.broadcast_to(self.places, below.shape)
        hits = np.empty_like(below)
        np.put_along_axis(hits, places, below, axis=1)
        return hits
