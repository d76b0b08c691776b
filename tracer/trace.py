"""What a trace holds, as frozen dataclasses over NumPy arrays. Never imports torch, pyarrow or polars.

Shapes use F = model calls ("forwards") of a segment, N = (call, request) pairs, T = token rows, K = experts per row,
E = experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tracer.schema import PADDING


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """How a layer's router turns scores into experts and weights.

    Selection uses ``score + expert_bias``; with ``n_group > 1`` only the ``topk_group`` best groups of ``E / n_group``
    consecutive experts are kept, a group's score being the sum of its two largest (``top2_sum``) or its ``max``. The weight of
    a chosen expert is its unbiased score (biased with ``bias_in_weights``), divided by the sum over the chosen when
    ``norm_topk_prob``, times ``routed_scaling_factor``, times ``expert_scale``. Source: LLaDA2.0 and Qwen3-MoE configurations.
    """

    num_experts: int
    top_k: int
    score_function: str = "softmax"
    norm_topk_prob: bool = True
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    expert_bias: np.ndarray | None = None  # float32 [E]
    bias_in_weights: bool = False
    group_score: str = "top2_sum"
    expert_scale: np.ndarray | None = None  # float32 [E]


@dataclass(frozen=True, slots=True)
class ForwardTable:
    """The model calls of a segment and the requests in them.

    ``forward_id`` [F]; ``row_offsets`` int64 [F + 1] bounds each call's rows in the segment's row arrays; ``part_offsets``
    int64 [F + 1] bounds its (call, request) parts. Everything else is [N], one entry a part, in call order. ``row_start``
    counts from the call's first row. ``kind`` holds codes of :data:`tracer.schema.KINDS`. ``kv_tokens``, ``num_masked``,
    ``num_accepted``, ``chosen_branch`` and ``duration_ns`` are -1 where unknown.
    """

    forward_id: np.ndarray  # uint32 [F]
    row_offsets: np.ndarray  # int64 [F + 1]
    part_offsets: np.ndarray  # int64 [F + 1]
    request_id: np.ndarray  # uint32 [N]
    kind: np.ndarray  # uint8 [N]
    block: np.ndarray  # int32 [N]
    step: np.ndarray  # int32 [N]
    row_start: np.ndarray  # int64 [N]
    num_tokens: np.ndarray  # int64 [N]
    kv_tokens: np.ndarray  # int64 [N]
    num_masked: np.ndarray  # int64 [N]
    num_accepted: np.ndarray  # int64 [N]
    num_edited: np.ndarray  # int64 [N]
    branches: np.ndarray  # uint8 [N]
    chosen_branch: np.ndarray  # int16 [N]
    duration_ns: np.ndarray  # int64 [N]

    @property
    def num_forwards(self) -> int:
        return len(self.forward_id)

    @property
    def num_rows(self) -> int:
        return int(self.row_offsets[-1])

    @property
    def forward_kind(self) -> np.ndarray:
        """uint8 [F]: the kind of each call, that of its first part (all parts of a call share it)."""
        return self.kind[self.part_offsets[:-1]]

    @property
    def part_forward(self) -> np.ndarray:
        """int64 [N]: the call, 0..F-1, each part belongs to."""
        return np.repeat(np.arange(self.num_forwards), np.diff(self.part_offsets))

    @property
    def part_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Two int64 [N]: first row and row after the last of each part, in the segment's row arrays."""
        start = self.row_offsets[:-1][self.part_forward] + self.row_start
        return start, start + self.num_tokens


