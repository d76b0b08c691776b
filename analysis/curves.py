"""From the frames of a consistency analysis to the small frames its charts draw, and to words. Nothing here draws.

A curve has the columns ``series``, ``at`` (where on the x axis), ``value``, ``low``, ``high`` (interval), ``null`` (the one
hardest to beat), ``null_name``, ``n``, ``beats_null``; where there is one series only, every null is a line of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

NULLS = ("null_hot", "null_independent", "null_shuffle", "null_uniform")

WORDS: dict[str, dict[str, str]] = {
    "rows": {
        "hot": "the layer's most used experts",
        "independent": "rows of other blocks",
        "shuffle": "the same position of the block before",
    },
    "counts": {
        "hot": "the layer's total load",
        "independent": "forwards of independent rows",
        "shuffle": "forwards of other blocks",
    },
    "activity": {
        "hot": "a static list of experts",
        "independent": "independent steps",
        "shuffle": "the request's steps in random order",
    },
    "draws": {"independent": "independent rows, same popularity", "uniform": "independent rows, even popularity"},
    "guesses": {
        "hot": "the layer's most used experts",
        "independent": "a stranger's experts",
        "shuffle": "the guess for a stranger",
    },
    "labels": {
        "hot": "the popularity over other prompts",
        "independent": "another prompt",
        "shuffle": "shuffled expert labels",
    },
    "order": {"independent": "any order"},
}
FAMILIES = {
    "overlap": "rows",
    "settling": "rows",
    "spatial": "rows",
    "cosine": "counts",
    "drift": "counts",
    "survival": "activity",
    "working_set": "activity",
    "unique": "draws",
    "growth": "draws",
    "predictability": "guesses",
    "agreement": "labels",
    "seeds": "labels",
    "order": "order",
}

STATES = {
    "all": "all rows",
    "masked": "still masked",
    "accepted": "accepted in between",
    "decoded": "known before and after",
    "remasked": "masked again",
}
PAIRS = {"all": "all pairs", "masked": "both masked", "mixed": "one masked", "decoded": "both known"}
REFERENCES = {
    "previous": "the step before",
    "accepting": "the accepting step",
    "first_known": "the first step that sees the token",
    "final": "the last step of the block",
}
SEEDS = {"traces": "whole recordings", "prompts": "the same prompt"}
MEASURED = "measured"
ORDERS = {"position": "by position", "random": "in random order"}


def null_words(frame: str, null: str) -> str:
    """What a null of a frame is, in words."""
    return WORDS[FAMILIES[frame]][null]


def hardest(frame: pl.DataFrame, smaller: bool = False) -> pl.DataFrame:
    """The frame with ``null`` and ``null_name`` of the null hardest to beat, both null where there is none."""
    names = [name for name in NULLS if name in frame.columns]
    pick = pl.min_horizontal(names) if smaller else pl.max_horizontal(names)
    frame = frame.with_columns(pick.alias("null"))
    first = [pl.when(pl.col(n) == pl.col("null")).then(pl.lit(n.removeprefix("null_"), dtype=pl.String)) for n in names]
    return frame.with_columns(pl.coalesce(first).alias("null_name"))


def _curve(frame: pl.DataFrame, at: str, series: str, words: Mapping[str, str], smaller: bool = False) -> pl.DataFrame:
    order = {name: number for number, name in enumerate(words)}
    kept = frame.filter(pl.col(series).is_in(list(words)))
    kept = kept.sort(pl.col(series).replace_strict(order, return_dtype=pl.Int64), at, maintain_order=True)
    return hardest(kept, smaller).select(
        pl.col(series).replace_strict(dict(words), return_dtype=pl.String).alias("series"),
        pl.col(at).alias("at"),
        *("value", "low", "high", "null", "null_name", "n", "beats_null"),
    )


def _whole(frame: pl.DataFrame, **wanted: str) -> pl.DataFrame:
    """The rows for all layers together with the wanted values."""
    for column, value in wanted.items():
        frame = frame.filter(pl.col(column) == value)
    return frame.filter(pl.col("layer").is_null())


def overlap_by_distance(overlap: pl.DataFrame) -> pl.DataFrame:
    """Curve of the Jaccard of one position's K-sets by steps apart, a series a token state."""
    return _curve(_whole(overlap, metric="jaccard"), "distance", "state", STATES)


