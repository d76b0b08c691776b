"""Expert sets that drift from step to step, and router scores around them; the engine of :mod:`tracer.synthetic`.

Shapes: L = layers, P = positions of a request, n = rows of a call, K = experts a row, E = experts of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tracer.jit import njit
from tracer.schema import id_type
from tracer.trace import CallRouting

# selection scores of chosen experts and of all others: two of the others never outweigh one chosen, so groups agree too
CHOSEN_LOW, CHOSEN_HIGH, OTHERS_HIGH = 0.5, 0.95, 0.24


@njit
def _uniform(state):
    """Next number in [0, 1) of a splitmix64 stream; ``state`` uint64 [1]."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@njit
def _advance(sets, strengths, drawn, rows, cumulated, temporal, spatial, groups, limit, state, out_ids, out_strengths):
    """One step of the sets of ``rows`` in every layer, written out by descending strength.

    sets int64 and strengths float32 [L, P, K] change in place; drawn bool [P]; cumulated float64 [L, E] is the popularity's
    distribution function; out_ids int64 and out_strengths float32 [L, n, K]. A set never spreads over more than ``limit`` of
    the ``groups``. An expert that leaves does not come back at once.
    """
    layers, _, top_k = sets.shape
    experts = cumulated.shape[1]
    group_size = experts // groups
    member = np.zeros(experts, np.bool_)
    in_group = np.zeros(groups, np.int64)
    for layer in range(layers):
        for r in range(len(rows)):
            p = rows[r]
            fresh = not drawn[p]
            spread = 0
            if not fresh:
                for k in range(top_k):
                    expert = sets[layer, p, k]
                    member[expert] = True
                    spread += in_group[expert // group_size] == 0
                    in_group[expert // group_size] += 1
            for k in range(top_k):
                if not fresh and _uniform(state) < temporal:
                    moved = strengths[layer, p, k] + 0.06 * (_uniform(state) - 0.5)
                    strengths[layer, p, k] = min(max(moved, CHOSEN_LOW), CHOSEN_HIGH)
                    continue
                leaving = sets[layer, p, k]
                if not fresh:
                    in_group[leaving // group_size] -= 1
                    spread -= in_group[leaving // group_size] == 0
                chosen = -1
                # after some draws in vain, try all from a random one on; with K = E nothing but the old expert is left
                start = int(_uniform(state) * experts)
                for attempt in range(64 + experts):
                    if attempt >= 64:
                        expert = (start + attempt) % experts
                    elif p > 0 and drawn[p - 1] and _uniform(state) < spatial:
                        expert = sets[layer, p - 1, int(_uniform(state) * top_k)]
                    else:
                        expert = min(np.searchsorted(cumulated[layer], _uniform(state), "right"), experts - 1)
                    if not member[expert] and (spread < limit or in_group[expert // group_size] > 0):
                        chosen = expert
                        break
                if chosen < 0:
                    chosen = leaving
                if not fresh:
                    member[leaving] = False
                member[chosen] = True
                spread += in_group[chosen // group_size] == 0
                in_group[chosen // group_size] += 1
                sets[layer, p, k] = chosen
                strengths[layer, p, k] = CHOSEN_LOW + (CHOSEN_HIGH - CHOSEN_LOW) * _uniform(state)
            for k in range(top_k):
                expert, strength = sets[layer, p, k], strengths[layer, p, k]
                member[expert] = False
                in_group[expert // group_size] = 0
                place = k
                while place > 0 and out_strengths[layer, r, place - 1] < strength:
                    out_ids[layer, r, place] = out_ids[layer, r, place - 1]
                    out_strengths[layer, r, place] = out_strengths[layer, r, place - 1]
                    place -= 1
                out_ids[layer, r, place] = expert
                out_strengths[layer, r, place] = strength
            if layer == layers - 1:
                drawn[p] = True


@njit
def _fill_scores(ids, strengths, popularity, bias, softmax, state, scores):
    """Scores float32 [L, n, E] around the chosen ids and strengths [L, n, K]; ``bias`` [L, E] is what selection adds."""
    layers, rows, top_k = ids.shape
    experts = popularity.shape[1]
    for layer in range(layers):
        for r in range(rows):
            out = scores[layer, r]
            for e in range(experts):
                out[e] = OTHERS_HIGH * _uniform(state) * popularity[layer, e] - bias[layer, e]
            for k in range(top_k):
                out[ids[layer, r, k]] = strengths[layer, r, k] - bias[layer, ids[layer, r, k]]
            if softmax:
                out /= out.sum()


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides a synthetic router's choices; ``state`` is the random stream."""

    layers: tuple[int, ...]
    popularity: np.ndarray  # float64 [L, E], largest 1
    bias: np.ndarray  # float32 [L, E]
    temporal: float
    spatial: float
    groups: int
    limit: int
    top_k: int
    softmax: bool
    factor: float
    level: str
    state: np.ndarray  # uint64 [1]

    def routing(self, sets: tuple[np.ndarray, np.ndarray, np.ndarray], rows: np.ndarray) -> CallRouting:
        """Advance the rows and say what every layer's router does with them, as TraceWriter.add_call takes it."""
        shape = (len(self.layers), len(rows), self.top_k)
        ids, strengths = np.empty(shape, np.int64), np.empty(shape, np.float32)
        cumulated = np.cumsum(self.popularity / self.popularity.sum(axis=1, keepdims=True), axis=1)
        _advance(
            *sets, rows, cumulated, self.temporal, self.spatial, self.groups, self.limit, self.state, ids, strengths
        )
        chosen = strengths - self.bias[np.arange(len(self.layers))[:, None, None], ids]
        scores = None
        if self.level != "ids":
            scores = np.empty((len(self.layers), len(rows), self.bias.shape[1]), np.float32)
            _fill_scores(ids, strengths, self.popularity, self.bias, self.softmax, self.state, scores)
            chosen = np.take_along_axis(scores, ids, axis=2)
        weights = (chosen / chosen.sum(axis=2, keepdims=True) * np.float32(self.factor)).astype(np.float16)
        return CallRouting(self.layers, ids.astype(id_type(self.bias.shape[1])), weights, scores)
