"""The cost model against its formulas written out, and the specs that name a machine to price a run on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.cost import CostModel
from simulator.policy import Placement
from simulator.presets import BAND, Hardware, Kernel, load_hardware, load_kernel, part_names
from simulator.pricing import cost_model, hardware_options, kernel_band, priced_on
from tests.made_up.tables import forward_table, meta_of, stream_of
from tracer.errors import UserError
from tracer.schema import DENOISE
from tracer.trace import RouterSpec

MACHINE = Hardware(
    name="toy",
    description="",
    gpu_memory_bytes=1e9,
    gpu_bytes_per_s=1e9,
    gpu_flops=1e12,
    cpu_bytes_per_s=1e8,
    cpu_flops=1e10,
    cpu_overhead_s=2e-6,
    h2d_bytes_per_s=5e7,
    d2h_bytes_per_s=4e7,
    copy_latency_s=3e-6,
    kernel=Kernel("toy", floor_s=7e-6, bandwidth_efficiency=0.7, overhead_s=1e-6, flops_efficiency=0.6, row_s=3e-9),
    sources={},
)
HIDDEN, INTER, DENSE, WIDTH = 64, 32, 1 << 20, 2


def naive_layer(machine, tokens, size, hidden=HIDDEN, inter=INTER):
    """Seconds of a layer's experts on the GPU, one after the other: a floor where there is any, and what each adds.

    ``tokens`` are the rows of each expert that runs there, ``size`` bytes of one.
    """
    kernel, total = machine.kernel, 0.0
    for n in tokens:
        read = size / (kernel.bandwidth_efficiency * machine.gpu_bytes_per_s)
        compute = 6.0 * hidden * inter / (kernel.flops_efficiency * machine.gpu_flops) * n
        total += max(read, compute) + kernel.overhead_s + kernel.row_s * n
    return total + kernel.floor_s if tokens else 0.0


def naive_seconds(tokens, on_gpu, promotions, copied_back, size):
    """One cell by the formulas of the docstring: to_gpu, to_host, gpu_experts, cpu_experts."""
    m = MACHINE

    def c(n):
        compute = max(size / m.cpu_bytes_per_s, 6 * HIDDEN * INTER * n / m.cpu_flops) + m.cpu_overhead_s
        there = m.copy_latency_s + WIDTH * HIDDEN * n / m.d2h_bytes_per_s
        back = m.copy_latency_s + WIDTH * HIDDEN * n / m.h2d_bytes_per_s
        return compute + there + back

    return [
        promotions * (m.copy_latency_s + size / m.h2d_bytes_per_s),
        copied_back * (m.copy_latency_s + size / m.d2h_bytes_per_s),
        naive_layer(m, [n for n, there in zip(tokens, on_gpu, strict=True) if there], size),
        sum(c(n) for n, there in zip(tokens, on_gpu, strict=True) if not there),
    ]


def test_cells_follow_the_formulas():
    cells = [[[0, 1]] * 3 + [[1, 2]] * 900, [], [[3]]]
    stream = stream_of(cells)
    on_gpu = np.array([True, False, True, False])
    counts = [np.array(c) for c in ([2, 0, 1], [1, 0, 1], [1, 0, 0], [2, 2, 2])]
    placement = Placement(on_gpu, on_gpu, *counts)
    size = np.array([6000, 6000, 9000])
    found = CostModel(MACHINE, HIDDEN, INTER, DENSE, WIDTH).cell_seconds(stream, placement, size)
    for c in range(3):
        inside = slice(stream.offsets[c], stream.offsets[c + 1])
        tokens = stream.tokens[inside].tolist()
        expected = naive_seconds(tokens, on_gpu[inside], counts[0][c], counts[2][c], int(size[c]))
        assert found[c] == pytest.approx(expected, rel=1e-12)


def test_layers_add_up_serially_or_side_by_side():
    seconds = np.array([[1.0, 2.0, 4.0, 8.0], [0.0, 0.0, 9.0, 3.0]])
    serial = CostModel(MACHINE, HIDDEN, INTER, DENSE, WIDTH)
    assert serial.layer_seconds(seconds).tolist() == [15.0, 12.0]
    assert dataclasses.replace(serial, overlap=True).layer_seconds(seconds).tolist() == [11.0, 9.0]


def test_dense_weights_are_read_once_or_computed():
    model = CostModel(MACHINE, HIDDEN, INTER, DENSE, WIDTH)
    calls = forward_table([[(0, DENOISE, 0, 0, rows, 0, 0)] for rows in (1, 10**6)])
    few, many = model.dense_seconds(calls).tolist()
    assert few == DENSE / MACHINE.gpu_bytes_per_s
    assert many == pytest.approx(2 * (DENSE / WIDTH) * 10**6 / MACHINE.gpu_flops, rel=1e-12)


@given(
    calls=st.lists(
        st.lists(st.tuples(st.integers(1, 9), st.integers(0, 10**6), st.integers(1, 4)), min_size=1, max_size=3),
        max_size=4,
    )
)
@settings(max_examples=80, deadline=None)
def test_attention_reads_what_is_cached_or_computes_every_pair(calls):
    layers, heads, kv_heads, head_dim = 3, 8, 2, 16
    about = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    info = meta_of({layer: RouterSpec(8, 2) for layer in range(layers)}, **about).model
    cost, note = cost_model(MACHINE, info)
    without, other_note = cost_model(MACHINE, dataclasses.replace(info, num_kv_heads=None))
    assert "Attention is left out" in other_note and "ttention" not in note
    parts = [part for call in calls for part in call]
    table = forward_table(
        [[(r, DENOISE, 0, 0, rows * n, 0, 0) for r, (rows, _, n) in enumerate(call)] for call in calls]
    )
    table = dataclasses.replace(
        table,
        kv_tokens=np.array([cached for _, cached, _ in parts], np.int64),
        branches=np.array([n for *_, n in parts], np.uint8),
    )
    expected = []
    for call in calls:
        read = sum(layers * 2 * kv_heads * head_dim * WIDTH * cached for _, cached, _ in call)
        # Every row of every branch with every token it sees: one product for its score, one for its value.
        pairs = sum(n * rows * (cached + rows) for rows, cached, n in call)
        expected.append(max(read / MACHINE.gpu_bytes_per_s, layers * 4 * heads * head_dim * pairs / MACHINE.gpu_flops))
    found = cost.dense_seconds(table) - without.dense_seconds(table)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


def test_a_trace_that_does_not_know_its_model_has_no_latency():
    specs = {1: RouterSpec(8, 2)}
    model, note = cost_model(MACHINE, meta_of(specs).model)
    assert (model.hidden_size, model.weight_bytes, model.overlap) == (64, 2, False)
    assert "estimates" in note and "toy" in note
    for missing in ("hidden_size", "moe_intermediate_size", "dense_bytes", "dtype"):
        model, note = cost_model(MACHINE, meta_of(specs, **{missing: None}).model)
        assert model is None and missing in note


@given(
    cells=st.lists(st.lists(st.tuples(st.integers(1, 5000), st.booleans()), max_size=9), max_size=5),
    kernel=st.builds(
        Kernel,
        st.just("any"),
        floor_s=st.floats(0, 1e-3),
        bandwidth_efficiency=st.floats(0.01, 2),
        overhead_s=st.floats(0, 1e-4),
        flops_efficiency=st.floats(0.01, 1),
        row_s=st.floats(0, 1e-6),
    ),
    size=st.integers(1, 10**8),
)
@settings(max_examples=120, deadline=None)
def test_a_layer_on_the_gpu_takes_what_its_kernel_says_to_the_bit(cells, kernel, size):
    machine = dataclasses.replace(MACHINE, kernel=kernel)
    stream = stream_of([[[e] for e in range(len(cell))] for cell in cells])
    entries = [entry for cell in cells for entry in cell]
    stream = dataclasses.replace(stream, tokens=np.array([n for n, _ in entries], np.uint32))
    on_gpu, none = np.array([there for _, there in entries], bool), np.zeros(len(cells), np.int64)
    placement = Placement(on_gpu, on_gpu, none, none, none, none)
    cost = CostModel(machine, HIDDEN, INTER, DENSE, WIDTH)
    seconds = cost.cell_seconds(stream, placement, np.full(len(cells), size))
    expected = [naive_layer(machine, [n for n, there in cell if there], size) for cell in cells]
    assert seconds[:, 2].tolist() == expected
    # The kernel is the GPU's alone.
    ideal = CostModel(dataclasses.replace(MACHINE, kernel=load_kernel("ideal")), HIDDEN, INTER, DENSE, WIDTH)
    assert (seconds[:, 3] == ideal.cell_seconds(stream, placement, np.full(len(cells), size))[:, 3]).all()


@pytest.mark.parametrize("name", part_names("kernel"))
def test_without_an_expert_on_the_gpu_no_kernel_takes_time(name):
    machine = dataclasses.replace(MACHINE, kernel=load_kernel(name))
    stream, nowhere, none = stream_of([[[0]], []]), np.zeros(1, bool), np.zeros(2, np.int64)
    placement = Placement(nowhere, nowhere, none, none, none, none)
    seconds = CostModel(machine, HIDDEN, INTER, DENSE, WIDTH).cell_seconds(stream, placement, np.full(2, 6000))
    assert seconds[:, 2].tolist() == [0.0, 0.0]


@given(
    tokens=st.lists(st.tuples(st.integers(1, 50), st.booleans()), max_size=6),
    promotions=st.integers(0, 4),
    share=st.sampled_from([0.0, 0.25, 1.0]),
)
@settings(max_examples=80, deadline=None)
def test_experts_outside_the_host_are_read_from_nvme(tokens, promotions, share):
    machine = dataclasses.replace(MACHINE, nvme_bytes_per_s=1e6, nvme_latency_s=5e-3)
    stream = dataclasses.replace(
        stream_of([[[e] for e in range(len(tokens))]]), tokens=np.array([n for n, _ in tokens], np.uint32)
    )
    on_gpu, size = np.array([there for _, there in tokens], bool), 6000
    one = [np.array([n]) for n in (promotions, 0, 1, 1)]
    cost = CostModel(machine, HIDDEN, INTER, DENSE, WIDTH, host_share=share)
    found = cost.cell_seconds(stream, Placement(on_gpu, on_gpu, *one), np.array([size]))[0]
    expected = naive_seconds([n for n, _ in tokens], on_gpu, promotions, 1, size)
    read = (1 - share) * (5e-3 + size / 1e6)
    expected[0] += promotions * read
    expected[3] += sum(read for _, there in tokens if not there)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_host_gib_is_the_share_of_all_routed_experts():
    machine = dataclasses.replace(MACHINE, nvme_bytes_per_s=1e6, nvme_latency_s=5e-3)
    # Layers of 2 and 3 GiB.
    info = meta_of({1: RouterSpec(8, 2), 2: RouterSpec(8, 2)}, expert_bytes={1: 1 << 28, 2: 3 << 27}).model
    for host_gib, share in ((None, 1.0), (0, 0.0), (2, 0.4), (5, 1.0), (64, 1.0)):
        cost, note = cost_model(machine, info, host_gib=host_gib)
        assert cost.host_share == share
        assert ("NVMe" in note) == (share < 1) and ("All routed experts fit" in note) == (host_gib in (5, 64))
    assert "40.0% of the routed experts are in 2 GiB" in cost_model(machine, info, host_gib=2)[1]
    with pytest.raises(UserError, match=r"host_gib needs a drive to read from and toy has none; add nvme=nvme-gen4"):
        cost_model(MACHINE, info, host_gib=2)
    for broken in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="is no amount of memory"):
            cost_model(machine, info, host_gib=broken)


def test_a_spec_names_a_machine_its_parts_and_how_it_is_priced():
    info = meta_of({1: RouterSpec(8, 2)}, expert_bytes={1: 1 << 28}).model
    plain, _ = priced_on("h100-pcie5", info)
    assert plain == cost_model(load_hardware("h100-pcie5"), info)[0]
    cost, note = priced_on("h100-pcie5:overlap=true, host_gib=0.5,gpu=l40s,kernel=sglang", info)
    assert (cost.overlap, cost.host_share, cost.hardware.gpu_bytes_per_s) == (True, 0.25, 864e9)
    assert cost.hardware.kernel == load_kernel("sglang")
    assert "side by side" in note and "the kernel sglang" in note and "49 to 86 experts" in note and "25.0%" in note
    assert priced_on("h100-pcie5:overlap=true", info)[0] == dataclasses.replace(plain, overlap=True)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (
            "h100-pcie5:speed=3",
            r"hardware h100-pcie5 has no parameter 'speed=3'; its parameters are cpu, dram, gpu",
        ),
        ("h100-pcie5:overlap", "needs a value for overlap"),
        ("h100-pcie5:overlap=", "needs a value for overlap"),
        ("h100-pcie5:overlap=yes", "overlap=yes is neither true nor false"),
        ("h100-pcie5:overlap=true,overlap=true", "is given overlap twice"),
        ("h100-pcie5:host_gib=much", "host_gib=much is no amount of memory"),
        ("h100-pcie5:host_gib=-1", r"host_gib=-1\.0 is no amount of memory"),
        ("h100-pcie5:gpu=abacus", "There is no gpu part 'abacus'; there are a100-40gb"),
        ("h100-pcie5:kernel=fast", "There is no kernel part 'fast'; there are grouped_mm"),
        (
            "h100-pcie5:line=sglang",
            "^A machine has no line any more; give it a kernel, kernel=grouped_mm, [^.]*kernel=sglang",
        ),
        ("h100-pcie5:overlap=true, line=1+2", "give it a kernel, kernel=grouped_mm"),
        ("abacus:overlap=true", "There is no hardware preset 'abacus'"),
    ],
)
def test_specs_that_do_not_load_say_what_to_give(spec, reason):
    with pytest.raises(UserError, match=reason):
        priced_on(spec, meta_of({1: RouterSpec(8, 2)}).model)


def test_what_a_note_says_of_the_kernel():
    info = meta_of({1: RouterSpec(8, 2)}).model
    for spec, kernel, stands_in in (
        ("h100-pcie5", "vllm_fused", False),
        ("h100-pcie5:kernel=grouped_mm", "grouped_mm", False),
        ("rtx-4090", "grouped_mm", True),
        ("mi300x", "vllm_fused", True),
        ("rtx-4090:kernel=loop", "loop", False),
        ("h200:kernel=ideal", "ideal", False),
    ):
        note = priced_on(spec, info)[1]
        assert f"run in the kernel {kernel}: {load_kernel(kernel).description}" in note
        assert ("those of h100-sxm and stand in here" in note) == stands_in
    assert "a bound that no kernel reaches" in priced_on("h100:kernel=ideal", info)[1]
    short, note = priced_on("h100", info)
    assert short == priced_on("h100-pcie5", info)[0] and note.startswith("h100 is h100-pcie5: NVIDIA H100 SXM 80 GB")


def test_a_band_is_the_same_machine_with_two_kernels():
    cost, _ = priced_on("rtx-4090:kernel=loop,host_gib=1", meta_of({1: RouterSpec(8, 2)}).model)
    band = kernel_band(cost)
    assert [one.hardware.kernel for one in band] == [load_kernel(name) for name in BAND]
    assert all(dataclasses.replace(one, hardware=cost.hardware) == cost for one in band)


def test_paths_may_hold_colons_and_options_follow_their_ending():
    assert hardware_options("C:/x/my.toml") == ("C:/x/my.toml", {})
    assert hardware_options("C:/x/my.toml:overlap=true") == ("C:/x/my.toml", {"overlap": "true"})
    assert hardware_options("C:/x/my.toml:") == ("C:/x/my.toml", {})
