"""Two routers over shared experts: biases by kind of call, as meta.json has them."""

from __future__ import annotations

import numpy as np
import pytest

from simulator.replaying import replay
from tests.made_up.by_hand import EXPERTS, Handmade
from tracer.checking import check
from tracer.errors import UserError
from tracer.parquet import open_trace

PREFILL, DENOISE = [0.0] * EXPERTS, [0.125 * e for e in range(EXPERTS)]


def trace(path, bias):
    hand = Handmade()
    hand.meta["router"]["expert_bias"] = bias
    return hand.write(path)


def test_each_kind_has_its_own_bias(tmp_path):
    path = trace(tmp_path / "a.trace", {"prefill": {"1": PREFILL, "3": PREFILL}, "denoise": {"3": DENOISE}})
    assert check(path) == []
    meta = open_trace(path).meta
    assert meta.routers[1].expert_bias is None and meta.routers[3].expert_bias.tolist() == DENOISE
    assert meta.router_of("prefill", 1).expert_bias.tolist() == PREFILL
    # a kind that is not named goes through the router of denoise calls
    assert meta.router_of("commit", 3) is meta.routers[3]
    replay(open_trace(path), ["vanilla"], ["lru:budget=4"])
    with pytest.raises(UserError, match="calls of different kinds go through routers of their own"):
        replay(open_trace(path), ["dmoe"])


def test_one_bias_for_all_kinds(tmp_path):
    meta = open_trace(trace(tmp_path / "a.trace", {"3": DENOISE})).meta
    assert meta.kind_routers == {} and meta.router_of("prefill", 3) is meta.routers[3]
    np.testing.assert_array_equal(meta.routers[3].expert_bias, np.float32(DENOISE))


def test_a_bias_of_a_kind_is_held_to_the_model(tmp_path):
    (fault,) = check(trace(tmp_path / "a.trace", {"denoise": {"2": DENOISE}}))
    assert "router.expert_bias must be" in fault and "layer 2 is not" in fault
