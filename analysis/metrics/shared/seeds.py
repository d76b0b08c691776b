"""Whether expert popularity agrees across recordings of one model, such as runs with different seeds.

N = recordings, P = pairs of them, G = bootstrap units of a recording, L = layers, E = experts, R = prompts two share.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from itertools import combinations

import numpy as np
import polars as pl

from analysis.metrics.shared.agreement import DRAWS, MEASURES, PAIR, compared, measures, resampled
from analysis.metrics.shared.bootstrap import Bootstrap
from analysis.metrics.shared.frames import divide, mean, ordered_sum, tidy, with_mean
from analysis.metrics.shared.result import Popularity
from analysis.metrics.shared.settings import NULLS, UNITS, VALUE, VERDICT, Settings, columns
from analysis.metrics.shared.study import Study
from tracer.errors import UserError

SEEDS_COLUMNS = columns("metric", *PAIR, "layer", *VALUE, *NULLS, *VERDICT)
LEVELS = ("traces", "prompts")
"""Whole recordings against each other, and each prompt against itself in the other recording."""


def popularity_of(study: Study, load: np.ndarray) -> Popularity:
    """What a recording says of its experts' popularity. ``load`` int64 [G, L, E].

    A prompt is known by its number, dataset, length and, where it was kept, text.
    """
    requests = study.trace.requests
    names = [name for name in ("dataset", "prompt_tokens", "prompt") if name in requests.columns]
    known = {int(row[0]): row for row in requests.select("request_id", *names).iter_rows()}
    prompts: tuple[Hashable, ...] = tuple(known.get(request) for request in study.units.number)
    counted = load[: study.units.count].copy()
    return Popularity(study.trace.meta.model.id, study.shape.layers, study.scopes[0], prompts, counted)


def across(recordings: Mapping[str, Popularity], settings: Settings) -> pl.DataFrame:
    """Agreement of every two recordings, by layer, and (``first`` null) the mean over pairs.

    ``between`` traces: their loads over all prompts. Null: expert labels permuted, by formula. ``between`` prompts: the
    mean over the prompts both hold, each against itself. Nulls: permuted labels (shuffle); another prompt of the other
    recording (independent); the other recording's popularity over all its other prompts (hot). Prompts are matched
    while each is a bootstrap unit of its own. Recordings of the same prompts are resampled together. n: pairs of
    recordings, or prompts.

    Raises
    ------
    UserError
        Fewer than two recordings, or their layers or experts differ.
    """
    names, held = list(recordings), list(recordings.values())
    if len(held) < 2:
        raise UserError("Popularity is compared between recordings; give at least two traces of one model.")
    for name, one in recordings.items():
        if (one.layers, one.load.shape[2], one.scope) != (held[0].layers, held[0].load.shape[2], held[0].scope):
            raise UserError(
                f"{name} and {names[0]} differ in MoE layers, experts or rows counted; give traces of one model."
            )
    pairs = list(combinations(range(len(names)), 2))
    size = max(1, held[0].load.shape[2] // 4)
    made = {"traces": _whole(held, pairs, size, settings), "prompts": _matched(held, pairs, size, settings)}
    grids = []
    for level in LEVELS:
        ends = [*((level, names[a], names[b]) for a, b in pairs), (level, None, None)]
        grids.append(({"metric": MEASURES, PAIR: ends, "layer": [*held[0].layers, None]}, made[level]))
    return tidy(SEEDS_COLUMNS, grids)


def _means(array: np.ndarray) -> np.ndarray:
    """[.., P, L] with the mean of the layers and then that of the pairs at the end, leaving out NaN."""
    by_layer = with_mean(array)
    return np.swapaxes(with_mean(np.swapaxes(by_layer, -1, -2)), -1, -2)


def _whole(
    held: list[Popularity], pairs: list[tuple[int, int]], size: int, settings: Settings
) -> dict[str, np.ndarray]:
    """Columns [3, P + 1, L + 1] between whole recordings."""
    total = np.stack([ordered_sum(one.load, 0) for one in held])
    value, null = (_means(array) for array in compared(total, pairs, size))
    known = np.isfinite(value[:, :-1]).astype(np.int64)
    values = {"value": value, "null_shuffle": null, "n": np.concatenate([known, known.sum(axis=1)[:, None]], axis=1)}
    if min(len(one.load) for one in held) > 1:
        sides = [(_weights(held, place, settings), one.load) for place, one in enumerate(held)]
        values |= _interval(_means(resampled(sides, pairs, size)), settings)
    return values


def _weights(held: list[Popularity], place: int, settings: Settings) -> np.ndarray:
    """Weights [B, G] of a recording's prompts: those of the first recording that holds the same."""
    mine = held[place].prompts
    alike = [p for p in range(place) if held[p].prompts == mine and None not in mine]
    seed = settings.seed + min([place, *alike])
    return Bootstrap(len(held[place].load), min(settings.replicates, DRAWS), settings.level, seed).weights


