"""The sections on consistency and on the refresh interval: every null beside its figure, and said where it is not beaten."""

from __future__ import annotations

import json
from dataclasses import replace

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import charts_interval, curves
from analysis.aggregate import MAX_ROWS
from analysis.findings_consistency import consistency_findings, unbeaten_findings
from analysis.metrics import SCHEMAS, ConsistencyResult, across_seeds
from analysis.metrics.shared.agreement import WORDS
from analysis.metrics.shared.metric import metrics
from analysis.reporting import render, report
from analysis.sections_consistency import by_layer, panels
from analysis.sections_seeds import BETWEEN
from analysis.sections_seeds import CHART as SEEDS
from tests.analysis import replayed
from tests.analysis.test_report import Reader
from tracer.errors import UserError


def chart(name, number=0):
    """One of a metric's charts."""
    return metrics()[name].charts[number]


def naive_hardest(row, smaller):
    """Largest (or smallest) null of a row and its name, ties to the first name."""
    known = [(row[n], n.removeprefix("null_")) for n in curves.NULLS if row.get(n) is not None]
    if not known:
        return None, None
    best = (min if smaller else max)(value for value, _ in known)
    return best, next(name for value, name in known if value == best)


def naive_spans(numbers):
    """Runs of consecutive numbers in words."""
    out = []
    for n in sorted(numbers):
        if n - 1 not in numbers:
            end = n
            while end + 1 in numbers:
                end += 1
            out.append(str(n) if end == n else f"{n} to {end}")
    return ", ".join(out)


