"""What overlap would be without consistency: static hot lists, independent draws, other blocks.

M = sampled rows, L = layers, E = experts. "hot" holds sampled rows against the layer's most popular experts;
"independent" pairs rows of different blocks or requests, drawn at random; "shuffle" pairs a position with the same
position of its request's previous block.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from analysis.metrics.kernels.sets import pair_sums, row_bits
from analysis.metrics.shared.frames import divide, with_total
from analysis.metrics.shared.load import Load
from analysis.metrics.shared.samples import RowSample, hashed
from analysis.metrics.shared.study import Memory, Study, Watcher
from analysis.metrics.shared.timeline import KNOWN, STILL_MASKED, Timeline
from analysis.metrics.shared.view import LayerView, Shape

CLASSES = ("masked", "mixed", "known", "all")
"""Pairs of rows a null is given for: both masked, one of each, both known, any."""

WORDS = {
    "hot": "the layer's most used experts",
    "independent": "rows of other blocks",
    "shuffle": "the same position of the block before",
}
"""The nulls in words."""

Table = dict[str, np.ndarray]
"""{"jaccard" | "kept" | "unchanged": float64 [L + 1, classes]}, all layers together last."""


class Overlaps(NamedTuple):
    """Sums over pairs of K-sets: pairs, their Jaccard, experts shared, experts of the earlier set, and equal sets.

    ``jaccard`` is float64, the others int64, all of one shape.
    """

    pairs: np.ndarray
    jaccard: np.ndarray
    kept: np.ndarray
    before: np.ndarray
    same: np.ndarray

    @classmethod
    def zeros(cls, *cells: int) -> Overlaps:
        """Nothing summed yet."""
        return cls(*(np.zeros(cells, np.float64 if name == "jaccard" else np.int64) for name in cls._fields))

    def shares(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Numerator and denominator of each metric: ``jaccard``; ``kept``, the share of the earlier set's experts that
        the other has; ``unchanged``, the share of equal sets."""
        return {
            "jaccard": (self.jaccard, self.pairs),
            "kept": (self.kept, self.before),
            "unchanged": (self.same, self.pairs),
        }

    def table(self) -> Table:
        """The metrics of sums [L, classes]."""
        return {name: divide(*(with_total(part, 0) for part in parts)) for name, parts in self.shares().items()}


class NeighbourBlocks(Watcher):
    """Overlap of a position with the same position of the previous block of its request, a random step of each.

    Exact over the trace; the step is chosen by a hash of (request, block, position). ``sums`` [L, 4], by 2 * (known
    before) + (known now).
    """

    def __init__(self, study: Study) -> None:
        self.shape, self.seed = study.shape, study.settings.seed
        self.memory = Memory()
        self.sums = Overlaps.zeros(len(study.shape.layers), 4)

    def begin(self, times: Timeline) -> None:
        width = times.grid.shape[1]
        starts, lengths = times.run_offsets[:-1], np.diff(times.run_offsets)
        run, offset = np.repeat(np.arange(times.runs), width), np.tile(np.arange(width), times.runs)
        key = hashed(self.seed + 1, times.run_request[run], times.block[starts][run], offset)
        step = (key % np.maximum(lengths, 1).astype(np.uint64)[run]).astype(np.int64)
        self.part = (starts[run] + step).reshape(-1, width)
        self.offset = np.arange(width)
        self.requests = times.run_request.tolist()
        self.state = times.state[self.part, self.offset].astype(np.int64)
        # Runs are sorted by request and block: the run before is the previous block wherever the request is the same.
        self.met = [r for r in dict.fromkeys(self.requests) if r in self.memory]
        before = {request: place for place, request in enumerate(self.met)}
        previous, met = [], len(self.met)
        for r, request in enumerate(self.requests):
            same = r > 0 and self.requests[r - 1] == request
            previous.append(met + r - 1 if same else before.get(request, -1))
        have = np.flatnonzero(np.array(previous, np.int64) >= 0)
        earlier = np.array(previous, np.int64)[have]
        states = np.concatenate([*(self.memory[r][2][None] for r in self.met), self.state]).reshape(-1)
        self.left = (earlier[:, None] * width + self.offset).reshape(-1)
        self.right = ((have + met)[:, None] * width + self.offset).reshape(-1)
        self.cell = np.maximum(2 * states[self.left] + states[self.right], 0)
        layers, words = len(self.shape.layers), self.shape.words
        self.sets = (
            np.zeros((times.runs, layers, width, words), np.uint64),
            np.zeros((times.runs, layers, width), np.int64),
        )

    def layer(self, view: LayerView) -> None:
        stacked = []
        for number, sets in enumerate((view.bits, view.size)):
            chosen = sets[self.part, self.offset]
            self.sets[number][:, view.index] = chosen
            stacked.append(np.concatenate([*(self.memory[r][number][None, view.index] for r in self.met), chosen]))
        pairs = self.left, self.right, self.cell, *(array[view.index] for array in self.sums)
        pair_sums(stacked[0].reshape(-1, self.shape.words), stacked[1].reshape(-1), *pairs)

    def end(self) -> None:
        # Copies, as a view would keep the whole segment.
        fresh = zip(*self.sets, self.state, strict=True)
        self.memory.renew((r, tuple(map(np.copy, one))) for r, one in zip(self.requests, fresh, strict=True))

    def table(self) -> Table:
        """The metrics by :data:`CLASSES`."""
        cells = ((masked, mixed + other, known) for masked, mixed, other, known in (a.T for a in self.sums))
        return Overlaps(*(np.stack([*cell, cell[0] + cell[1] + cell[2]], axis=-1) for cell in cells)).table()


