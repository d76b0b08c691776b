"""How the experts' counts change from step to step: their cosine, and the drift of the most wanted experts.

Source: TIDE, arXiv 2605.20179 (cosine of activation counts between steps, the drift d of the wanted top-B set and the
misses f by steps since the refresh). G = bootstrap units, L = layers, D = distances.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from analysis.curves import Beside, Series, against
from analysis.metrics.kernels.loads import block_loads, load_pair_sums, load_ranks
from analysis.metrics.shared.bootstrap import Bootstrap
from analysis.metrics.shared.frames import divide, with_total
from analysis.metrics.shared.metric import LayerColumn, Metric, Row
from analysis.metrics.shared.result import ConsistencyResult
from analysis.metrics.shared.samples import ForwardSample, RowSample
from analysis.metrics.shared.settings import NULLS, UNITS, VALUE, VERDICT, columns
from analysis.metrics.shared.study import Study, Watcher
from analysis.metrics.shared.timeline import Timeline
from analysis.metrics.shared.view import LayerView

DRAWN = 64
"""Pairs of forwards made of independently drawn rows."""
WORDS = {
    "hot": "the layer's total load",
    "independent": "forwards of independent rows",
    "shuffle": "forwards of other blocks",
}
REASON = "No block has two denoise forwards with routed rows."
FIGURE = "expert counts, next step: cosine"
BLOCK = {"scope": "block", "distance": 1}


class Sums:
    """Comparisons of forwards: ``pairs`` and ``cosine`` [L, cells], ``drift`` and ``missed`` [L, cells, budgets]."""

    def __init__(self, layers: int, cells: int, budgets: np.ndarray) -> None:
        self.budgets = budgets
        self.pairs, self.cosine = np.zeros((layers, cells), np.int64), np.zeros((layers, cells))
        self.drift, self.missed = (np.zeros((layers, cells, len(budgets))) for _ in range(2))

    def add(self, layer: int, loads: np.ndarray, ranks: np.ndarray, places: tuple[np.ndarray, ...]) -> None:
        """Compare forwards of a layer; ``places``: of the earlier one, of the later one, and the cell to add to."""
        sums = self.pairs[layer], self.cosine[layer], self.drift[layer], self.missed[layer]
        load_pair_sums(loads, ranks, *places, self.budgets, *sums)


class Comparisons(Watcher):
    """Counts of one scope, compared over the denoise forwards of each block, at most D steps apart.

    TIDE counts all rows the call routes, whichever block they belong to.
    """

    def __init__(self, study: Study, scope: str) -> None:
        self.study, self.scope, self.shape, self.settings = study, scope, study.shape, study.settings
        layers = len(study.shape.layers)
        self.sums = Sums(layers, UNITS * study.settings.distances, np.array(study.budgets, np.int64))
        self.load = np.zeros((layers, study.shape.experts), np.int64)
        self.sample = study.watch(ForwardSample, scope)
        self.rows = study.watch(RowSample) if study.has_blocks else None

    def begin(self, times: Timeline) -> None:
        distances = self.settings.distances
        since = np.arange(times.parts) - np.repeat(times.run_offsets[:-1], np.diff(times.run_offsets))
        # Pairs of every part with those up to D steps before it in its block, nearest first.
        before = np.minimum(since, distances)
        later = np.repeat(np.arange(times.parts), before)
        first = np.cumsum(before) - before
        distance = np.arange(len(later)) - first[later] + 1
        self.places = later - distance, later, times.unit[later] * distances + distance - 1

    def layer(self, view: LayerView) -> None:
        loads = view.loads(self.scope)
        self.sums.add(view.index, loads, view.ranks(self.scope), self.places)
        self.load[view.index] += loads.sum(axis=0)

    def by_unit(self, name: str) -> np.ndarray:
        """Sums of a name as [G, L + 1, D, ...]."""
        array = getattr(self.sums, name)
        shaped = array.reshape(len(array), UNITS, self.settings.distances, *array.shape[2:])
        return with_total(np.moveaxis(shaped, 0, 1), 1)

    @cached_property
    def nulls(self) -> dict[str, dict[str, np.ndarray]]:
        """``null_*`` columns of each metric: cosine [L + 1], drift and missed [L + 1, budgets].

        hot: sampled forwards after the layer's total load. shuffle: pairs of sampled forwards of different blocks or
        requests. independent: pairs of made up forwards, each of as many independently drawn rows as a forward has;
        rows are sampled from blocks, so there are none where forwards hold other rows too.
        """
        rng = np.random.default_rng(self.settings.seed)
        members = np.arange(len(self.sample))
        left, right = self.sample.pairs(members, members, self.settings.pairs, rng)
        totals, rows = self.study.totals, self.rows
        if rows is not None and (not len(rows) or totals.rows[self.scope] != totals.rows["block"]):
            rows = None
        drawn = None if rows is None else rng.integers(0, len(rows), (2 * DRAWN, totals.mean_rows(self.scope)))
        made = np.arange(0 if rows is None else DRAWN) + len(members) + 1
        earlier = [np.full(len(members), len(members)), left, made]
        later = [members, right, made + DRAWN]
        cell = np.repeat(np.arange(3), [len(part) for part in earlier])
        sums = Sums(len(self.load), 3, self.sums.budgets)
        for layer, load in enumerate(self.load):
            loads = [self.sample.payload["loads"][:, layer].astype(np.int64), load[None]]
            if rows is not None:
                loads.append(block_loads(*rows.rows(layer), drawn, self.shape.experts))
            stacked = np.concatenate(loads)
            sums.add(layer, stacked, load_ranks(stacked), (np.concatenate(earlier), np.concatenate(later), cell))
        total = with_total(sums.pairs, 0)
        tables = {"cosine": divide(with_total(sums.cosine, 0), total)}
        tables |= {n: divide(with_total(getattr(sums, n), 0), total[..., None]) for n in ("drift", "missed")}
        # Without made up forwards nothing is counted for them, and their columns are null.
        names = ("null_hot", "null_shuffle", "null_independent")
        return {n: {null: table[:, place] for place, null in enumerate(names)} for n, table in tables.items()}


class _Compared(Metric):
    """A metric of :class:`Comparisons`."""

    by_scope = True
    reason = REASON
    nulls = WORDS

    def __init__(self, study: Study, scope: str) -> None:
        super().__init__(study, scope)
        self.compared = study.watch(Comparisons, scope)
        self.axes: dict[str, Any] = {
            "scope": [scope],
            "layer": self.shape.labels,
            "distance": range(1, self.settings.distances + 1),
        }


class Cosine(_Compared):
    """Cosine of the expert count vectors of two denoise steps of a block, by distance. Source: TIDE, arXiv 2605.20179.

    Scopes: ``block``, rows of the current block; ``forward``, all rows of the call, as TIDE counts them. n: pairs of
    steps. Nulls: against the layer's total load (hot), forwards made of independently drawn rows (independent),
    forwards of other blocks (shuffle).
    """

    name, place = "cosine", 30
    columns = columns("metric", "scope", "layer", "distance", *VALUE, *NULLS, *VERDICT)
    headline = {FIGURE: {"distance": 1}}
    by_layer = (
        LayerColumn("next step: cosine", "three", "of the block's expert counts", BLOCK),
        LayerColumn("null", "three", "the null hardest to beat", BLOCK, "null"),
    )
    charts = (
        Beside(
            title="Expert counts from step to step",
            subtitle="Cosine of the tokens each expert gets in two denoise forwards of a block; 1 = the same shares.",
            at="distance",
            x="distance, denoise steps",
            noun="distance",
            y="cosine of expert counts",
            nulls=WORDS,
        ),
    )

    def frame(self, bootstrap: Bootstrap) -> pl.DataFrame:
        """By layer and distance."""
        values = bootstrap.columns(self.compared.by_unit("cosine"), self.compared.by_unit("pairs"))
        values |= {null: table[:, None] for null, table in self.compared.nulls["cosine"].items()}
        return self.tidy(({"metric": ["cosine"], **self.axes}, values))

    @staticmethod
    def findings(result: ConsistencyResult, rows: Mapping[str, Row]) -> list[str]:
        """How alike consecutive steps count their experts."""
        if FIGURE not in rows:
            return []
        row = rows[FIGURE]
        return [f"Expert counts of consecutive steps have a cosine of {row['value']:.3f}{against(row, 3)}."]


class Drift(_Compared):
    """How fast the wanted top-B set moves, by budget B and distance. Source: TIDE, arXiv 2605.20179.

    ``drift``: share of a step's wanted set that the wanted set ``distance`` steps before lacks; TIDE's d at distance
    1. ``missed``: share of a step's token-slots outside that earlier set, TIDE's f by steps since a refresh. The
    wanted set: the B experts of largest count, ties to the lowest id, those without a token dropped. Smaller is more
    consistent. ``budgets`` sets the B.
    """

    name, place = "drift", 40
    columns = columns("metric", "scope", "layer", "budget", "distance", *VALUE, *NULLS, *VERDICT)
    smaller = ("drift", "missed")
    headline = {"wanted set, share that changes a step": {"metric": "drift", "distance": 1, "budget": "middle"}}
    charts = (
        Series(
            title="Drift of the wanted set",
            subtitle="Of the experts with most tokens, the share that was not among them some steps before; less is alike.",
            where={"metric": "drift"},
            at="distance",
            x="distance, denoise steps",
            noun="distance",
            y="share of the set that is new",
            percent=True,
            series="budget",
            word="the {} most wanted",
            legend="experts of a layer",
            smaller=True,
        ),
    )

    def frame(self, bootstrap: Bootstrap) -> pl.DataFrame:
        """Both by layer, distance and budget."""
        axes = {**self.axes, "budget": self.compared.sums.budgets.tolist()}
        grids = []
        for metric in self.smaller:
            values = bootstrap.columns(self.compared.by_unit(metric), self.compared.by_unit("pairs")[..., None])
            values |= {null: table[:, None, :] for null, table in self.compared.nulls[metric].items()}
            grids.append(({"metric": [metric], **axes}, values))
        return self.tidy(*grids)
