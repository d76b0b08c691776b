"""Seeded samples of a trace that do not depend on how it is cut into segments, for the nulls.

Rows and forwards are kept by the smallest hash of (request, block, step, position). M = sampled rows or forwards, L =
layers, E = experts.
"""

from __future__ import annotations

import numpy as np

from analysis.metrics.kernels.sets import mix
from analysis.metrics.shared.study import Study, Watcher
from analysis.metrics.shared.timeline import Timeline
from analysis.metrics.shared.view import LayerView


def hashed(seed: int, *columns: np.ndarray) -> np.ndarray:
    """uint64: a well mixed word of integer columns, :func:`~analysis.metrics.kernels.sets.mix` once a column."""
    word = np.full(len(columns[0]), seed, np.uint64)
    for column in columns:
        word = mix(word + column.astype(np.int64).view(np.uint64))
    return word


class Sample(Watcher):
    """Keeps the ``capacity`` smallest hashes, what they belong to, and a payload of every layer, sorted by hash."""

    def __init__(self, capacity: int, names: tuple[str, ...]) -> None:
        self.capacity = capacity
        self.key = np.empty(0, np.uint64)
        self.columns = {name: np.empty(0, np.int64) for name in names}
        self.payload: dict[str, np.ndarray] = {}
        self.new_places = self.new_rows = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self.key)

    def offer(self, key: np.ndarray, rows: np.ndarray, columns: dict[str, np.ndarray]) -> None:
        """Take in the candidates that belong to the sample; their payload is written to ``new_places`` from
        ``new_rows``."""
        if len(self.key) == self.capacity:
            low = key < self.key[-1]
            key, rows, columns = key[low], rows[low], {name: column[low] for name, column in columns.items()}
        old = len(self.key)
        together = np.concatenate([self.key, key])
        order = np.argsort(together, kind="stable")[: self.capacity]
        self.key = together[order]
        self.columns = {name: np.concatenate([self.columns[name], columns[name]])[order] for name in self.columns}
        fresh = order >= old
        self.new_places = np.flatnonzero(fresh)
        self.new_rows = rows[order[fresh] - old]
        kept = np.flatnonzero(~fresh)
        for name, array in self.payload.items():
            moved = np.zeros((len(order), *array.shape[1:]), array.dtype)
            moved[kept] = array[order[kept]]
            self.payload[name] = moved

    def other_block(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """bool: whether members ``first`` and ``second`` come from different blocks or requests."""
        request, block = self.columns["request"], self.columns["block"]
        return (request[first] != request[second]) | (block[first] != block[second])

    def pairs(
        self, first: np.ndarray, second: np.ndarray, count: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Random pairs of members out of two lists, from different blocks or requests, at most ``count``: two int64
        arrays."""
        if not len(first) or not len(second):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        left, right = first[rng.integers(0, len(first), count)], second[rng.integers(0, len(second), count)]
        apart = self.other_block(left, right)
        return left[apart], right[apart]


class RowSample(Sample):
    """Block rows of denoise forwards, uniformly: ``ids`` [M, L, K] and ``count`` uint8 [M, L]."""

    def __init__(self, study: Study) -> None:
        super().__init__(study.settings.sample_rows, ("request", "block", "offset", "unit", "state"))
        self.seed, shape = study.settings.seed, study.shape
        width = max(shape.top_k, default=1)
        self.payload = {
            "ids": np.empty((0, len(shape.layers), width), np.uint8 if shape.experts <= 256 else np.uint16),
            "count": np.empty((0, len(shape.layers)), np.uint8),
        }

    def begin(self, times: Timeline) -> None:
        part, offset = np.nonzero(times.grid >= 0)
        columns = {
            "request": times.request[part],
            "block": times.block[part],
            "offset": offset,
            "unit": times.unit[part],
            "state": times.state[part, offset].astype(np.int64),
        }
        key = hashed(self.seed, columns["request"], columns["block"], times.step[part], offset)
        self.offer(key, times.grid[part, offset], columns)

    def layer(self, view: LayerView) -> None:
        width = view.ids.shape[1]
        self.payload["ids"][self.new_places, view.index, :width] = view.ids[self.new_rows]
        self.payload["count"][self.new_places, view.index] = view.count[self.new_rows]

    def rows(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids [M, K], each row's ascending, count uint8 [M]) of one layer."""
        ids = self.payload["ids"][:, index].copy()
        count = np.ascontiguousarray(self.payload["count"][:, index])
        spare = np.arange(ids.shape[1]) >= count[:, None]
        ids[spare] = np.iinfo(ids.dtype).max
        ids.sort(axis=1)
        ids[spare] = 0
        return ids, count


class ForwardSample(Sample):
    """Loads of denoise forwards, uniformly: ``loads`` [M, L, E], in one scope."""

    def __init__(self, study: Study, scope: str) -> None:
        super().__init__(study.settings.sample_forwards, ("request", "block"))
        self.seed, self.scope = study.settings.seed, scope
        self.payload = {"loads": np.empty((0, len(study.shape.layers), study.shape.experts), np.int32)}

    def begin(self, times: Timeline) -> None:
        key = hashed(self.seed, times.request, times.block, times.step)
        self.offer(key, np.arange(times.parts), {"request": times.request, "block": times.block})

    def layer(self, view: LayerView) -> None:
        self.payload["loads"][self.new_places, view.index] = view.loads(self.scope)[self.new_rows]
