"""The report: figures that are those of the data, text that stays text, a page that needs nothing but a browser."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import polars as pl
import pytest

from analysis import page
from analysis.aggregate import MAX_ROWS
from analysis.figures import band
from analysis.metrics import consistency
from analysis.reporting import match, render, report
from analysis.summary import ReplaySummary, read_replay, summarise_trace
from simulator.interval import find_interval
from simulator.replaying import replay
from tests.analysis import browser, replayed
from tracer.errors import UserError

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&${title}{{x}}"
CHROMIUM = browser.find()
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(browser.NAMES)} is installed")


OVERLAPPING = """[...document.querySelectorAll('.chart svg')].flatMap(svg => {
    const boxes = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
    const shown = boxes.filter(([words, box]) => words && box.width);
    return shown.flatMap(([words, a], i) => shown.slice(i + 1).filter(([, b]) =>
        Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
        Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4
    ).map(([other]) => [svg.getAttribute('aria-label'), words, other]));
})"""
"""Pairs of texts of one drawing that lie on each other. Boxes hold the room of accents: a few pixels of it may be shared."""


class Reader(HTMLParser):
    """The page as a browser would take it apart: tags with attributes, text, and the content of scripts."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words, self.scripts, self.inside = [], [], [], None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside = tag
            self.scripts.append((tag, ""))

    def handle_endtag(self, tag):
        if tag == self.inside:
            self.inside = None

    def handle_data(self, words):
        if self.inside:
            tag, before = self.scripts[-1]
            self.scripts[-1] = (tag, before + words)
        else:
            self.words.append(words)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def both():
    """Two traces and a replay of each, the second with budgets swept."""
    llada2 = replayed.trace(consistency=replayed.consistency(), intervals=(replayed.interval(),))
    sdar = replayed.trace("sdar", seed=5, model="demo:sdar", consistency=replayed.consistency(5))
    swept = [("lru", {"budget": b, "scope": "layer"}, 0.4 + b / 64, 1e5 * (33 - b)) for b in (8, 16)]
    replays = [
        replayed.replay(llada2.forwards),
        replayed.replay(sdar.forwards, model="demo:sdar", residencies=(*replayed.RESIDENCIES, *swept)),
    ]
    return [llada2, sdar], replays


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    traces, replays = both()
    assert report(path, traces, replays) == path
    return path


@pytest.fixture(scope="module")
def read(written):
    return Reader(written.read_text(encoding="utf-8"))


def specs_of(reader):
    return json.loads(next(words for tag, words in reader.scripts if words.startswith('{"config"')))["charts"]


def test_known_figures_stand_in_the_page(read):
    trace = replayed.trace()
    forwards = trace.forwards.height
    denoise = trace.forwards.filter(pl.col("kind") == "denoise").height
    decisions = int(trace.load["tokens"].sum())
    for sentence in (
        f"3 prompts, {forwards} model calls ({denoise} of them denoise forwards), {decisions:,} routing decisions in 3 layers",
        f"A denoise forward accepts {12 * replayed.BLOCK / denoise:.2f} tokens on average",
        "Under vanilla routing a denoise forward touches 22.9 of 32 experts a layer and gains 1.21 tokens.",
        "Under team it touches 15.3, 33.2% fewer, and keeps 94.0% of the vanilla gate weight, at 1.83 tokens",
        "keeps 87.1% of the vanilla gate weight (estimate).",
        "With vanilla routing, tide residency, holding 7.08 MB of weights, finds the expert in fast memory for 86.2% of the",
        "token-slots and moves 1.1 MB to the GPU a forward.",
        "On h100-pcie5 with the kernel vllm_fused, team × tide is the fastest of the runs that do not hold every expert",
        f"{8_123 / decisions:.2f}",
        f"{28_123 / decisions:.2f}",
        "83.3 kB",
        "moetrace capture",
        "top_p=0.6, min_experts=12",
        replayed.NOTE,
    ):
        assert sentence in read.text, sentence


