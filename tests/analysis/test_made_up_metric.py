"""A metric is one file: one that is put beside the others is measured, told and drawn without another line anywhere."""

from __future__ import annotations

import sys

import pytest

import analysis.metrics as metrics
from analysis.findings_consistency import consistency_findings
from analysis.metrics import Settings, consistency
from analysis.reporting import render
from tests.analysis import replayed
from tests.analysis.test_report import Reader
from tests.made_up.runs import decoded_trace
from tracer.errors import UserError

SOURCE = '''
import numpy as np

from analysis.curves import Beside
from analysis.metrics.shared.frames import with_total
from analysis.metrics.shared.metric import LayerColumn, Metric
from analysis.metrics.shared.settings import UNITS, VALUE, VERDICT, columns

NULLS = {"independent": "a coin"}


class Even(Metric):
    """Share of decisions that pick an even expert."""

    name, place = "even", 75
    columns = columns("metric", "layer", *VALUE, "null_independent", *VERDICT)
    nulls = NULLS
    headline = {"even experts": {"metric": "even"}}
    by_layer = (LayerColumn("even", "percent", "experts of an even number", {"metric": "even"}),)
    charts = (Beside(title="Even experts", subtitle="A share.", at="layer", x="layer", y="share", noun="layer", nulls=NULLS),)

    def __init__(self, study, scope):
        super().__init__(study, scope)
        self.even, self.all = (np.zeros((UNITS, len(self.shape.layers)), np.int64) for _ in range(2))

    def layer(self, view):
        loads = view.loads(self.scope)
        np.add.at(self.even[:, view.index], view.times.unit, loads[:, ::2].sum(axis=1))
        np.add.at(self.all[:, view.index], view.times.unit, loads.sum(axis=1))

    def frame(self, bootstrap):
        values = bootstrap.columns(with_total(self.even, 1), with_total(self.all, 1))
        return self.tidy(({"metric": ["even"], "layer": self.shape.labels}, values | {"null_independent": np.array(0.5)}))

    @staticmethod
    def findings(result, rows):
        return [f"Even experts take {rows['even experts']['value']:.3f}."] if "even experts" in rows else []
'''


@pytest.fixture
def even(tmp_path, monkeypatch):
    (tmp_path / "even_experts.py").write_text(SOURCE)
    monkeypatch.setattr(metrics, "__path__", [*metrics.__path__, str(tmp_path)])
    yield
    sys.modules.pop("analysis.metrics.even_experts", None)
    vars(metrics).pop("even_experts", None)


def test_a_file_is_a_metric(even):
    names = list(metrics.SCHEMAS)
    assert names[names.index("spatial") + 1] == "even" and "even" in dir(metrics)
    trace = decoded_trace(0, requests=3, blocks=3)
    result = consistency(trace, settings=Settings(replicates=20))
    assert list(result.frames) == names and result.reasons == {}
    load = result.frames["load"]
    share = load.filter(load["expert"] % 2 == 0)["load"].sum() / load["load"].sum()
    row = next(row for row in result.headline() if row["frame"] == "even")
    assert (row["figure"], row["value"], row["null"], row["null_name"]) == ("even experts", share, 0.5, "independent")
    assert "even" in result.to_json()["frames"]
    assert metrics.even(trace, replicates=20).equals(result.frames["even"])
    assert metrics.even.__doc__ == "Share of decisions that pick an even expert."
    sentence = f"Even experts take {share:.3f}."
    assert sentence in consistency_findings(result)
    text = Reader(render([replayed.trace(consistency=result)], [])).text
    for said in (sentence, "even experts", "a coin", "Even experts A share."):
        assert said in text


def test_without_the_file_there_is_none():
    assert "even" not in metrics.SCHEMAS
    with pytest.raises(AttributeError, match="no attribute 'even'"):
        _ = metrics.even
    with pytest.raises(UserError, match="no consistency figure 'even'"):
        consistency(decoded_trace(0), only=("even",))
