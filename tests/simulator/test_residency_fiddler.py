"""fiddler against sets, and its break-even against the cost of one expert at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator import break_even
from simulator.break_even import NEVER, break_even_tokens, expert_seconds
from simulator.cost import CostModel
from simulator.policy import Placement
from simulator.presets import hardware_names, load_hardware, load_kernel
from simulator.registry import load_policy
from simulator.residency.fiddler import Fiddler
from simulator.streams.stream import merge_streams
from tests.made_up.tables import geometry, plain_forwards, stream_of
from tracer.errors import UserError

E = 6
rows = st.lists(st.permutations(range(E)).flatmap(lambda p: st.integers(0, 3).map(lambda k: p[:k])), max_size=5)
traces = st.lists(rows, min_size=1, max_size=10)
machines = st.fixed_dictionaries(
    {
        name: st.floats(1e6, 1e14)
        for name in (
            "gpu_bytes_per_s",
            "gpu_flops",
            "cpu_bytes_per_s",
            "cpu_flops",
            "h2d_bytes_per_s",
            "d2h_bytes_per_s",
        )
    }
    | {name: st.floats(0, 1e-3) for name in ("cpu_overhead_s", "copy_latency_s")}
)


def naive_fiddler(cells, budget, cpu_tokens_max, experts=E):
    """Per cell: experts that hit, experts on the GPU, experts copied in."""
    popular = dict.fromkeys(range(experts), 0)
    loads = []
    for cell in cells:
        load = {}
        for row in cell:
            for e in row:
                load[e] = load.get(e, 0) + 1
                popular[e] += 1
        loads.append(load)
    resident = set(sorted(popular, key=lambda e: (-popular[e], e))[:budget])
    answers = []
    for load in loads:
        hit = {e for e in load if e in resident}
        copied = {e for e, n in load.items() if e not in resident and n > cpu_tokens_max}
        answers.append((hit, hit | copied, len(copied), min(budget, experts) + bool(copied)))
    return answers


def of_run(run, policy):
    """The definition as the rule asks for it (tests/simulator/definitions.py)."""
    answers = naive_fiddler(run.cells, policy.budget, policy.cpu_tokens_max, run.geometry.num_experts)
    return [(hit, on_gpu, copied, copied, held) for hit, on_gpu, copied, held in answers]


NAIVE = {"fiddler:budget=3,cpu_tokens_max=1": of_run, "fiddler:budget=2,cpu_tokens_max=2": of_run}


def test_notes_say_when_it_is_static_and_what_it_holds_beside_its_budget():
    assert "as under static" in Fiddler(budget=2).notes[1]
    assert "beside its budget" in Fiddler(budget=2, cpu_tokens_max=3).notes[1]


def naive_costs(model, size, n):
    """Seconds of one expert of n tokens on the CPU, and copied in and on the GPU; the layer's floor is not its own."""
    kernel = replace(model.hardware.kernel, floor_s=0.0)
    model = replace(model, hardware=replace(model.hardware, kernel=kernel))
    one, none = np.ones(1, np.int64), np.zeros(1, np.int64)
    stream = replace(stream_of([[[0]]]), tokens=np.array([n], np.uint32))
    on_cpu = model.cell_seconds(stream, Placement(none > 0, none > 0, none, none, none, none), one * size)
    on_gpu = model.cell_seconds(stream, Placement(none > 0, one > 0, one, one, none, one), one * size)
    return on_cpu.sum(), on_gpu.sum()


def cost(machine, hidden=2048, inter=512):
    return CostModel(machine, hidden, inter, 1 << 30, 2)


@given(cells=traces, budget=st.integers(0, E), tokens=st.integers(0, 6), cut=st.integers(0, 10))
@settings(max_examples=80, deadline=None)
def test_placements_equal_sets(cells, budget, tokens, cut):
    policy, about = load_policy("residency", f"fiddler:budget={budget},cpu_tokens_max={tokens}"), geometry(E)
    streams = [stream_of(piece) for piece in (cells[:cut], cells[cut:])]
    state = policy.fit(iter(streams), about, 0)
    expected = iter(naive_fiddler(cells, budget, tokens))
    for stream in streams:
        placement, state = policy.place(stream, plain_forwards([[]] * len(stream.cell_forward)), about, state)
        assert not placement.copied_back.any()
        for c in range(len(stream.cell_forward)):
            cell = slice(stream.offsets[c], stream.offsets[c + 1])
            experts = stream.experts[cell]
            hit, on_gpu, copied, held = next(expected)
            assert set(experts[placement.hit[cell]].tolist()) == hit
            assert set(experts[placement.on_gpu[cell]].tolist()) == on_gpu
            assert (placement.promotions[c], placement.demotions[c], placement.resident[c]) == (copied, copied, held)


