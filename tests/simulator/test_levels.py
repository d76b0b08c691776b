"""What a capture level says that it rules out is what the routing policies ask for."""

from __future__ import annotations

import pytest

from simulator.policy import ACTIVE, SCORES
from simulator.registry import load_policy, policy_names
from tracer.levels import RULED_OUT, level_sentence, row_bytes

# Parameters without a default.
SPECS = {"top_k": "top_k:k=2", "skip": "skip:beta=0.5"}


@pytest.mark.parametrize(("level", "lacks"), [("ids", {ACTIVE, SCORES}), ("active", {SCORES}), ("scores", set())])
def test_a_level_names_the_policies_it_rules_out(level, lacks):
    ruled_out = {
        name for name in policy_names("routing") if load_policy("routing", SPECS.get(name, name)).requires & lacks
    }
    assert set(RULED_OUT[level]) == ruled_out
    said = level_sentence(level, 1e6, 32)
    assert said.startswith(f"Level {level}: about 1 MB a forward of 32 rows")
    assert all(name in said for name in ruled_out) and ("rules out" in said) == bool(ruled_out)


def test_levels_grow():
    sizes = [row_bytes(level, 20, 256, 8) for level in ("ids", "active", "scores")]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2] / 10
