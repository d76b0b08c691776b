"""Traces with little or nothing in them: every verb that looks at them says why, and none breaks."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import cli
from tests.analysis import replayed
from tests.analysis.test_report import Reader

FORWARD = {"forwards_kept": 1, "requests": 1, "kv_cache": False, "prompt": 1}
LITTLE = {
    "no call": ({"forwards_kept": 0}, "The trace has no denoise forwards."),
    "no denoise call": ({"forwards_kept": 1, "requests": 1}, "The trace has no denoise forwards."),
    "one forward": (FORWARD, "No block has two denoise forwards that route the same position."),
    "one forward of one row": ({**FORWARD, "block_length": 1}, "No denoise forward routes two positions of its block."),
    "one request": ({"requests": 1}, "Needs at least two requests or two datasets with routed rows."),
    "no tokens table": ({"tokens_kept": False}, "The trace has no tokens table"),
    "one forward, no tokens": (
        {**FORWARD, "tokens_kept": False},
        "No block has two denoise forwards with routed rows.",
    ),
    "no confidence": ({"confident": False}, "No masked row has a confidence and a final token."),
    "no row is routed": ({"routed": False}, "No row of the trace is routed in any MoE layer."),
    "one layer": ({"num_layers": 1}, "Needs routed rows of two adjacent MoE layers"),
}


@pytest.fixture(scope="module", params=LITTLE)
def little(request, tmp_path_factory):
    shape, reason = LITTLE[request.param]
    path = tmp_path_factory.mktemp("little") / "little.trace"
    replayed.stored(path, seed=2, **shape)
    return path, reason


def run(*arguments):
    """A verb's standard output; it must end well."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0 and result.exception is None, result.output
    return result.stdout


def test_consistency_gives_figures_or_reasons(little, tmp_path):
    path, reason = little
    document = json.loads(run("consistency", path, "--json"))
    empty = {name for name, columns in document["frames"].items() if not columns["n" if "n" in columns else "load"]}
    assert empty == set(document["frames"]) & set(document["reasons"])
    assert any(reason in told for told in document["reasons"].values())
    page = tmp_path / "charts.html"
    assert reason in run("consistency", path, "--out", page)
    assert reason in Reader(page.read_text(encoding="utf-8")).text


def test_reports_and_comparisons_are_written(little, tmp_path):
    path, reason = little
    page = tmp_path / "report.html"
    run("report", path, path, "--out", page)
    reader = Reader(page.read_text(encoding="utf-8"))
    assert reason in reader.text and "NaN" not in reader.text and "None" not in reader.text
    found = json.loads(run("diff", path, path, "--json"))
    assert [row for row in found["rows"] if row["difference"]] == []
    assert any(reason in note for note in found["notes"])