@dataclass(frozen=True, slots=True)
class TokenTable:
    """The token rows of a segment, [T] each, in the order of the calls' rows.

    ``confidence`` is NaN and ``predicted_id`` -1 outside the current block. ``argmax_id`` and ``argmax_confidence`` repeat
    ``predicted_id`` and ``confidence`` where the file says null.
    """

    position: np.ndarray  # int32
    token_id: np.ndarray  # int32
    state: np.ndarray  # uint8
    predicted_id: np.ndarray  # int32
    confidence: np.ndarray  # float32
    argmax_id: np.ndarray  # int32
    argmax_confidence: np.ndarray  # float32
    accepted: np.ndarray  # bool
    edited: np.ndarray  # bool


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """Routing of one MoE layer over the rows of a segment.

    Rows of a call in which the layer did not run have ``count`` 0 and the call's ``present`` is False; padding rows have
    ``count`` 0 too, unless they were asked for. Ids and weights beyond ``count`` are 0. ``router_scores`` is NaN where the
    trace holds none: experts that level "active" left out, rows whose scores were not recorded, rows that were not routed.
    """

    layer: int
    expert_ids: np.ndarray  # uint8 | uint16 [T, K]
    count: np.ndarray  # uint8 [T], how many of the K are real (0 = not routed)
    gate_weights: np.ndarray | None  # float16 [T, K]
    router_scores: np.ndarray | None  # float32 [T, E], before bias
    present: np.ndarray  # bool [F]
    router: RouterSpec


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of model calls that ends at a block end; the unit in which a trace is read and replayed.

    ``load`` gives one layer's routing as recorded: ``load(layer, with_scores, with_weights)``. ``tokens`` is None where the
    trace has no tokens table. ``following``, where there is one, gives the model call after the segment as a segment of its
    own, None after the trace's last call.
    """

    forwards: ForwardTable
    tokens: TokenTable | None
    layers: tuple[int, ...]
    load: Callable[[int, bool, bool], LayerTrace]
    following: Callable[[], Segment | None] | None = None

    def layer(
        self, layer: int, with_scores: bool = False, with_weights: bool = True, with_padding: bool = False
    ) -> LayerTrace:
        """Routing of one layer; ``router_scores`` is None unless ``with_scores`` and the trace holds them.

        Without ``with_weights`` a stored trace reads ids alone, which is several times faster, and ``gate_weights`` may be
        None. Padding counts for nothing (trace-format.md): its rows come back as not routed, unless ``with_padding``.
        """
        found = self.load(layer, with_scores, with_weights)
        padding = None if with_padding else self.padding
        return found if padding is None else without_rows(found, padding)

    @property
    def padding(self) -> np.ndarray | None:
        """bool [T]: rows that are padding; None where there are none."""
        if self.tokens is None:
            return None
        padding = self.tokens.state == PADDING
        return padding if padding.any() else None


def without_rows(layer: LayerTrace, rows: np.ndarray) -> LayerTrace:
    """A layer with some rows (bool [T]) turned into rows that were not routed."""
    ids, weights, scores = layer.expert_ids.copy(), layer.gate_weights, layer.router_scores
    ids[rows] = 0
    if weights is not None:
        weights = np.where(rows[:, None], np.float16(0), weights)
    if scores is not None:
        scores = np.where(rows[:, None], np.float32(np.nan), scores)
    count = np.where(rows, np.uint8(0), layer.count)
    return replace(layer, expert_ids=ids, count=count, gate_weights=weights, router_scores=scores)


@dataclass(frozen=True, slots=True)
class CallRouting:
    """What the routers of one model call said: L layers, N rows, K experts a row, E experts of a layer.

    A recorder hands it to a writer as it is. ``layers`` ascend. Weights that are NaN throughout a layer are not known.
    """

    layers: tuple[int, ...]
    expert_ids: np.ndarray  # int [L, N, K], distinct in a row, real ones first
    gate_weights: np.ndarray | None = None  # float [L, N, K]
    router_scores: np.ndarray | None = None  # float [L, N, E], NaN in rows whose scores were not recorded
    count: np.ndarray | None = None  # int [L, N], how many of the K are real; None = all


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Geometry of the traced model, from its own config. Byte counts are of weights as loaded (``dtype``)."""

    id: str
    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden_size: int | None
    moe_intermediate_size: int | None
    num_shared_experts: int
    expert_bytes: dict[int, int]  # layer -> bytes of one expert
    dense_bytes: int | None  # everything that is not a routed expert
    dtype: str | None
    revision: str | None = None
    class_name: str | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None


@dataclass(frozen=True, slots=True)
class TraceMeta:
    """``meta.json``, checked. ``raw`` is the whole document, unknown keys included."""

    schema_version: int
    complete: bool
    capture_level: str
    model: ModelInfo
    routers: dict[int, RouterSpec]  # layer -> spec, of denoise calls where kinds differ
    tables: tuple[str, ...]
    decoding: dict[str, Any]
    provenance: dict[str, Any]
    segments: int | None  # how many there are, once complete
    raw: dict[str, Any] = field(repr=False)
    # kind -> layer -> spec, where calls of different kinds go through routers of their own over the same experts
    kind_routers: dict[str, dict[int, RouterSpec]] = field(default_factory=dict)

    def router_of(self, kind: str, layer: int) -> RouterSpec:
        """The router that calls of a kind go through in a layer."""
        return self.kind_routers.get(kind, self.routers)[layer]

    @property
    def block_length(self) -> int:
        """Block length of the decoding, 0 where the trace has no blocks."""
        return int(self.decoding.get("block_length") or 0)
