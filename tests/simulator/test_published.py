"""Published tables that the presets and the cost model must agree with, each within the rounding it was printed with."""

from __future__ import annotations

import math

import numpy as np
import pytest

from simulator.budget import GIB
from simulator.cost import CostModel
from simulator.model_presets import load_model_spec
from simulator.policy import Placement
from simulator.presets import load_hardware
from simulator.pricing import priced_on
from simulator.residency.tide import Tide
from tests.made_up.tables import geometry, meta_of, stream_of
from tracer.trace import RouterSpec

# dMoE (arXiv 2605.30876), unique experts of a layer of LLaDA2.0-mini, block 32: MATH500, GSM8K, ARC-C, MMLU.
UNIQUE = {
    "vanilla": (70.0, 71.5, 65.9, 70.6),
    "des_vote": (36.9, 37.0, 36.8, 37.0),
    "dmoe 0.6": (14.1, 14.7, 15.0, 14.5),
    "dmoe 0.5": (11.4, 11.6, 11.9, 11.6),
}
# The same paper, least and most saving of expert memory in percent.
SAVED = (76.64, 79.84)
# The same paper, milliseconds a forward before and after, and the speed-up printed beside them.
END_TO_END = ((436, 263, 1.66), (1028, 905, 1.14), (611, 539, 1.14), (769, 619, 1.24))
# TEAM (arXiv 2602.08404): unique experts and tokens a forward, experts a token; vanilla and TEAM.
TEAM = {
    "HumanEval": ((53.34, 2.91, 18.33), (34.48, 5.07, 6.80)),
    "MBPP": ((49.59, 2.74, 18.10), (30.92, 4.56, 6.78)),
    "GSM8K": ((59.11, 3.16, 18.71), (36.20, 4.79, 7.56)),
    "Math-500": ((57.90, 3.74, 15.48), (36.31, 5.57, 6.52)),
}
TEAM_AVERAGE = ((54.99, 3.14, 17.66), (34.48, 5.00, 6.92))
# TIDE (arXiv 2605.20179): model, experts a layer on the GPU, GiB of them.
TIDE = (("llada2-mini", 128, 14.25), ("llada2-mini", 64, 7.1), ("llada2-flash", 64, 46.5), ("llada2-flash", 32, 23.3))


def printed(value, low, high, decimals):
    """Whether ``value`` is what some number from low to high prints as."""
    half = 0.5 * 10.0**-decimals
    return low - half - 1e-9 <= value <= high + half + 1e-9


def memory(unique):
    """dMoE's GiB of one layer and of all 19, by its formula: float32 experts, a layer rounded to 0.01 GiB."""
    model = load_model_spec("llada2-mini")
    layer = round(unique * model.expert_params * 4 / GIB, 2)
    return layer, layer * len(model.moe_layers)


@pytest.mark.parametrize(("name", "budget", "gib"), TIDE)
def test_tide_s_budgets_are_the_gibibytes_it_prints(name, budget, gib):
    model = load_model_spec(name)
    about = geometry(
        model.num_experts,
        layers=model.moe_layers,
        expert_bytes=dict.fromkeys(model.moe_layers, model.expert_bytes),
    )
    held = Tide(budget=budget).total_bytes(about) / GIB
    assert held == budget * len(model.moe_layers) * model.expert_bytes / GIB
    assert printed(gib, held, held, 2 if gib == 14.25 else 1)


@pytest.mark.parametrize("name", UNIQUE)
def test_dmoe_s_memory_is_its_formula_within_the_rounding_of_its_experts(name):
    for unique in UNIQUE[name]:
        layer, whole = memory(unique)
        exact = unique * 3 * 2048 * 512 * 4 / 2**30
        assert abs(layer - exact) <= 0.005 and whole == layer * 19
        # A tenth of an expert, as printed, moves a layer by at most one hundredth of a GiB.
        assert memory(unique + 0.05)[0] - memory(unique - 0.05)[0] <= 0.01 + 1e-12


def test_dmoe_saves_about_what_it_prints():
    saved = [
        100 * (1 - memory(after)[1] / memory(before)[1])
        for before, after in zip(UNIQUE["vanilla"], UNIQUE["dmoe 0.6"], strict=True)
    ]
    # The printed ends lie 0.02 and 0.08 points above what the printed experts give; the experts have no more digits.
    assert min(saved) == pytest.approx(SAVED[0], abs=0.1)
    assert max(saved) == pytest.approx(SAVED[1], abs=0.1)


def test_dmoe_s_speed_ups_are_ratios_of_its_milliseconds():
    for before, after, speedup in END_TO_END:
        assert printed(speedup, (before - 0.5) / (after + 0.5), (before + 0.5) / (after - 0.5), 2)


def test_sglang_s_line_is_what_the_cost_model_takes_for_a_layer():
    model = load_model_spec("llada2-mini")
    info = meta_of(
        {1: RouterSpec(model.num_experts, model.top_k)},
        expert_bytes={1: model.expert_bytes},
        hidden_size=model.hidden_size,
        moe_intermediate_size=model.moe_intermediate_size,
        dtype=model.dtype,
    ).model
    cost, note = priced_on("h100-pcie5:line=sglang", info)
    assert "dMoE (arXiv 2605.30876)" in note
    for unique in (1, 49, 70, 86):
        stream = stream_of([[[expert] for expert in range(unique)]])
        there, none = np.ones(unique, bool), np.zeros(1, np.int64)
        placement = Placement(there, there, none, none, none, none)
        seconds = cost.cell_seconds(stream, placement, np.array([model.expert_bytes]))[0]
        assert seconds.tolist() == pytest.approx([0, 0, (278.96 + 1.25 * unique) * 1e-6, 0], rel=1e-12)


def test_the_roofline_lies_below_sglang_s_line():
    """Peaks are never beaten: what was measured takes longer than the data sheet allows, on the fastest of the machines."""
    model = load_model_spec("llada2-mini")
    cost = CostModel(load_hardware("b200"), model.hidden_size, model.moe_intermediate_size, 1, 2)
    for unique in (49, 70, 86):
        stream = stream_of([[[expert] for expert in range(unique)]])
        there, none = np.ones(unique, bool), np.zeros(1, np.int64)
        seconds = cost.cell_seconds(
            stream, Placement(there, there, none, none, none, none), np.array([model.expert_bytes])
        )[0, 2]
        assert seconds < (278.96 + 1.25 * unique) * 1e-6


@pytest.mark.parametrize("name", TEAM)
def test_team_s_experts_a_token_are_the_ratio_of_its_columns(name):
    for experts, tokens, ratio in TEAM[name]:
        low, high = (experts - 0.005) / (tokens + 0.005), (experts + 0.005) / (tokens - 0.005)
        assert printed(ratio, low, high, 2)


def test_team_s_averages_are_means_of_its_rows():
    for at in (0, 1):
        for column in range(3):
            mean = math.fsum(TEAM[name][at][column] for name in TEAM) / len(TEAM)
            assert printed(TEAM_AVERAGE[at][column], mean - 0.005, mean + 0.005, 2)
