"""Consistency metrics of a trace: one figure each, or all of them in one pass with :func:`consistency`.

Every function takes an open trace and the fields of :class:`Settings` as keywords, and returns a tidy polars frame
with the columns and types of ``SCHEMAS[name]``; without anything to measure it is empty, and :func:`consistency` says
why. A null ``layer`` stands for all layers. ``low`` and ``high`` are a percentile bootstrap interval over requests;
``beats_null`` says whether it lies wholly on the consistent side of every null.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from analysis.metrics.analyse import SCHEMAS, consistency
from analysis.metrics.result import ConsistencyResult
from analysis.metrics.seeds import SEEDS_COLUMNS, across
from analysis.metrics.settings import Settings
from analysis.metrics.stream import Trace
from tracer.errors import UserError

__all__ = [
    "SCHEMAS",
    "SEEDS_COLUMNS",
    "ConsistencyResult",
    "Settings",
    "acceptance",
    "across_seeds",
    "agreement",
    "balance",
    "calibration",
    "confidence",
    "consistency",
    "cosine",
    "drift",
    "growth",
    "load",
    "order",
    "overlap",
    "predictability",
    "settling",
    "spatial",
    "survival",
    "unique",
    "working_set",
]


def _one(name: str, trace: Trace, parameters: dict[str, Any]) -> pl.DataFrame:
    return consistency(trace, settings=Settings(**parameters), only=(name,)).frames[name]


def overlap(trace: Trace, **parameters: Any) -> pl.DataFrame:
    """Overlap of the same position's K-set between denoise steps of a block.

    Metrics by layer, state and distance in steps: ``jaccard``; ``kept``, the share of the earlier set's experts that
    are chosen again; ``unchanged``, the share of equal sets. States: ``masked`` in both steps, ``accepted`` in
    between, ``decoded`` (known in both), ``remasked``, and ``all``. n: pairs of rows. Nulls: the layer's K most used
    experts (hot), rows of other blocks (independent), the same position of the request's previous block (shuffle). How
    many tokens a step accepts moves these figures: read them beside :func:`acceptance`.
    """
    return _one("overlap", trace, parameters)


def settling(trace: Trace, **parameters: Any) -> pl.DataFrame:
    """How routing settles after a position is accepted.

    Jaccard of the position's set ``lag`` steps after its acceptance with a reference. Lag 0 is the accepting forward,
    the last that sees a mask; lag 1 the first that sees the token. References: ``previous`` step; ``accepting``, the
    set at lag 0; ``first_known``, that at lag 1; ``final``, the position's last denoise forward of the block.
    """
    return _one("settling", trace, parameters)


def cosine(trace: Trace, **parameters: Any) -> pl.DataFrame:
    """Cosine of the expert count vectors of two denoise steps of a block, by distance. Source: TIDE, arXiv 2605.20179.

    Scopes: ``block``, rows of the current block; ``forward``, all rows of the call, as TIDE counts them. n: pairs of
    steps. Nulls: against the layer's total load (hot), forwards made of independently drawn rows (independent),
    forwards of other blocks (shuffle).
    """
    return _one("cosine", trace, parameters)


def drift(trace: Trace, **parameters: Any) -> pl.DataFrame:
    """How fast the wanted top-B set moves, by budget B and distance. Source: TIDE, arXiv 2605.20179.

    ``drift``: share of a step's wanted set that the wanted set ``distance`` steps before lacks; TIDE's d at distance
    1. ``missed``: share of a step's token-slots outside that earlier set, TIDE's f by steps since a refresh. The
    wanted set: the B experts of largest count, ties to the lowest id, those without a token dropped. Smaller is more
    consistent. ``budgets`` sets the B.
    """
    return _one("drift", trace, parameters)


def survival(trace: Trace, **parameters: Any) -> pl.DataFrame:
    """How long an expert stays, by distance in steps of a block.

    ``survival``: share of a step's active experts that stay active in every one of the next ``distance`` steps;
    ``residency``: the same of the wanted set of ``budget`` experts, as in :func:`drift`. Nulls: independent steps in
    which each expert is as often there as it is; the share of the set on a static list as long as the mean set (hot);
    each request's steps in random order (shuffle).
    """
    return _one("survival", trace, parameters)


def working_set(trace: Trace, **parameters: Any) -> pl.DataFrame:
    """Distinct experts over windows of consecutive denoise forwards of a request, across its blocks.

    Source: Denning, The working set model for program behavior (1968). Nulls: independent forwards with the same
    activity; each request's forwards in random order (shuffle). A static list is its own working set.
    """
    return _one("working_set", trace, parameters)


def spatial(trace: Trace, **parameters: Any) -> pl.DataFrame:
    """Overlap of the K-sets of two positions of a block in one forward, by their distance and state.

    Metrics and nulls as in :func:`overlap`; states: both ``masked``, ``mixed``, both ``decoded``, and ``all``.
    """
    return _one("spatial", trace, parameters)


def growth(trace: Trace, **parameters: Any) -> pl.DataFrame:
    """Distinct experts of the first n block rows of a forward, by position and in a seeded random order.

    Beside them n independent rows of the layer's popularity, sum over e of 1 - (1 - p_e)^n (``null_independent``), and
    of no popularity, E (1 - (1 - K / E)^n) (``null_uniform``). Smaller is more consistent.
    """
    return _one("growth", trace, parameters)


def unique(trace: Trace, **parameters: Any) -> pl.DataFrame:
    """Distinct experts of a denoise forward. Source: dMoE, arXiv 2605.30876 (mean and deviation by layer, mean over
    samples).

    ``unique_mean``, ``unique_sd`` (of the population of forwards), ``unique_cv``, ``unique_sample_mean`` (unweighted
    mean over requests). Scope ``block``: rows of the block, by state; ``forward``: all rows of the call, every branch.
    n: forwards; the row for all layers pools forwards and layers. Null of the means: as many independent rows of the
    layer's popularity.
    """
    return _one("unique", trace, parameters)


def load(trace: Trace, **parameters: Any) -> pl.DataFrame:
    """Load of every expert: token-slots, share of its layer, share times E, rank from 1, share of forwards that use it.

    Rows of the current block, or all rows where the trace has no tokens table.
    """
    return _one("load", trace, parameters)


def balance(trace: Trace, **parameters: Any) -> pl.DataFrame:
    """Skew of each layer's load, and the mean layer.

    ``gini``; ``load_cv``, deviation over mean; ``entropy_experts``, as many evenly used experts would be as mixed;
    ``top_tenth``, the share of the busiest tenth; ``hot_experts``, at twice an even share or more; ``dead_experts``,
    never used. n: token-slots. Uneven resamples make these figures larger, so an interval may lie above its value.
    """
    return _one("balance", trace, parameters)


def predictability(trace: Trace, **parameters: Any) -> pl.DataFrame:
    """How many of a layer's experts the layer before foretells.

    ``recall``: co-occurrence counts of one half of the requests guess the other half's sampled rows, as many experts
    as the row uses. ``layer`` is the layer guessed. Nulls: its most used experts (hot), the guess for a stranger's row
    (shuffle), the experts of a stranger (independent).
    """
    return _one("predictability", trace, parameters)


def agreement(trace: Trace, **parameters: Any) -> pl.DataFrame:
    """Whether expert popularity agrees across requests and across datasets.

    ``cosine`` of loads, Spearman's ``rank_correlation``, ``top_overlap`` of the busiest quarter. ``between`` requests:
    mean over pairs; between datasets: each pair (``first``, ``second``). Null: permuted expert labels, by formula.
    """
    return _one("agreement", trace, parameters)


def across_seeds(recordings: Mapping[str, Trace | ConsistencyResult], **parameters: Any) -> pl.DataFrame:
    """Whether expert popularity agrees across recordings of one model, such as runs with different seeds.

    Metrics as in :func:`agreement`, of every two recordings (``first``, ``second``) and, where both are null, mean over
    pairs. ``between`` whole ``traces``, or each of the ``prompts`` that two recordings share against itself. Nulls:
    permuted expert labels (shuffle), another prompt of the other recording (independent), the popularity over its other
    prompts (hot). A recording is an open trace or what :func:`consistency` made of it.

    Raises
    ------
    UserError
        Fewer than two recordings, a recording that routes nothing in a denoise forward, or different models.
    """
    settings = Settings(**parameters)
    found = {}
    for name, recording in recordings.items():
        if not isinstance(recording, ConsistencyResult):
            recording = consistency(recording, settings=settings, only=("load",))
        if recording.popularity is None:
            raise UserError(f"{name} routes nothing in a denoise forward; leave it out of the comparison.")
        found[name] = recording.popularity
    return across(found, settings)


def acceptance(trace: Trace, **parameters: Any) -> pl.DataFrame:
    """Tokens accepted by a step (by its number, and null for any), accepted by a block, and steps of a block."""
    return _one("acceptance", trace, parameters)


def order(trace: Trace, **parameters: Any) -> pl.DataFrame:
    """Order in which a block's positions are accepted.

    ``rank_correlation``: Spearman's, of position against step, mean over blocks; 1 is left to right, as a model that
    writes one token after the other. ``left_to_right``: share of accepted tokens among the leftmost masked positions,
    as many as the step accepts; null: any order.
    """
    return _one("order", trace, parameters)


def confidence(trace: Trace, **parameters: Any) -> pl.DataFrame:
    """Share of masked rows whose predicted token is not the one finally accepted, by steps before the acceptance.

    Beside it the rows' mean confidence.
    """
    return _one("confidence", trace, parameters)


def calibration(trace: Trace, **parameters: Any) -> pl.DataFrame:
    """Confidence against the share of predictions that are final, by confidence bin.

    ``final_share`` by bin and over all (bin null), ``calibration_error`` (mean over rows of their bin's distance).
    Rows: ``all`` masked rows, or ``waiting``, those their own forward does not accept.
    """
    return _one("calibration", trace, parameters)
