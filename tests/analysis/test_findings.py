"""The report's opening sentences, where a run must not be called the best."""

from __future__ import annotations

import copy

from analysis.findings import replay_findings
from simulator.replaying import replay
from tests.made_up.runs import random_trace


def test_a_run_over_its_budget_is_never_called_the_best():
    specs = ["all_resident", "lru:budget=1,hold=batch", "static:budget=1"]
    document = replay(random_trace(1), residency=specs, hardware="h100-pcie5").to_json()
    assert [run["over_budget"] for run in document["runs"]] == [False, True, False]
    said = " ".join(replay_findings(document))
    assert "static" in said and "lru" not in said
    within = copy.deepcopy(document)
    within["runs"][1]["over_budget"] = False
    assert "lru" in " ".join(replay_findings(within))