def overlap_by_layer(overlap: pl.DataFrame) -> pl.DataFrame:
    """Curve of the Jaccard from one step to the next by layer, a series a token state."""
    wanted = (pl.col("metric") == "jaccard") & (pl.col("distance") == 1) & pl.col("layer").is_not_null()
    return _curve(overlap.filter(wanted), "layer", "state", STATES)


def settling(settled: pl.DataFrame) -> pl.DataFrame:
    """Curve of the Jaccard by steps since the acceptance, a series a reference."""
    return _curve(_whole(settled), "lag", "reference", REFERENCES)


def spatial(frame: pl.DataFrame) -> pl.DataFrame:
    """Curve of the Jaccard of two positions of a forward by positions apart, a series a pair of token states."""
    return _curve(_whole(frame, metric="jaccard"), "distance", "state", PAIRS)


def _narrowest(frame: pl.DataFrame) -> pl.DataFrame:
    """The rows for all layers together, of the rows of a block where they are known, else of the whole forward."""
    return _whole(frame, scope="block" if "block" in frame["scope"].to_list() else "forward")


def cosine(frame: pl.DataFrame) -> pl.DataFrame:
    """Cosine of expert counts by steps apart: lines as in :func:`beside`."""
    return beside(_narrowest(frame), "cosine", "distance", {MEASURED: pl.lit(True)})


def drift(frame: pl.DataFrame) -> pl.DataFrame:
    """Curve of the share of the wanted set that an earlier one lacks, by steps apart, a series a size of the set."""
    return _by_budget(_narrowest(frame).filter(pl.col("metric") == "drift"), smaller=True)


def _by_budget(frame: pl.DataFrame, smaller: bool) -> pl.DataFrame:
    words = {str(budget): f"the {budget} most wanted" for budget in sorted(frame["budget"].unique().to_list())}
    return _curve(frame.with_columns(pl.col("budget").cast(pl.String)), "distance", "budget", words, smaller)


def survival(frame: pl.DataFrame) -> pl.DataFrame:
    """Share of active experts that stay active, by steps: lines as in :func:`beside`."""
    active = _narrowest(frame).filter(pl.col("metric") == "survival")
    return beside(active, "survival", "distance", {MEASURED: pl.lit(True)})


def residency(frame: pl.DataFrame) -> pl.DataFrame:
    """Curve of the share of a wanted set that stays wanted, by steps, a series a size of the set."""
    return _by_budget(_narrowest(frame).filter(pl.col("metric") == "residency"), smaller=False)


def working_set(frame: pl.DataFrame) -> pl.DataFrame:
    """Distinct experts of a window of forwards, by its length: lines as in :func:`beside`."""
    return beside(_from_two(_narrowest(frame), "window"), "working_set", "window", {MEASURED: pl.lit(True)})


def seeds(frame: pl.DataFrame) -> pl.DataFrame:
    """Cosine of expert popularity across recordings by layer, mean over their pairs: lines as in :func:`beside`."""
    pooled = frame.filter((pl.col("metric") == "cosine") & pl.col("first").is_null()).drop_nulls("layer")
    # Prompts first: their nulls are the harder ones, and one line a null is drawn.
    pooled = pooled.sort(pl.col("between") == "traces", "layer", maintain_order=True)
    return beside(pooled, "seeds", "layer", {word: pl.col("between") == name for name, word in SEEDS.items()})


def predictability(frame: pl.DataFrame) -> pl.DataFrame:
    """Share of a layer's experts that the layer before foretells, by layer: lines as in :func:`beside`."""
    return beside(frame.drop_nulls("layer"), "predictability", "layer", {MEASURED: pl.lit(True)})


def growth(frame: pl.DataFrame) -> pl.DataFrame:
    """Distinct experts of the first rows of a forward, by rows: lines as in :func:`beside`."""
    lines = {ORDERS[name]: pl.col("order") == name for name in ORDERS}
    return beside(_from_two(_whole(frame), "rows"), "growth", "rows", lines)