@given(values=machines, size=st.sampled_from([6291456, 1000]), hidden=st.sampled_from([1, 2048]))
@settings(max_examples=60, deadline=None)
def test_break_even_is_the_last_number_before_copying_wins(values, size, hidden):
    model = cost(replace(load_hardware("h100-pcie5"), **values), hidden)
    found = break_even_tokens(model, size)
    last = min(found, break_even.LAST)
    for n in {1, 2, 3, last // 2, last - 1, last} & set(range(1, last + 1)):
        on_cpu, copied = naive_costs(model, size, n)
        assert on_cpu < copied
    if found < NEVER:
        on_cpu, copied = naive_costs(model, size, found + 1)
        assert on_cpu >= copied


def test_break_even_of_the_presets_lies_between_a_token_and_a_prompt():
    for name in hardware_names():
        found = break_even_tokens(cost(load_hardware(name)), 6291456)
        # NVLink-C2C is as fast as the host's own memory: copying in wins from the first token on.
        unified = name in ("gh200", "m3-max", "m3-ultra")
        assert found < 64 if unified else 1 < found < 4096


@pytest.mark.parametrize("name", ["grouped_mm", "vllm_fused", "sglang"])
def test_an_expert_adds_what_it_takes_and_not_the_floor_of_its_layer(name):
    machine = load_hardware("h100-pcie5", {"kernel": name})
    on_cpu, on_gpu, copied = expert_seconds(cost(machine), 6291456, np.array([1, 700]))
    ideal = expert_seconds(cost(replace(machine, kernel=load_kernel("ideal"))), 6291456, np.array([1, 700]))
    kernel = machine.kernel
    assert on_gpu[0] == 6291456 / (kernel.bandwidth_efficiency * machine.gpu_bytes_per_s) + kernel.row_s
    assert (on_cpu.tolist(), copied.tolist()) == (ideal[0].tolist(), ideal[2].tolist())


def test_copying_may_always_win_and_never(monkeypatch):
    monkeypatch.setattr(break_even, "LAST", 1 << 14)
    machine = load_hardware("h100-pcie5")
    assert break_even_tokens(cost(replace(machine, cpu_flops=1.0)), 6291456) == 0
    never = replace(machine, gpu_flops=1.0, gpu_bytes_per_s=1.0)
    assert break_even_tokens(cost(never), 6291456) == NEVER


def test_the_machine_of_a_replay_gives_the_number_unless_it_is_given():
    model, about = cost(load_hardware("h100-pcie5")), geometry(E, layers=(1, 2), expert_bytes={1: 6291456, 2: 6291456})
    assert Fiddler(budget=2).priced(model, about) == Fiddler(budget=2, cpu_tokens_max=break_even_tokens(model, 6291456))
    assert Fiddler(budget=2, cpu_tokens_max=3).priced(model, about).cpu_tokens_max == 3
    with pytest.raises(UserError, match=r"experts of unequal bytes; give it cpu_tokens_max"):
        Fiddler(budget=2).priced(model, geometry(E, layers=(1, 2), expert_bytes={1: 6291456, 2: 100}))


def test_without_a_number_or_a_machine_every_miss_runs_on_the_cpu():
    cells = [[[0, 1], [1, 2]], [[3, 4], [0, 3]]]
    stream, about = stream_of(cells), geometry(E)
    policy = Fiddler(budget=2)
    placement, _ = policy.place(stream, plain_forwards([[]] * 2), about, policy.fit([stream], about, 0))
    assert placement.hit.tolist() == placement.on_gpu.tolist()
    assert placement.promotions.tolist() == [0, 0]
    assert placement.hit.any() and not placement.hit.all()


def test_a_negative_number_of_tokens_is_refused():
    with pytest.raises(UserError, match="cpu_tokens_max=-1 is no number of tokens"):
        Fiddler(budget=2, cpu_tokens_max=-1)


def test_without_a_look_at_the_run_it_takes_the_first_experts():
    assert Fiddler(budget=2, cpu_tokens_max=0).start(geometry(E), 0).tolist() == [True, True] + [False] * 4


def test_cells_need_not_be_of_every_forward():
    cells = merge_streams([stream_of([[[0, 1]], [[2]]], layers=[0, 0])])
    policy = Fiddler(budget=1, cpu_tokens_max=0)
    placement, _ = policy.place(cells, plain_forwards([[], []]), geometry(E), policy.start(geometry(E), 0))
    assert placement.promotions.tolist() == [1, 1]
