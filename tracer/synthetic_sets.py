"""Expert sets that drift from step to step, and router scores around them; the engine of :mod:`tracer.synthetic`.

Shapes: L = layers, P = positions of a request, n = rows of a call, K = experts a row, E = experts of a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tracer.jit import njit
from tracer.schema import id_type
from tracer.trace import CallRouting

if TYPE_CHECKING:
    from tracer.synthetic import SyntheticOptions

# selection scores of chosen experts and of all others: two of the others never outweigh one chosen, so groups agree too
CHOSEN_LOW, CHOSEN_HIGH, OTHERS_HIGH = 0.5, 0.95, 0.24
DRAWS = 64  # draws in vain after which an expert is looked for in order


class SyntheticRouters:
    """The sets of all positions of a request in all layers, and what routers say that choose them."""

    def __init__(self, options: SyntheticOptions) -> None:
        # streams of their own: a trace of another level has the same sets
        rng, self.noise = (np.random.default_rng((options.seed, stream)) for stream in (1, 2))
        self.options, self.rng = options, rng
        self.layers = tuple(range(1, 1 + options.layers))
        shape = (options.layers, options.experts)
        popularity = (np.argsort(rng.random(shape), axis=1) + 1.0) ** -options.skew  # float64 [L, E], largest 1
        self.cumulated = np.cumsum(popularity / popularity.sum(axis=1, keepdims=True), axis=1)
        self.others_high = (OTHERS_HIGH / 65536 * popularity).astype(np.float32)[
            :, None
        ]  # float32 [L, 1, E], of 16 bits
        self.bias = np.zeros((options.layers, 1, options.experts), np.float32)
        if options.expert_bias and options.score_function == "sigmoid":
            self.bias = rng.uniform(-0.02, 0.0, self.bias.shape).astype(np.float32)
        self.state = rng.integers(0, 2**63, 1).astype(np.uint64)

    def begin(self, length: int) -> None:
        """Begin a request of so many positions: no set is drawn yet."""
        shape = (self.options.layers, length, self.options.top_k)
        self.sets, self.strengths = np.full(shape, -1), np.zeros(shape, np.float32)

    def routing(self, low: int, high: int) -> CallRouting:
        """One step of the sets at positions ``low`` to ``high - 1``, best experts first."""
        options, rng = self.options, self.rng
        sets, strengths = self.sets[:, low:high], self.strengths[:, low:high]
        leave = (sets < 0) | (rng.random(sets.shape, np.float32) >= options.temporal)
        drawn = rng.random(sets.shape, np.float32)
        moved = np.clip(strengths + 0.06 * (drawn - 0.5), CHOSEN_LOW, CHOSEN_HIGH)
        strengths[:] = np.where(leave, CHOSEN_LOW + (CHOSEN_HIGH - CHOSEN_LOW) * drawn, moved)
        _renew(self.sets, low, leave, self.cumulated, options.spatial, options.groups, options.topk_group, self.state)
        order = np.argsort(-strengths, axis=2)
        ids, chosen = np.take_along_axis(sets, order, 2), np.take_along_axis(strengths, order, 2)
        scores = None
        if options.level == "ids":
            chosen = chosen - np.take_along_axis(self.bias, ids, 2)
        else:
            draws = np.frombuffer(self.noise.bytes(2 * ids.size // options.top_k * options.experts), np.uint16)
            scores = draws.reshape(*ids.shape[:2], -1) * self.others_high
            np.put_along_axis(scores, ids, chosen, 2)
            scores -= self.bias
            if options.score_function == "softmax":
                scores /= scores.sum(axis=2, keepdims=True)
            chosen = np.take_along_axis(scores, ids, 2)
        weights = chosen / chosen.sum(axis=2, keepdims=True) * np.float32(options.routed_scaling_factor)
        return CallRouting(self.layers, ids.astype(id_type(options.experts)), weights.astype(np.float16), scores)


@njit
def _uniform(state):
    """Next number in [0, 1) of a splitmix64 stream; ``state`` uint64 [1]."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@njit
def _renew(sets, low, leave, cumulated, spatial, groups, limit, state):
    """Replace the experts that leave, in place; where no other may come, one stays.

    A set spreads over ``limit`` of the ``groups`` at most. ``sets`` int64 [L, P, K], -1 before the first draw; ``leave``
    bool [L, n, K] is of the positions from ``low`` on; ``cumulated`` float64 [L, E] is the popularity's distribution function.
    """
    layers, rows, top_k = leave.shape
    experts = cumulated.shape[1]
    size = experts // groups
    held = np.zeros(groups, np.bool_)
    for layer in range(layers):
        for p in range(low, low + rows):
            members, left = sets[layer, p], sets[layer, max(p - 1, 0)]
            near = p > 0 and left[0] >= 0
            for k in range(top_k):
                if not leave[layer, p - low, k]:
                    continue
                spread = 0
                for j in range(top_k):
                    if j != k and members[j] >= 0:
                        spread += not held[members[j] // size]
                        held[members[j] // size] = True
                start = int(_uniform(state) * experts)
                for attempt in range(DRAWS + experts):
                    if attempt >= DRAWS:
                        expert = (start + attempt) % experts
                    elif near and _uniform(state) < spatial:
                        expert = left[int(_uniform(state) * top_k)]
                    else:
                        expert = min(np.searchsorted(cumulated[layer], _uniform(state), "right"), experts - 1)
                    if (spread < limit or held[expert // size]) and expert not in members:
                        members[k] = expert
                        break
                held[:] = False