def _matched(
    held: list[Popularity], pairs: list[tuple[int, int]], size: int, settings: Settings
) -> dict[str, np.ndarray]:
    """Columns [3, P + 1, L + 1] between the prompts that two recordings share."""
    shape = (len(MEASURES), len(pairs), len(held[0].layers))
    figures = {name: np.full(shape, np.nan) for name in ("value", "null_hot", "null_independent", "null_shuffle")}
    counts = np.zeros(shape, np.int64)
    draws = min(settings.replicates, DRAWS)
    replicates = np.full((draws, *shape), np.nan)
    for place, (a, b) in enumerate(pairs):
        left, right = _shared(held[a], held[b])
        weights = Bootstrap(len(left), draws, settings.level, settings.seed).weights
        for layer in range(len(held[0].layers) if len(left) else 0):
            one, other = held[a].load[left, layer], held[b].load[right, layer]
            alike, permuted = _paired(one, other, size)
            same = np.eye(len(left), dtype=bool)
            known = ~np.isnan(alike)
            counts[:, place, layer] = (known & same).sum(axis=(1, 2))
            own, labels = alike[:, same], permuted[:, same]
            figures["value"][:, place, layer] = mean(own)
            figures["null_shuffle"][:, place, layer] = mean(labels)
            figures["null_independent"][:, place, layer] = mean(alike[:, ~same])
            rest = [
                _paired(x, ordered_sum(recording.load[:, layer], 0) - y, size)[0][:, same]
                for x, y, recording in ((one, other, held[b]), (other, one, held[a]))
            ]
            figures["null_hot"][:, place, layer] = mean(np.concatenate(rest, axis=1))
            if len(weights):
                top = np.where(np.isnan(own), 0, own) @ weights.T
                replicates[:, :, place, layer] = divide(top, known[:, same].astype(np.float64) @ weights.T).T
    values = {name: _means(array) for name, array in figures.items()}
    summed = counts.max(axis=2, initial=0)
    by_pair = np.concatenate([counts, summed[:, :, None]], axis=2)
    values["n"] = np.concatenate([by_pair, by_pair.max(axis=1, initial=0)[:, None]], axis=1)
    return values | _interval(_means(replicates), settings)


def _shared(one: Popularity, other: Popularity) -> tuple[np.ndarray, np.ndarray]:
    """Units of the prompts both hold, int64 [R] twice."""
    if max(len(one.prompts), len(other.prompts)) > UNITS:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    place = {prompt: unit for unit, prompt in enumerate(other.prompts) if prompt is not None}
    found = [(unit, place[prompt]) for unit, prompt in enumerate(one.prompts) if prompt in place]
    pairs = np.array(found, np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _paired(one: np.ndarray, other: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Agreement of loads [R, E] with loads [R, E], each with each, and with permuted labels: two [3, R, R]."""
    value, permuted = measures(np.concatenate([one, other]), size)
    return value[:, : len(one), len(one) :], permuted[:, : len(one), len(one) :]


def _interval(replicates: np.ndarray, settings: Settings) -> dict[str, np.ndarray]:
    """Ends of the percentile interval of replicates [B, ...], NaN where every replicate is."""
    ends = Bootstrap(0, 0, settings.level, 0).interval(replicates)
    return dict(zip(("low", "high"), ends, strict=True))