def _from_two(frame: pl.DataFrame, at: str) -> pl.DataFrame:
    """The frame without a verdict where one thing is counted, as that is what every null has by definition."""
    return frame.with_columns(pl.when(pl.col(at) > 1).then(pl.col("beats_null")))


def beside(frame: pl.DataFrame, name: str, at: str, measured: Mapping[str, pl.Expr]) -> pl.DataFrame:
    """Measured lines and every null as a line.

    Columns: ``line``, ``is_null``, ``at``, ``value``, ``low``, ``high``, ``n``, ``beats_null``.
    """
    nothing = pl.lit(None, pl.Float64)
    lines = [
        frame.filter(wanted).select(
            pl.lit(words).alias("line"),
            pl.lit(False).alias("is_null"),
            pl.col(at).alias("at"),
            "value",
            "low",
            "high",
            "n",
            "beats_null",
        )
        for words, wanted in measured.items()
    ]
    once = frame.unique(at, keep="first", maintain_order=True)
    for null in (null for null in NULLS if null in frame.columns):
        lines.append(
            once.drop_nulls(null).select(
                pl.lit(f"{null_words(name, null.removeprefix('null_'))} (null)").alias("line"),
                pl.lit(True).alias("is_null"),
                pl.col(at).alias("at"),
                pl.col(null).alias("value"),
                nothing.alias("low"),
                nothing.alias("high"),
                pl.lit(None, pl.Int64).alias("n"),
                pl.lit(None, pl.Boolean).alias("beats_null"),
            )
        )
    return pl.concat([line.sort("at") for line in lines if line.height])


def confidence(frame: pl.DataFrame) -> pl.DataFrame:
    """Share of predictions that change yet and mean confidence, by steps before the acceptance: lines as in :func:`beside`."""
    changed = frame.filter(pl.col("metric") == "changed").sort("steps_before")
    at, no = pl.col("steps_before").alias("at"), pl.lit(False).alias("is_null")
    nothing = pl.lit(None, pl.Float64)
    told = pl.lit("predictions that are not final").alias("line"), no, at, "value", "low", "high", "n"
    sure = pl.lit("mean confidence").alias("line"), no, at, pl.col("confidence").alias("value")
    return pl.concat([changed.select(told), changed.select(*sure, nothing.alias("low"), nothing.alias("high"), "n")])


def acceptance(frame: pl.DataFrame) -> pl.DataFrame:
    """Tokens a denoise step accepts, by step: ``step``, ``value``, ``low``, ``high``, ``n`` (blocks that take the step)."""
    steps = frame.filter(pl.col("metric") == "accepted_per_step").drop_nulls("step").sort("step")
    return steps.select("step", "value", "low", "high", "n")


def calibration(frame: pl.DataFrame) -> pl.DataFrame:
    """Share of final predictions by mean confidence of a bin: ``rows``, ``confidence``, ``value``, ``low``, ``high``, ``n``."""
    words = {"all": "all masked rows", "waiting": "rows not accepted yet"}
    bins = frame.filter(pl.col("metric") == "final_share").drop_nulls("bin").filter(pl.col("rows").is_in(list(words)))
    return bins.select(
        pl.col("rows").replace_strict(words, return_dtype=pl.String), "confidence", "value", "low", "high", "n"
    )


def unbeaten(frame: pl.DataFrame, noun: str) -> str:
    """A sentence that names the points of a curve that do not beat their null; empty where all do.

    ``noun`` names the x axis. Points without a null or without an interval are neither beaten nor not.
    """
    series = "series" if "series" in frame.columns else "line"
    lost = frame.filter(~pl.col("beats_null")).sort("at", maintain_order=True)
    if lost.is_empty():
        return ""
    names = frame[series].unique(maintain_order=True).to_list()
    told = []
    for name in names:
        at = lost.filter(pl.col(series) == name)["at"].to_list()
        if at:
            every = len(at) == frame.filter(pl.col(series) == name).height
            where = f"{'at every' if every else 'at'} {noun}{'' if every else ' ' + spans(at)}"
            told.append(where if name == MEASURED else f"{name} ({where})")
    return f"Not beating {'the null' if series == 'series' else 'every null'}: {', '.join(told)}."


def spans(numbers: list[int]) -> str:
    """Ascending whole numbers in words: "1, 3 to 5"."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in found)
