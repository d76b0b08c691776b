"""The contract of the simulator: what each of the three policies is asked, what it answers, how it is found by name.

A replay multiplies three independent questions: which tokens a step accepts (acceptance), which experts each row uses
(routing), which experts are in fast memory (residency). Policies are dataclasses whose fields are their parameters; the file
name is the policy's name. They hold no counters: ``replay.py`` derives every figure from trajectory, selection and placement.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from tracer.trace import ForwardTable, LayerTrace, RouterSpec, Segment

WEIGHTS, ACTIVE, SCORES = "weights", "active", "scores"
CONFIDENCE, BRANCHES, TOKENS = "confidence", "branches", "tokens"


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a policy may know before the first row."""

    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    routers: dict[int, RouterSpec]
    expert_bytes: dict[int, int]
    block_length: int  # 0 without blocks
    first_block: dict[int, int]  # request -> absolute block, -1 without blocks
    decoding: dict[str, Any]  # meta.json's decoding section
    dense_bytes: int | None = None  # weights that are not routed experts
    # Recorded tokens of each layer's experts, L times E; None where no policy of the replay asks for them.
    loads: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The replay's own forwards, and where each of their rows comes from. R rows.

    ``source`` is the row of the recorded segment whose router row a simulated row takes (None = row i is row i, and
    ``forwards`` are the recorded ones); rows past the segment's last are those of ``following``, the model call after it.
    ``reused`` rows keep their previous output: no router, no expert. ``cold`` rows are
    restricted to what the others use (TEAM). ``notes`` and ``bounds`` go to the summary: bounds are sums over the segment,
    ``{"accepted": (lo, hi), "denoise_forwards": (lo, hi)}``, first the scenario of the fewest tokens per forward, then
    that of the most; ``tokens_per_forward`` lies between the two quotients. ``bound_rows`` are the rows
    whose selected experts make the lower bound of a forward's unique experts, and those whose recorded ones make the upper.
    """

    forwards: ForwardTable
    position: np.ndarray | None  # int32 [R]; None where the trace has no tokens table
    state: np.ndarray | None  # uint8 [R], codes of schema.STATES
    branch: np.ndarray | None = None  # uint8 [R]; None = all 0
    source: np.ndarray | None = None  # int64 [R]
    reused: np.ndarray | None = None  # bool [R]
    cold: np.ndarray | None = None  # bool [R]
    notes: tuple[str, ...] = ()
    bounds: dict[str, tuple[int, int]] | None = None
    bound_rows: tuple[np.ndarray, np.ndarray] | None = None  # two bool [R]
    following: Segment | None = None  # of one call

    @property
    def recorded(self) -> bool:
        """Whether these are the trace's own forwards."""
        return self.source is None


@dataclass(frozen=True, slots=True)
class Selection:
    """Which experts each row of a trajectory uses in one layer. ``count`` 0: the row computes no expert."""

    expert_ids: np.ndarray  # uint8 | uint16 [R, K]
    count: np.ndarray  # uint8 [R]
    gate_weights: np.ndarray | None  # float32 or float16 [R, K]; None where neither trace nor scores give them


@dataclass(frozen=True, slots=True)
class ExpertStream:
    """The distinct experts each cell needs, in the order they are first touched.

    A cell is one (forward, layer). For a policy with scope "layer" a stream holds one layer's cells, one per forward the layer
    ran in; with scope "global" it holds all layers' cells, forwards outermost, layers ascending. Inside a cell: rows ascending,
    within a row by descending gate weight, ties to the lowest id; a repeat is not listed again but counts in ``tokens``.
    ``last_touch`` ranks a cell's entries by their last touch in that same row order, 0 the earliest: a repeat makes an expert
    more recent.
    """

    cell_forward: np.ndarray  # int64 [C], index into the forwards table
    cell_layer: np.ndarray  # int32 [C], index into Geometry.layers
    offsets: np.ndarray  # int64 [C + 1]
    experts: np.ndarray  # uint16 [D]
    tokens: np.ndarray  # uint32 [D], rows that use the expert in the cell
    last_touch: np.ndarray  # uint16 [D]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where each entry of a stream was when needed and where it ran, and what moved in each cell."""

    hit: np.ndarray  # bool [D], resident when needed (after a refresh, before a demand load)
    on_gpu: np.ndarray  # bool [D], executed on the GPU
    promotions: np.ndarray  # int64 [C], experts copied host -> GPU
    demotions: np.ndarray  # int64 [C], experts dropped from the GPU
    copied_back: np.ndarray  # int64 [C], of the demotions those that cross the bus GPU -> host
    resident: np.ndarray  # int64 [C], experts held in fast memory at most while the cell ran (in a stream's own scope)
    resident_bytes: np.ndarray | None = None  # int64 [C], their bytes; None = experts * bytes of the cell's layer
    refreshed: np.ndarray | None = (
        None  # bool [C], the resident set was chosen anew here; None = the policy has no refreshes
    )


class AcceptancePolicy(Protocol):
    """Which tokens a step accepts, so which forwards happen."""

    requires: ClassVar[frozenset[str]]

    def unroll(self, segment: Segment, geometry: Geometry) -> Trajectory:
        """The forwards this policy would run on the blocks of a segment."""
        ...


class RoutingPolicy(Protocol):
    """Which experts each row uses. ``layer`` is already gathered to the trajectory's rows."""

    requires: ClassVar[frozenset[str]]

    def select(self, layer: LayerTrace, trajectory: Trajectory, geometry: Geometry) -> Selection:
        """Experts of every row of the trajectory in one layer."""
        ...


class ResidencyPolicy(Protocol):
    """Which experts are in fast memory. State is an explicit value carried from segment to segment.

    Routing and residency policies may have ``notes``, sentences that go to every run, and residency policies
    ``notes_on(geometry)``, those that depend on the model. Routing policies may have ``acceptance()``, the acceptance policy
    they bring along (None: the recorded forwards), and ``recorded_in(geometry)``, whether the trace was recorded under this
    very policy, so that its replay is no estimate.

    ``on_demand = True`` (optional) says that it fetches whatever a batch needs: through a staging slot outside its budget where
    ``staged`` is true (optional too), else in place, so that it may hold more than its budget.
    ``ordered = False`` (optional) says that placements depend neither on the order of a cell's entries nor on their last touch.
    ``together = True`` (optional) says that a policy with scope "layer" can also serve all layers in one stream, each as it
    would alone; its ``layer`` is None then.
    ``passes = 2`` policies get ``fit`` called with every stream of the run, in order, before the first ``place``. A policy that
    decides by the machine's speed has ``priced(cost, geometry)``, the policy to use on each.
    """

    requires: ClassVar[frozenset[str]]
    passes: ClassVar[int]
    scope: str  # "layer" | "global"

    def start(self, geometry: Geometry, layer: int | None) -> Any:
        """Initial state of one layer (an index into ``geometry.layers``), or of all (None)."""
        ...

    def fit(self, streams: Iterable[ExpertStream], geometry: Geometry, layer: int | None) -> Any:
        """Initial state from the whole run's streams, for ``passes = 2`` policies; replaces ``start``."""
        ...

    def place(
        self, stream: ExpertStream, forwards: ForwardTable, geometry: Geometry, state: Any
    ) -> tuple[Placement, Any]:
        """Serve a segment's stream; return what happened and the state to go on with."""
        ...