@given(
    st.lists(st.tuples(*(st.none() | st.sampled_from([0.1, 0.2, 0.3]) for _ in range(3))), min_size=1), st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_the_hardest_null_is_the_naive_one(rows, smaller):
    names = ("null_hot", "null_independent", "null_shuffle")
    frame = pl.DataFrame(rows, schema=dict.fromkeys(names, pl.Float64), orient="row")
    found = curves.hardest(frame, smaller).select("null", "null_name").rows()
    assert found == [naive_hardest(row, smaller) for row in frame.iter_rows(named=True)]


@given(st.sets(st.integers(0, 12)))
@settings(max_examples=60, deadline=None)
def test_spans_are_the_naive_ones(numbers):
    assert curves.spans(sorted(numbers)) == naive_spans(numbers)


def test_a_point_that_does_not_beat_its_null_is_named():
    rows = [("a", 1, True), ("a", 2, False), ("a", 3, False), ("b", 1, False), ("b", 2, False), ("c", 1, None)]
    frame = pl.DataFrame(rows, schema=("series", "at", "beats_null"), orient="row")
    assert curves.unbeaten(frame, "layer") == "Not beating the null: a (at layer 2 to 3), b (at every layer)."
    assert curves.unbeaten(frame.filter("beats_null"), "layer") == ""
    lines = frame.rename({"series": "line"}).with_columns(pl.col("line").replace("a", curves.MEASURED))
    assert curves.unbeaten(lines, "step") == "Not beating every null: at step 2 to 3, b (at every step)."


def test_one_row_and_one_forward_are_not_held_against_nulls_that_equal_them():
    frames = replayed.consistency().frames
    for name in ("growth", "working_set"):
        lines = chart(name).curve(frames[name]).filter(~pl.col("is_null"))
        assert lines.filter(at=1)["beats_null"].null_count() == lines.filter(at=1).height > 0
        assert lines.filter(pl.col("at") > 1)["beats_null"].null_count() == 0


def test_curves_hold_the_figures_of_their_frames():
    frames = replayed.consistency().frames
    for name, number, where, key in (
        ("overlap", 0, {"metric": "jaccard", "layer": None}, ("state", "distance")),
        ("overlap", 1, {"metric": "jaccard", "distance": 1}, ("state", "layer")),
        ("settling", 0, {"layer": None}, ("reference", "lag")),
        ("spatial", 0, {"metric": "jaccard", "layer": None}, ("state", "distance")),
    ):
        words = chart(name, number).words
        want = {
            (words[row[key[0]]], row[key[1]]): (row["value"], row["low"], row["high"], *naive_hardest(row, False))
            for row in frames[name].iter_rows(named=True)
            if all(row[column] == value for column, value in where.items()) and row[key[1]] is not None
        }
        curve = chart(name, number).curve(frames[name])
        columns = ("series", "at", "value", "low", "high", "null", "null_name")
        assert {row[:2]: row[2:] for row in curve.select(columns).rows()} == want, (name, number)
        assert curve["series"].unique(maintain_order=True).to_list() == [
            w for w in words.values() if w in {series for series, _ in want}
        ]


def test_every_null_is_a_line():
    frames = replayed.consistency().frames
    for name, at in (
        ("cosine", "distance"),
        ("growth", "rows"),
        ("predictability", "layer"),
        ("survival", "distance"),
        ("working_set", "window"),
    ):
        frame = frames[name]
        rows = [r for r in frame.iter_rows(named=True) if (r["layer"] is None) != (name == "predictability")]
        rows = [r for r in rows if r.get("scope", "block") == "block" and r["metric"] != "residency"]
        lines = chart(name).curve(frame)
        nulls = {n for n in curves.NULLS if n in frame.columns}
        for null in nulls:
            words = f"{curves.null_words(name, null.removeprefix('null_'))} (null)"
            drawn = dict(lines.filter(pl.col("line") == words).select("at", "value").rows())
            assert drawn == {r[at]: r[null] for r in rows if r[null] is not None}, (name, null)
        assert lines["line"].n_unique() == len(nulls) + (2 if name == "growth" else 1)


def test_every_null_across_recordings_is_a_line():
    frame = replayed.seeds()
    rows = [r for r in frame.iter_rows(named=True) if r["metric"] == "cosine" and not r["first"] and r["layer"]]
    lines = SEEDS.curve(frame)
    for word, between, column in (
        (BETWEEN["traces"], "traces", "value"),
        (BETWEEN["prompts"], "prompts", "value"),
        *((f"{words} (null)", "prompts", f"null_{null}") for null, words in WORDS.items()),
    ):
        drawn = dict(lines.filter(line=word).select("at", "value").rows())
        assert drawn == {r["layer"]: r[column] for r in rows if r["between"] == between}, word


def test_drift_and_confidence_hold_the_figures_of_their_frames():
    frames = replayed.consistency().frames
    want = {
        (f"the {row['budget']} most wanted", row["distance"]): (row["value"], *naive_hardest(row, True))
        for row in frames["drift"].iter_rows(named=True)
        if (row["metric"], row["scope"], row["layer"]) == ("drift", "block", None)
    }
    found = chart("drift").curve(frames["drift"]).select("series", "at", "value", "null", "null_name")
    assert {row[:2]: row[2:] for row in found.rows()} == want
    want = {
        (f"the {row['budget']} most wanted", row["distance"]): (row["value"], *naive_hardest(row, False))
        for row in frames["survival"].iter_rows(named=True)
        if (row["metric"], row["scope"], row["layer"]) == ("residency", "block", None)
    }
    found = chart("survival", 1).curve(frames["survival"]).select("series", "at", "value", "null", "null_name")
    assert {row[:2]: row[2:] for row in found.rows()} == want
    lines = chart("confidence").curve(frames["confidence"])
    for line, column in (("predictions that are not final", "value"), ("mean confidence", "confidence")):
        drawn = lines.filter(line=line).select("at", "value").rows()
        assert drawn == frames["confidence"].select("steps_before", column).rows()


def test_charts_validate_and_are_bounded():
    result = replayed.consistency()
    made = {f"{name} {one.title}": one.draw(one.curve(result.frames[name])) for name, one in panels()}
    made |= {draw.__name__: draw(replayed.interval()) for draw in charts_interval.ALL}
    made["seeds"] = SEEDS.draw(SEEDS.curve(replayed.seeds()))
    assert len(made) == 18
    for name, drawn in made.items():
        spec = drawn.to_dict(validate=True)
        assert 0 < sum(len(rows) for rows in spec["datasets"].values()) <= MAX_ROWS, name
        assert spec["title"]["text"] and all(len(line) <= 96 for line in spec["title"]["subtitle"]), name
        assert spec["width"] == 600, name
        assert "tooltip" in json.dumps(spec["layer"]), name


def test_estimates_of_the_interval_are_called_that():
    for draw in charts_interval.ALL:
        spec = draw(replayed.interval()).to_dict()
        assert "estimate" in json.dumps({key: value for key, value in spec.items() if key != "datasets"}), draw
    objective = charts_interval.objective(replayed.interval()).to_dict()
    least = [r for rows in objective["datasets"].values() for r in rows if r["least"]]
    assert [(r["choice"], r["refresh_interval"]) for r in least] == [
        (charts_interval.PROGRAM, 6),
        (charts_interval.MEMORYLESS, 1),
    ]


def page_of(**more):
    return Reader(render([replayed.trace(**more)], []))


def test_headline_and_findings_stand_in_the_page():
    result = replayed.consistency()
    reader = page_of(consistency=result)
    for row in result.headline():
        assert row["figure"].strip() in reader.text
        assert f"{row['value']:,.3f}" in reader.text
    found = consistency_findings(result)
    for sentence in found:
        assert sentence in reader.text
    near = next(r for r in result.headline() if r["frame"] == "overlap")
    assert f"with a Jaccard of {near['value']:.2f} ({curves.null_words('overlap', near['null_name'])}: " in found[0]
    assert f"at {result.summary['accepted_per_step']:.2f} accepted tokens a step." in found[0]
    # Overlap, its states, counts, unique experts and the next layer: a headline that is renamed would lose its sentence.
    assert len(found) - len(unbeaten_findings(result)) == 5
    for note in result.notes:
        assert note in reader.text


def test_a_figure_that_does_not_beat_its_null_says_so():
    result = replayed.consistency()
    lost = [row for row in result.headline() if row["beats_null"] is False and row["low"] is not None]
    assert lost, "random routing beats every null"
    assert len(unbeaten_findings(result)) == len(lost)
    reader = page_of(consistency=result)
    for sentence in unbeaten_findings(result):
        assert "does not beat its null" in sentence and reader.text.count(sentence) == 2
    captions = [curves.unbeaten(chart("overlap").curve(result.frames["overlap"]), "distance")]
    assert captions[0].startswith("Not beating the null: ") and captions[0] in reader.text


def test_empty_frames_say_why():
    reasons = {name: f"There is no {name} in this trace." for name in SCHEMAS}
    frames = {name: pl.DataFrame(schema=schema) for name, schema in SCHEMAS.items()}
    reader = page_of(consistency=ConsistencyResult(frames, reasons, {}, []))
    for reason in reasons.values():
        assert reason in reader.text
    empty = [a for t, a in reader.tags if t == "p" and a.get("class") == "empty"]
    assert len(empty) >= len(panels())
    assert "No consistency analysis was passed" not in reader.text
    assert "No consistency analysis was passed" in page_of().text


def test_a_trace_of_one_request_has_figures_without_intervals():
    result = replayed.consistency(3, requests=1)
    reader = page_of(consistency=result)
    assert result.reasons["intervals"] in reader.text and result.reasons["predictability"] in reader.text
    assert "does not beat its null" not in reader.text and "NaN" not in reader.text and "None" not in reader.text


def test_only_what_was_asked_for_is_drawn():
    result = replayed.consistency()
    some = replace(result, frames={"overlap": result.frames["overlap"]}, reasons={})
    text = page_of(consistency=some).text
    assert "Overlap from step to step" in text and "Expert counts from step to step" not in text


def test_a_table_holds_each_layer():
    frames = replayed.consistency().frames
    columns, rows = by_layer(replayed.consistency())
    assert [column.heading for column in columns][:3] == ["layer", "next step: Jaccard", "null"]
    assert [row[0] for row in rows] == list(replayed.LAYERS)
    jaccard = frames["overlap"].filter(metric="jaccard", state="all", distance=1)
    for layer, value, null, *rest in rows:
        found = jaccard.filter(layer=layer).row(0, named=True)
        assert (value, null) == (found["value"], naive_hardest(found, False)[0])
        unique = frames["unique"].filter(scope="block", state="all", layer=layer)
        assert rest[2] == unique.filter(metric="unique_mean")["value"].item()
        assert rest[4] == unique.filter(metric="unique_cv")["value"].item()
        assert rest[5] == frames["balance"].filter(metric="gini", layer=layer)["value"].item()
    assert by_layer(ConsistencyResult({}, {}, {}, []))[1] == []


def recordings(*decodings):
    """Traces of one model recorded with different settings of decoding."""
    return [
        replace(
            replayed.trace(f"run {n}", consistency=replayed.consistency(n)),
            meta=replayed.meta(decoding={"loop": "llada2", **decoding}),
        )
        for n, decoding in enumerate(decodings)
    ]


def test_recordings_of_one_model_are_compared():
    traces = recordings({"seed": 0}, {"seed": 1}, {"seed": 2})
    reader = Reader(render(traces, []))
    frame = across_seeds({trace.name: trace.consistency for trace in traces})
    pooled = frame.filter(pl.col("layer").is_null() & pl.col("first").is_null(), metric="cosine")
    whole, prompts = (pooled.filter(between=name).row(0, named=True) for name in ("traces", "prompts"))
    hardest, name = naive_hardest(prompts, False)
    for sentence in (
        "3 recordings of test",
        "They differ in seed (0, 1, 2).",
        f"The popularity of a layer's experts agrees with a cosine of {whole['value']:.3f} (shuffled expert labels: "
        f"{whole['null_shuffle']:.3f})" + ("." if whole["beats_null"] else ", which does not beat its null."),
        f"For the same prompt its cosine is {prompts['value']:.3f} ({curves.null_words('agreement', name)}: {hardest:.3f})"
        + ("." if prompts["beats_null"] else ", which does not beat its null."),
        "mean over pairs",
        "run 0 and run 2",
        "Popularity of experts across recordings",
    ):
        assert sentence in reader.text, sentence
    assert "recordings of" not in Reader(render(traces[:1], [])).text
    other = replace(traces[1], consistency=replayed.consistency(1, experts=16))
    assert "recordings of" not in Reader(render([traces[0], other], [])).text
    alike = Reader(render(recordings({}, {}), [])).text
    assert "2 recordings of test" in alike and "They differ in" not in alike and "mean over pairs" not in alike


def test_two_recordings_of_one_name_are_told_apart():
    one, other = recordings({"seed": 0}, {"seed": 1})
    assert "same and same (2)" in Reader(render([replace(one, name="same"), replace(other, name="same")], [])).text


def test_the_interval_says_why_it_is_empty():
    reader = page_of()
    assert "interval" in [a["id"] for t, a in reader.tags if t == "section"]
    assert "No refresh interval was computed for this report" in reader.text
    result = replayed.interval()
    reader = page_of(intervals=(result, replayed.interval(budget=8)))
    assert "interval" in [a["id"] for t, a in reader.tags if t == "section"]
    for sentence in (
        "24 experts a layer on h100-pcie5",
        "8 experts a layer on h100-pcie5",
        "TIDE's program chooses an interval of 6; of the intervals replayed, 3 is the fastest.",
        f"Following the program is {100 * result.regret:.1f}% slower (estimate).",
        "A note on the interval.",
        "What each choice of interval costs",
    ):
        assert sentence in reader.text, sentence


def test_open_traces_are_analysed_unless_told_otherwise(tmp_path):
    _, opened = replayed.stored(tmp_path / "small.trace", seed=3)
    assert chart("overlap").title == "Overlap from step to step"
    told = {}
    for name, more in (
        ("computed", {}),
        ("left", {"consistency": [None]}),
        ("both", {"intervals": [replayed.interval()]}),
    ):
        path = report(tmp_path / f"{name}.html", [opened], **more)
        told[name] = Reader(path.read_text(encoding="utf-8")).text
    assert "Overlap from step to step" in told["computed"] and "No consistency analysis" in told["left"]
    assert "A note on the interval." in told["both"]
    assert "No refresh interval was computed" in told["computed"] and "No refresh interval" not in told["both"]
    with pytest.raises(UserError, match="consistency has 2 entries for 1 traces"):
        report(tmp_path / "more.html", [opened], consistency=[None, None])
    with pytest.raises(UserError, match="intervals has 1 entries for 0 traces"):
        report(tmp_path / "more.html", intervals=[replayed.interval()])