def test_the_run_table_holds_the_figures_of_each_run(written):
    html = written.read_text(encoding="utf-8")
    runs = replayed.document()["runs"]
    for run in (runs[0], runs[5]):
        for key in ("unique_experts", "tokens_per_forward", "hit_rate", "tokens_per_s"):
            assert f'data-sort="{float(run["summary"][key])!r}"' in html, (run["run"], key)
        ends = run["summary"]["speedup"]["low"], run["summary"]["speedup"]["high"]
        assert f'data-sort="{ends[0]!r}">{band(ends)}</td>' in html
    assert "Latency is estimated on h100-pcie5 with the kernel vllm_fused." in html
    assert "A speed-up is against vanilla routing on the recorded forwards" in html
    assert html.count("<tr class=estimate>") == 6 + 10


def test_a_summary_sentence_follows_its_figures():
    better = replayed.document(routings=(replayed.ROUTINGS[0], ("dmoe", {}, 25.19, 0.5, 1.21)))
    text = Reader(render([], [ReplaySummary(better)])).text
    assert "Under dmoe it touches 25.2, 10.0% more, and keeps 50.0% of the vanilla gate weight (estimate)." in text
    assert "22.9 of 32" in text


def test_nothing_is_loaded_from_anywhere(read):
    for tag, attributes in read.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or value == "data:,", (tag, name, value)
    for tag, words in read.scripts:
        assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//", words), tag
    policy = next(a["content"] for t, a in read.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy and "http" not in policy
    assert re.findall(r"'sha256-[^']+'", policy) and "script-src 'unsafe-inline'" not in policy
    own = [words for tag, words in read.scripts if tag == "script" and not words.startswith('{"config"')]
    assert [page._hash(words) in policy for words in own] == [True, True]


def test_specs_are_bounded_and_load_no_data(read):
    specs = specs_of(read)
    assert len(specs) > 15
    for spec in specs:
        assert sum(len(rows) for rows in spec["datasets"].values()) <= 2 * MAX_ROWS
        assert '"url"' not in json.dumps(spec)


def test_the_scripts_are_in_the_page_once(written):
    html = written.read_text(encoding="utf-8")
    assert html.count("<script") == 3
    assert html.count("window.vegaEmbed=") == 1
    assert len(html) < 3_000_000


def evil_page():
    trace = replayed.trace(name=EVIL, model=EVIL)
    trace = replace(trace, meta={**trace.meta, "provenance": {EVIL: EVIL}, "decoding": {"loop": EVIL}})
    routings = (("vanilla", {EVIL: EVIL}, 20.0, 1.0, 1.0), (EVIL, {}, 10.0, 0.9, 1.0))
    replay = replayed.replay(trace.forwards, routings=routings, hardware=EVIL, model=EVIL)
    for run in replay.document["runs"]:
        run["notes"] = [EVIL]
        run["summary"]["latency"][EVIL] = 0.001
    return render([trace], [replay])


def test_text_stays_text():
    reader = Reader(evil_page())
    assert not [a for _, a in reader.tags if "onerror" in a]
    assert not [t for t, _ in reader.tags if t == "img"]
    assert len([tag for tag, _ in reader.scripts if tag == "script"]) == 3
    # Once in a heading at least, whole, as text.
    assert re.sub(r"\s+", " ", EVIL) in reader.text
    assert any(EVIL in json.dumps(s, ensure_ascii=False).replace('\\"', '"') for s in specs_of(reader))


def test_an_existing_file_is_kept_without_force(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("mine")
    with pytest.raises(UserError, match="already there"):
        report(path)
    assert path.read_text() == "mine"
    report(path, force=True)
    assert "moetrace" in path.read_text(encoding="utf-8")
    with pytest.raises(UserError, match="is a folder"):
        report(tmp_path, force=True)
    with pytest.raises(UserError, match="is not there"):
        report(tmp_path / "none" / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def empty_trace():
    trace = replayed.trace()
    return replace(
        trace,
        requests=0,
        forwards=trace.forwards.clear(),
        load=trace.load.clear(),
        cell_bytes={},
        bytes_on_disk={},
    )


EMPTY = {
    "nothing": ([], []),
    "an empty trace": ([empty_trace()], []),
    "a replay without runs": ([], [ReplaySummary({"trace": {}, "runs": []})]),
    "a replay without cells, hardware or figures": (
        [],
        [ReplaySummary({"runs": [{"routing": {"name": "vanilla"}, "residency": None, "summary": {}, "notes": None}]})],
    ),
    "cells of an empty trace": ([empty_trace()], [replayed.replay(replayed.trace().forwards)]),
}


@pytest.mark.parametrize("name", EMPTY)
def test_empty_inputs_say_why_a_panel_is_empty(name):
    reader = Reader(render(*EMPTY[name]))
    assert [a for t, a in reader.tags if t == "p" and a.get("class") == "empty"]
    assert [a["id"] for t, a in reader.tags if t == "section"] == [
        "summary",
        "recorded",
        "consistency",
        "policies",
        "residency",
        "interval",
        "cost",
        "notes",
        "provenance",
    ]
    assert "NaN" not in reader.text and "None" not in reader.text


def test_empty_panels_name_the_reason():
    nothing = Reader(render([], [])).text
    assert "No trace was passed to this report." in nothing
    assert "No replay was passed to this report, so there is nothing to compare." in nothing
    without = Reader(render([], [ReplaySummary(replayed.document(hardware=None))])).text
    assert "No run names a hardware preset, so nothing has a latency." in without
    assert "Latency is estimated" not in without


def test_only_estimates_bring_the_open_loop_warning():
    exact = replayed.document(routings=replayed.ROUTINGS[:1], hardware=None)
    assert "open-loop" not in Reader(render([], [ReplaySummary(exact)])).text
    assert "open-loop" in Reader(render([], [ReplaySummary(replayed.document(hardware=None))])).text


def test_replays_find_their_trace():
    (llada2, sdar), (first, second) = both()
    swapped = match([second, first], [llada2, sdar])
    assert [(r.name, r.trace.name) for r in swapped] == [("sdar", "sdar"), ("llada2", "llada2")]
    twice = match([first, first], [llada2])
    assert [r.name for r in twice] == ["llada2 (1)", "llada2 (2)"]
    named = ReplaySummary({"trace": {"path": "runs/one.trace"}, "runs": []})
    assert [(r.name, r.trace) for r in match([named], [])] == [("one", None)]


def test_numbers_that_json_cannot_hold_become_null():
    assert json.loads(page._json({"a": [float("nan"), float("inf"), 1.5]})) == {"a": [None, None, 1.5]}
    assert "<" not in page._json({"a": "</script>"})
    assert json.loads(page._json({"a": "</script>&"})) == {"a": "</script>&"}


def test_stored_traces_and_replays_are_summarised(tmp_path):
    segment, opened = replayed.stored(tmp_path / "small.trace", seed=3)
    found = summarise_trace(opened)
    layers = {layer: segment.layer(layer) for layer in segment.layers}
    want = {
        (layer, expert): sum(expert in row[:n].tolist() for row, n in zip(t.expert_ids, t.count, strict=True))
        for layer, t in layers.items()
        for expert in range(9)
    }
    assert {(layer, expert): tokens for layer, expert, tokens in found.load.iter_rows()} == want
    assert found.decisions == opened.num_decisions
    assert (found.name, found.requests) == ("small", 2)
    result = replay(
        opened, ["vanilla", "dmoe:top_p=0.5,min_experts=3"], ["all_resident", "lru:budget=3"], hardware="h100-pcie5"
    )
    path = report(tmp_path / "report.html", traces=[opened], results=[result])
    reader = Reader(path.read_text(encoding="utf-8"))
    vanilla = result.to_json()["runs"][0]["summary"]
    assert (
        f"Under vanilla routing a denoise forward touches {vanilla['unique_experts']:.1f} of 9 experts" in reader.text
    )
    assert f"{found.decisions:,} routing decisions in 2 layers of 9 experts, 2 a token." in reader.text
    result.write(tmp_path / "kept")
    assert read_replay(tmp_path / "kept").forwards.equals(result.forwards)
    again = render([replace(found, consistency=consistency(opened))], [read_replay(tmp_path / "kept")])
    assert again == path.read_text(encoding="utf-8")
    titles = [spec["description"] for spec in specs_of(reader)]
    assert titles == [
        "How a block fills up",
        "Load of the experts by layer",
        "Overlap from step to step",
        "Overlap to the next step by layer",
        "How routing settles after acceptance",
        "Expert counts from step to step",
        "Drift of the wanted set",
        "How long an expert stays active",
        "How long an expert stays wanted",
        "Working set of a window",
        "Unique experts against rows",
        "Overlap of neighbouring positions",
        "How far a layer foretells the next",
        "Tokens accepted by each step",
        "Confidence against later change",
        "Confidence against the final token",
        "Unique experts by denoise step",
        "Unique experts by layer",
        "What fewer experts cost",
        "Hit rate by residency and routing",
        "Weights moved against weights needed",
        "Where the time goes",
    ]


def test_intervals_are_found_for_the_replays_under_tide(tmp_path):
    _, opened = replayed.stored(tmp_path / "small.trace", seed=3)
    residencies = ["all_resident", *(f"tide:budget={b},refresh_interval={i}" for b in (3, 4, 5) for i in (1, 2))]
    results = [replay(opened, ["vanilla"], residencies, hardware=machine) for machine in ("h100-pcie5", None)]
    for result, budgets in zip(results, ((3, 4), ())):
        path = report(tmp_path / "report.html", [opened], [result], force=True)
        text = Reader(path.read_text(encoding="utf-8")).text
        for budget in (3, 4, 5):
            assert (f"small: {budget} experts a layer on h100-pcie5" in text) == (budget in budgets)
        for budget in budgets:
            found = find_interval(opened, budget, "h100-pcie5")
            assert (
                f"chooses an interval of {found.program}; of the intervals replayed, {found.best} is the fastest"
                in text
            )
        assert ("No refresh interval was computed" in text) == (not budgets)
    path = report(tmp_path / "none.html", [opened], [results[0]], intervals=())
    assert "No refresh interval was computed" in path.read_text(encoding="utf-8")


def test_a_folder_that_is_no_replay_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"holds no replay\.json"):
        read_replay(tmp_path)
    told, cells = tmp_path / "replay.json", tmp_path / "replay.parquet"
    told.write_text("{}")
    cells.write_text("no table")
    with pytest.raises(UserError, match="is not a replay that can be read"):
        read_replay(tmp_path)
    pl.DataFrame({"run": [0]}).write_parquet(cells)
    with pytest.raises(UserError, match="lists no runs"):
        read_replay(tmp_path)
    told.write_text('{"runs": []}')
    with pytest.raises(UserError, match="lacks forward_id, layer, unique_experts"):
        read_replay(tmp_path)
    pl.DataFrame({"run": [0], "forward_id": [0], "layer": [1], "unique_experts": [2]}).write_parquet(cells)
    assert read_replay(tmp_path).forwards is None
    pl.DataFrame({"run": [0]}).write_parquet(tmp_path / "forwards.parquet")
    with pytest.raises(UserError, match=r"forwards\.parquet lacks forward_id, kind, step"):
        read_replay(tmp_path)


@pytest.fixture(scope="module")
def window():
    with browser.Browser(CHROMIUM) as opened:
        yield opened


@needs_browser
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_draws_every_chart_and_asks_for_nothing(window, written, width, dark):
    window.complaints.clear()
    window.requests.clear()
    window.open(written, width, dark=dark)
    assert window.complaints == []
    assert [url for url in window.requests if url not in (written.as_uri(), "data:,")] == []
    charts = "[...document.querySelectorAll('.chart')]"
    assert window.evaluate(f"{charts}.length") == len(specs_of(Reader(written.read_text(encoding="utf-8"))))
    assert window.evaluate(f"{charts}.filter(c => !c.querySelector('svg .mark-group path')).length") == 0
    assert window.evaluate("document.documentElement.scrollWidth") == width
    # No drawing is wider than its place, and no label lies outside its drawing.
    assert window.evaluate(f"{charts}.filter(c => c.querySelector('svg').clientWidth > c.clientWidth).length") == 0
    outside = """[...document.querySelectorAll('.chart svg text')].filter(text => {
        const box = text.getBoundingClientRect(), whole = text.ownerSVGElement.getBoundingClientRect();
        return box.width && (box.left < whole.left - 1 || box.right > whole.right + 1 || box.bottom > whole.bottom + 1);
    }).map(text => text.textContent)"""
    assert window.evaluate(outside) == []
    assert window.evaluate(OVERLAPPING) == []
    cut = "[...document.querySelectorAll('#consistency svg text, #interval svg text')].map(t => t.textContent)"
    assert len(window.evaluate(cut)) > 100 and [words for words in window.evaluate(cut) if words.endswith("…")] == []
    ink = window.evaluate("getComputedStyle(document.querySelector('.chart svg .role-axis-label text')).fill")
    assert ink == ("rgb(228, 231, 235)" if dark else "rgb(27, 31, 36)")


@needs_browser
def test_charts_are_readable_on_paper(window, written):
    """A landscape page of A4 or Letter is about 970 px wide inside its margins, and 690 px high: two rows of charts."""
    window.open(written, 970, media="print")
    assert window.evaluate("document.documentElement.scrollWidth") == 970
    sizes = window.evaluate("""[...document.querySelectorAll('.chart svg')].map(svg => {
        const box = svg.getBoundingClientRect(), shrunk = box.width / svg.viewBox.baseVal.width;
        return [box.height, 12 * shrunk, box.right - svg.parentElement.getBoundingClientRect().right];
    })""")
    assert len(sizes) == len(specs_of(Reader(written.read_text(encoding="utf-8"))))
    assert sum(height < 690 / 2 for height, _, _ in sizes) > 0.9 * len(sizes)
    assert max(height for height, _, _ in sizes) < 690
    # 8 px are 6 points.
    assert min(letters for _, letters, _ in sizes) >= 8
    assert max(over for _, _, over in sizes) < 1
    assert window.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


@needs_browser
def test_a_browser_has_nothing_to_say_of_a_trace_with_little_in_it(window, tmp_path):
    """One request: no intervals. One forward: next to nothing."""
    path = tmp_path / "little.html"
    for shape in ({"requests": 1}, {"requests": 1, "blocks": 1, "block_length": 1}):
        trace = replayed.trace(consistency=replayed.consistency(3, **shape))
        path.write_text(render([trace], []), encoding="utf-8")
        window.complaints.clear()
        window.open(path)
        assert window.complaints == [], shape
        assert window.evaluate("document.querySelectorAll('.broken').length") == 0
        assert window.evaluate(OVERLAPPING) == []


@needs_browser
def test_texts_that_lie_on_each_other_are_found(window, written):
    window.open(written)
    window.evaluate("""document.querySelector('.chart svg').insertAdjacentHTML('beforeend',
        '<text x="50" y="50">one text</text><text x="60" y="52">another</text><text x="50" y="90">apart</text>')""")
    assert [pair[1:] for pair in window.evaluate(OVERLAPPING) if "one text" in pair] == [["one text", "another"]]


@needs_browser
def test_tables_sort_by_click(window, written):
    window.open(written)
    column = """(() => {
        const table = document.querySelector('#policies table');
        const at = [...table.tHead.rows[0].cells].findIndex(c => c.textContent === 'hit rate');
        return [table.tHead.rows[0].cells[at], [...table.tBodies[0].rows].map(r => r.cells[at].textContent)];
    })()"""
    before = window.evaluate(f"{column}[1]")
    window.evaluate(f"{column}[0].querySelector('button').click()")
    falling = window.evaluate(f"{column}[1]")
    assert window.evaluate(f"{column}[0].getAttribute('aria-sort')") == "descending"
    window.evaluate(f"{column}[0].querySelector('button').click()")
    rising = window.evaluate(f"{column}[1]")
    assert falling == sorted(before, key=lambda cell: -float(cell.rstrip("%")))
    assert rising == sorted(before, key=lambda cell: float(cell.rstrip("%")))


@needs_browser
def test_charts_follow_the_width_of_the_window(window, written):
    window.open(written, 1280)
    window.call("Emulation.setDeviceMetricsOverride", width=400, height=900, deviceScaleFactor=1, mobile=False)
    window.wait("document.querySelector('.chart svg').clientWidth < 400")
    window.wait("document.documentElement.dataset.charts === 'drawn'")
    gap = "c => Math.abs(c.querySelector('svg').clientWidth - c.clientWidth) > 1"
    assert window.evaluate(f"[...document.querySelectorAll('.chart')].filter({gap}).length") == 0
    assert window.evaluate("document.documentElement.scrollWidth") == 400


@needs_browser
def test_evil_text_runs_nothing_in_a_browser(window, tmp_path):
    path = tmp_path / "evil.html"
    path.write_text(evil_page(), encoding="utf-8")
    window.complaints.clear()
    window.requests.clear()
    window.open(path)
    assert window.complaints == []
    assert [url for url in window.requests if url not in (path.as_uri(), "data:,")] == []
    assert window.evaluate("document.querySelectorAll('.chart svg').length > 5")
    assert window.evaluate("document.querySelectorAll('img, .broken').length") == 0
    assert window.evaluate("document.documentElement.scrollWidth") == 1280
