"""Figures say themselves once: every key of a run's summary is one, and what is documented is what is written in the code."""

from __future__ import annotations

from pathlib import Path

from analysis.figures import BANDS, COLUMNS, FIGURES, IN_PARTS, WRITTEN, band, cell, figures_markdown, shown_in, values
from simulator import replay
from tests.analysis import replayed

ROOT = Path(__file__).parent.parent.parent


def test_every_key_of_a_summary_is_a_figure(tmp_path):
    _, opened = replayed.stored(tmp_path / "a.trace")
    runs = replay(opened, ["vanilla", "dmoe"], ["tide:budget=8,refresh_interval=2"], hardware="h100-pcie5").runs
    for run in runs:
        assert set(run.summary) | {"ms_per_forward"} == set(FIGURES)
        for name, value in run.summary.items():
            number = FIGURES[name].written != IN_PARTS and name not in BANDS
            assert value is None or isinstance(value, int | float) == number, name
        told = values(run.summary)
        assert set(told) == set(COLUMNS)
        for name in BANDS:
            parts = run.summary[name]
            assert [told[key] for key in (name, f"{name}.low", f"{name}.high")] == [
                parts["value"],
                parts["low"],
                parts["high"],
            ]
            assert cell(name, told) == (parts["low"], parts["high"])
        assert told["ms_per_forward"] == 1e3 * run.summary["latency_s"] / run.summary["forwards"]
    assert set(values({}).values()) == {None}


def test_a_band_is_written_with_both_ends_unless_they_read_the_same():
    assert [band(ends) for ends in ((1.3, 1.61), (0.484, 1.0), (0.99, 1.04), (1.01, 1.02))] == [
        "1.3x to 1.6x",
        "0.48x to 1.0x",
        "0.99x to 1.0x",
        "1.0x",
    ]
    assert cell("speedup", values({})) is None


def test_figures_are_whole():
    for figure in FIGURES.values():
        assert figure.unit and figure.meaning and figure.better in ("less", "more", "neither")
        assert figure.written in {*WRITTEN, IN_PARTS}
        assert not figure.instead or figure.instead in FIGURES
        assert figure.heading or not {"terminal", "page", "interval"} & set(figure.shown)
    assert all(figure.better != "neither" for table in ("front", "bare front") for figure in shown_in(table))


def test_the_readme_has_the_figures():
    assert figures_markdown() in (ROOT / "README.md").read_text(encoding="utf-8")
