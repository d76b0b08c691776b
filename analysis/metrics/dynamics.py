"""Figures of expert counts over time: cosine, drift of the wanted set, survival of active experts, working sets.

Source: TIDE, arXiv 2605.20179 (cosine of activation counts between steps, the drift d of the wanted top-B set and the
misses f by steps since the refresh); Denning, The working set model for program behavior (1968). G = bootstrap units,
L = layers, D = distances, E = experts.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from analysis.metrics.bootstrap import Axes, Bootstrap, beats, divide, grid_frame, ordered_sum, with_total
from analysis.metrics.load_kernels import UNWANTED, load_pair_sums, member_sums, survival_sums, window_sums
from analysis.metrics.nulls import all_drawn
from analysis.metrics.settings import STANDARD, UNITS, Settings
from analysis.metrics.stream import LayerView, Shape
from analysis.metrics.timeline import Timeline

_TAIL = ("value", "low", "high", "null_hot", "null_independent", "null_shuffle", "n", "beats_null")
COSINE_COLUMNS = {name: STANDARD[name] for name in ("metric", "scope", "layer", "distance", *_TAIL)}
DRIFT_COLUMNS = {
    **{name: STANDARD[name] for name in ("metric", "scope", "layer")},
    "budget": pl.Int32,
    **{name: STANDARD[name] for name in ("distance", *_TAIL)},
}
SURVIVAL_COLUMNS = DRIFT_COLUMNS
WORKING_SET_COLUMNS = {
    **{name: STANDARD[name] for name in ("metric", "scope", "layer")},
    "window": pl.Int32,
    **{
        name: STANDARD[name] for name in ("value", "low", "high", "null_independent", "null_shuffle", "n", "beats_null")
    },
}

NEVER = -(1 << 40)


def default_budgets(experts: int) -> tuple[int, ...]:
    """An eighth, a quarter and a half of the experts."""
    return tuple(sorted({max(1, experts // 8), max(1, experts // 4), max(1, experts // 2)}))


class LoadDynamics:
    """Counts of one scope over the denoise forwards: of the block's rows ("block"), or of all rows of the call
    ("forward").

    TIDE counts all rows the call routes, whichever block they belong to. Windows of the working set run over the
    denoise forwards of a request, across its blocks; ``KEPT`` requests are remembered from segment to segment, least
    recently seen dropped first.
    """

    KEPT = 1024

    def __init__(self, shape: Shape, settings: Settings, scope: str) -> None:
        self.shape, self.settings, self.scope = shape, settings, scope
        self.budgets = np.array(settings.budgets or default_budgets(shape.experts), np.int64)
        self.windows = np.array(settings.windows, np.int64)
        layers, cells = len(shape.layers), UNITS * settings.distances
        self.pairs, self.cosine = np.zeros((layers, cells), np.int64), np.zeros((layers, cells))
        self.drift, self.missed = (np.zeros((layers, cells, len(self.budgets))) for _ in range(2))
        # The last set is that of all active experts.
        sets = (*self.budgets.tolist(), UNWANTED)
        self.sets = sets
        self.risk, self.alive = (np.zeros((layers, len(sets), UNITS, settings.distances), np.int64) for _ in range(2))
        self.windowed, self.distinct = (np.zeros((layers, UNITS, len(self.windows)), np.int64) for _ in range(2))
        self.member = np.zeros((len(sets), UNITS, layers, shape.experts), np.int64)
        self.steps = np.zeros(layers, np.int64)
        self.parts, self.spans = np.zeros(UNITS, np.int64), np.zeros((UNITS, settings.distances), np.int64)
        self.load = np.zeros((layers, shape.experts), np.int64)
        self.memory: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def begin(self, times: Timeline) -> None:
        distances = self.settings.distances
        since = np.arange(times.parts) - np.repeat(times.run_offsets[:-1], np.diff(times.run_offsets))
        # Pairs of every part with those up to D steps before it in its block, nearest first.
        later = np.repeat(np.arange(times.parts), np.minimum(since, distances))
        first = np.cumsum(np.minimum(since, distances)) - np.minimum(since, distances)
        distance = np.arange(len(later)) - first[later] + 1
        self.pair_places = later - distance, later, times.unit[later] * distances + distance - 1
        np.add.at(self.parts, times.unit, 1)
        for t in range(1, distances + 1):
            np.add.at(self.spans[:, t - 1], times.run_unit, np.maximum(np.diff(times.run_offsets) - t, 0))
        requests = list(dict.fromkeys(times.request.tolist()))
        place = {request: number for number, request in enumerate(requests)}
        self.requests = requests
        self.slot = np.array([place[request] for request in times.request.tolist()], np.int64)
        layers, experts = len(self.shape.layers), self.shape.experts
        self.last = np.full((layers, len(requests), experts), NEVER, np.int64)
        self.clock = np.zeros((layers, len(requests)), np.int64)
        for number, request in enumerate(requests):
            if request in self.memory:
                self.last[:, number], self.clock[:, number] = self.memory[request]

    def add(self, view: LayerView) -> None:
        times, layer = view.times, view.index
        loads, ranks = view.loads(self.scope), view.ranks(self.scope)
        sums = self.pairs[layer], self.cosine[layer], self.drift[layer], self.missed[layer]
        load_pair_sums(loads, ranks, *self.pair_places, self.budgets, *sums)
        for number, budget in enumerate(self.sets):
            risk, alive = self.risk[layer, number], self.alive[layer, number]
            survival_sums(ranks, budget, times.run_offsets, times.run_unit, risk, alive)
            member_sums(ranks, budget, times.unit, self.member[number, :, layer])
        state = self.slot, self.last[layer], self.clock[layer]
        window_sums(loads, times.unit, *state, self.windows, self.windowed[layer], self.distinct[layer])
        self.load[layer] += loads.sum(axis=0)
        self.steps[layer] += np.count_nonzero(loads.any(axis=1))

    def end(self) -> None:
        for number, request in enumerate(self.requests):
            self.memory.pop(request, None)
            self.memory[request] = self.last[:, number].copy(), self.clock[:, number].copy()
        while len(self.memory) > self.KEPT:
            del self.memory[next(iter(self.memory))]

    def _by_unit(self, array: np.ndarray, units: int) -> np.ndarray:
        """Sums [L, G * D, ...] as [G, L + 1, D, ...]."""
        shaped = array.reshape(len(array), UNITS, self.settings.distances, *array.shape[2:])[:, :units]
        return with_total(np.moveaxis(shaped, 0, 1), 1)

    def _share(self, number: int) -> np.ndarray:
        """Share of the steps with load in which each expert belongs to a set, float64 [L, E]."""
        return np.nan_to_num(divide(ordered_sum(self.member[number], 0), self.steps[:, None]))

    def _shuffled_survival(self, number: int, units: int) -> np.ndarray:
        """Survival in a set with the steps of each unit in random order, float64 [L + 1, D]."""
        member, steps = self.member[number, :units], self.parts[:units, None, None]
        drawn = [ordered_sum(chance, 2) for chance in all_drawn(member, steps, self.settings.distances + 1)]
        out = []
        for t, alive in enumerate(drawn[1:]):
            weight = self.spans[:units, t, None].astype(np.float64)
            out.append(divide(*(with_total(ordered_sum(weight * part, 0), 0) for part in (alive, drawn[0]))))
        return np.stack(out, axis=1)

    def _shuffled_windows(self, units: int) -> np.ndarray:
        """Distinct experts of windows with the forwards of each unit in random order, float64 [L + 1, W]."""
        steps = self.parts[:units, None, None]
        windows = self.windows.tolist()
        missed = all_drawn(steps - self.member[-1, :units], steps, max(windows))
        sums = {w: ordered_sum(1 - chance, 2) for w, chance in enumerate(missed, 1) if w in windows}
        out = []
        for place, w in enumerate(windows):
            counted = self.windowed[:, :units, place].T
            out.append(divide(*(with_total(ordered_sum(part, 0), 0) for part in (counted * sums[w], counted))))
        return np.stack(out, axis=1)

    def cosine_frame(self, bootstrap: Bootstrap, nulls: dict[str, dict[str, np.ndarray]]) -> pl.DataFrame:
        """Cosine of the count vectors of two denoise forwards of a block, by distance in steps."""
        pairs, cosine = (self._by_unit(array, bootstrap.units) for array in (self.pairs, self.cosine))
        value, low, high = bootstrap.ratio(cosine, pairs)
        columns = {"value": value, "low": low, "high": high, "n": ordered_sum(pairs, 0)}
        columns |= {f"null_{name}": table["cosine"][:, None] for name, table in nulls.items()}
        axes: Axes = {"metric": ["cosine"], "scope": [self.scope], "layer": self.shape.labels}
        frame = grid_frame({**axes, "distance": range(1, self.settings.distances + 1)}, columns)
        return _complete(beats(frame), COSINE_COLUMNS)

    def drift_frame(self, bootstrap: Bootstrap, nulls: dict[str, dict[str, np.ndarray]]) -> pl.DataFrame:
        """``drift``: share of the wanted top-B set that the wanted set ``distance`` steps before does not hold (at
        distance 1, TIDE's d). ``missed``: share of a step's token-slots outside that earlier set, so what a set
        refreshed ``distance`` steps ago misses (TIDE's f).

        The wanted set: the B experts of largest count, ties to the lowest id, those without a token dropped.
        """
        pairs = self._by_unit(self.pairs, bootstrap.units)[..., None]
        axes: Axes = {
            "layer": self.shape.labels,
            "distance": range(1, self.settings.distances + 1),
            "budget": self.budgets.tolist(),
        }
        frames = []
        for metric, array in (("drift", self.drift), ("missed", self.missed)):
            value, low, high = bootstrap.ratio(self._by_unit(array, bootstrap.units), pairs)
            columns = {"value": value, "low": low, "high": high, "n": ordered_sum(pairs, 0)}
            columns |= {f"null_{name}": table[metric][:, None, :] for name, table in nulls.items()}
            named = {"metric": [metric], "scope": [self.scope], **axes}
            frames.append(grid_frame(named, columns, {"budget": pl.Int32}))
        return _complete(beats(pl.concat(frames), smaller=("drift", "missed")), DRIFT_COLUMNS)

    def survival_frame(self, bootstrap: Bootstrap) -> pl.DataFrame:
        """``survival``: share of the experts active at a step that stay active in every one of the next ``distance`` steps
        of the block. ``residency``: the same of the wanted top-B set, see :meth:`drift_frame`.

        null_independent: steps independent of each other, each expert as often in the set as it is, sum q^(t+1) / sum
        q. null_hot: the share of the set that is on a static list as long as the mean set. null_shuffle: each request's
        steps in random order.
        """
        units, distances = bootstrap.units, range(1, self.settings.distances + 1)
        frames = []
        for number in (len(self.sets) - 1, *range(len(self.sets) - 1)):
            risk, alive = (np.moveaxis(array[:, number, :units], 0, 1) for array in (self.risk, self.alive))
            risk, alive = with_total(risk, 1), with_total(alive, 1)
            value, low, high = bootstrap.ratio(alive, risk)
            share = self._share(number)
            whole = with_total(ordered_sum(share, 1), 0)
            expected = np.stack([with_total(ordered_sum(share ** (t + 1), 1), 0) for t in distances], axis=1)
            listed = [ordered_sum(np.sort(row)[::-1][: round(float(ordered_sum(row, 0)))], 0) for row in share]
            columns = {"value": value, "low": low, "high": high, "n": ordered_sum(risk, 0)}
            columns["null_independent"] = divide(expected, whole[:, None])
            columns["null_hot"] = divide(with_total(np.array(listed, np.float64), 0), whole)[:, None]
            columns["null_shuffle"] = self._shuffled_survival(number, units)
            active = self.sets[number] == UNWANTED
            axes: Axes = {
                "metric": ["survival" if active else "residency"],
                "scope": [self.scope],
                "budget": [None if active else self.sets[number]],
                "layer": self.shape.labels,
                "distance": distances,
            }
            frames.append(grid_frame(axes, columns, {"budget": pl.Int32}))
        return _complete(beats(pl.concat(frames)), SURVIVAL_COLUMNS)

    def working_set_frame(self, bootstrap: Bootstrap) -> pl.DataFrame:
        """W(w): distinct experts a layer over windows of w consecutive denoise forwards of a request; all layers: the
        mean layer.

        null_independent: forwards independent of each other, each expert as often active as it is, sum of 1 - (1 -
        q)^w. null_shuffle: each request's forwards in random order. (A static list is its own working set.)
        """
        counted, distinct = (np.moveaxis(array[:, : bootstrap.units], 0, 1) for array in (self.windowed, self.distinct))
        counted, distinct = with_total(counted, 1), with_total(distinct, 1)
        value, low, high = bootstrap.ratio(distinct, counted)
        share = self._share(len(self.sets) - 1)
        expected = np.stack([ordered_sum(1 - (1 - share) ** w, 1) for w in self.windows], axis=1)
        mean = ordered_sum(expected, 0) / max(1, len(expected))
        columns = {"value": value, "low": low, "high": high, "n": ordered_sum(counted, 0)}
        columns["null_independent"] = np.concatenate([expected, mean[None]])
        columns["null_shuffle"] = self._shuffled_windows(bootstrap.units)
        axes: Axes = {"metric": ["working_set"], "scope": [self.scope], "layer": self.shape.labels}
        frame = grid_frame({**axes, "window": self.windows.tolist()}, columns, {"window": pl.Int32})
        return _complete(beats(frame, smaller=("working_set",)), WORKING_SET_COLUMNS)


def _complete(frame: pl.DataFrame, columns: dict) -> pl.DataFrame:
    """The frame with exactly ``columns``, null where a null does not apply."""
    missing = [pl.lit(None, kind).alias(name) for name, kind in columns.items() if name not in frame.columns]
    return frame.with_columns(missing).select(list(columns))
