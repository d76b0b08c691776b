"""How often each expert is used, and how often it belongs to the experts a denoise forward uses most.

G = bootstrap units, L = layers, E = experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from analysis.metrics.kernels.loads import UNWANTED, member_sums
from analysis.metrics.shared.frames import divide, ordered_sum
from analysis.metrics.shared.settings import UNITS
from analysis.metrics.shared.study import Study, Watcher
from analysis.metrics.shared.timeline import Timeline
from analysis.metrics.shared.view import LayerView

POPULAR = "independent rows, same popularity"
"""What :func:`popular_unique` stands for, in words."""

ACTIVITY = {
    "hot": "a static list of experts",
    "independent": "independent steps",
    "shuffle": "the request's steps in random order",
}
"""Nulls of how long experts stay, in words."""


class Load(Watcher):
    """Load of every expert over the denoise forwards: of block rows where the trace knows them, else of all rows.

    ``load`` int64 [G, L, E]; ``active`` int64 [L, E], forwards that use the expert; ``steps`` int64 [L], forwards that
    use any; ``rows`` int64 [L], routed rows.
    """

    def __init__(self, study: Study) -> None:
        self.scope = study.scopes[0]
        layers, experts = len(study.shape.layers), study.shape.experts
        self.load = np.zeros((UNITS, layers, experts), np.int64)
        self.active, self.steps = np.zeros((layers, experts), np.int64), np.zeros(layers, np.int64)
        self.rows = np.zeros(layers, np.int64)

    def layer(self, view: LayerView) -> None:
        loads = view.loads(self.scope)
        np.add.at(self.load[:, view.index], view.times.run_unit, view.times.by_run(loads))
        self.active[view.index] += (loads > 0).sum(axis=0)
        self.steps[view.index] += np.count_nonzero(loads.any(axis=1))
        self.rows[view.index] += np.count_nonzero(view.size) if self.scope == "block" else view.routed_rows.sum()

    @property
    def total(self) -> np.ndarray:
        """int64 [L, E]."""
        return ordered_sum(self.load, 0)


class Members(Watcher):
    """Denoise forwards of one scope in which each expert is among the most used, by size of that set.

    ``sizes``: the budgets, then UNWANTED for all active experts. ``member`` int64 [sets, G, L, E]; ``steps`` int64 [L],
    forwards with load; ``parts`` int64 [G], all of them.
    """

    def __init__(self, study: Study, scope: str) -> None:
        self.scope, shape = scope, study.shape
        self.sizes = (*study.budgets, UNWANTED)
        self.member = np.zeros((len(self.sizes), UNITS, len(shape.layers), shape.experts), np.int64)
        self.steps, self.parts = np.zeros(len(shape.layers), np.int64), np.zeros(UNITS, np.int64)

    def begin(self, times: Timeline) -> None:
        np.add.at(self.parts, times.unit, 1)

    def layer(self, view: LayerView) -> None:
        ranks = view.ranks(self.scope)
        for number, size in enumerate(self.sizes):
            member_sums(ranks, size, view.times.unit, self.member[number, :, view.index])
        self.steps[view.index] += np.count_nonzero(view.loads(self.scope).any(axis=1))

    def share(self, number: int) -> np.ndarray:
        """Share of the steps with load in which each expert belongs to a set, float64 [L, E]."""
        return np.nan_to_num(divide(ordered_sum(self.member[number], 0), self.steps[:, None]))


def popular_unique(load: np.ndarray, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Distinct experts of n independent rows with the layer's popularity, sum over e of 1 - (1 - p_e)^n, float64 [L,
    N].

    ``load`` int64 [L, E]; ``rows`` int64 [L], the rows behind it, so p_e = load / rows; ``counts`` [N], the n.
    """
    share = np.nan_to_num(divide(load, rows[:, None]))
    unique = np.zeros((len(load), len(counts)))
    for place, n in enumerate(counts):
        unique[:, place] = ordered_sum(1 - (1 - share) ** n, 1)
    return unique


def all_drawn(marked: np.ndarray, steps: np.ndarray, longest: int) -> Iterator[np.ndarray]:
    """Chances that 1, 2, .. ``longest`` of ``steps``, taken at random without return, all lie among the ``marked`` ones.

    0 where there are fewer steps. This is what putting the forwards of a request in random order makes of an expert
    that ``marked`` of them use.
    """
    chance = np.ones(np.broadcast_shapes(marked.shape, steps.shape))
    for taken in range(longest):
        # Once more are taken than are marked a factor is 0, so those after it need not be right.
        chance = chance * (np.maximum(marked - taken, 0) / np.maximum(steps - taken, 1))
        yield chance