def row_nulls(sample: RowSample, load: np.ndarray, shape: Shape, pairs: int, seed: int) -> dict[str, Table]:
    """Overlaps of sampled rows with the hot list ("hot") and with rows of other blocks ("independent").

    The hot list of a layer holds its K most used experts, ties to the lowest id. ``load`` int64 [L, E] says which.
    """
    rng = np.random.default_rng(seed)
    state = sample.columns["state"]
    everything = np.arange(len(sample))
    masked, known = np.flatnonzero(state == STILL_MASKED), np.flatnonzero(state == KNOWN)
    sides = ((masked, masked), (masked, known), (known, known), (everything, everything))
    drawn = [sample.pairs(a, b, pairs, rng) for a, b in sides]
    listed = [(np.full(len(rows), len(sample)), rows) for rows in (masked, everything, known, everything)]
    tables = {}
    for name, chosen in (("hot", listed), ("independent", drawn)):
        left, right = (np.concatenate(side) for side in zip(*chosen, strict=True))
        cell = np.repeat(np.arange(len(CLASSES)), [len(a) for a, _ in chosen])
        sums = Overlaps.zeros(len(shape.layers), len(CLASSES))
        for layer, top_k in enumerate(shape.top_k):
            ids, count = sample.rows(layer)
            hot = np.argsort(-load[layer], kind="stable")[:top_k]
            ids = np.concatenate([ids, np.zeros((1, ids.shape[1]), ids.dtype)])
            ids[-1, : len(hot)] = hot
            bits, size = row_bits(ids, np.append(count, np.uint8(len(hot))), np.arange(len(ids))[:, None], shape.words)
            pair_sums(bits[:, 0], size[:, 0], left, right, cell, *(array[layer] for array in sums))
        tables[name] = sums.table()
    return tables


class RowNulls(Watcher):
    """The three nulls of overlaps of K-sets."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.sample, self.load = study.watch(RowSample), study.watch(Load)
        self.neighbours = study.watch(NeighbourBlocks)

    @cached_property
    def tables(self) -> dict[str, Table]:
        """{"hot" | "independent" | "shuffle": metrics}, once the trace has been seen."""
        settings = self.study.settings
        nulls = row_nulls(self.sample, self.load.total, self.study.shape, settings.pairs, settings.seed)
        return {**nulls, "shuffle": self.neighbours.table()}

    def columns(self, metric: str, classes: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
        """``null_*`` columns of one metric, [L + 1, *classes], for a grid of :data:`CLASSES`."""
        chosen = [[CLASSES.index(name) for name in row] for row in classes]
        return {f"null_{name}": table[metric][:, chosen] for name, table in self.tables.items()}
