"""Profiles: what is measured is divided right, what is written loads again, and nothing is left behind."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from simulator import profile
from simulator.measuring import gpu as measure_gpu
from simulator.measuring import host as measure_host
from simulator.measuring.host import Limits
from simulator.presets import PARTS, load_hardware
from simulator.pricing import cost_model
from tests.made_up.tables import meta_of
from tracer.errors import UserError
from tracer.trace import RouterSpec

SMALL = Limits(buffer_bytes=1 << 24, disk_bytes=1 << 20, seconds=0.001, matrix=64)
HOST = ("cpu_bytes_per_s", "cpu_flops", "cpu_overhead_s")


@pytest.fixture
def clock(monkeypatch):
    """Everything takes 4 seconds, then 2, then 3."""

    def repeat(run, seconds):
        run()
        return [4.0, 2.0, 3.0]

    monkeypatch.setattr(measure_host, "repeat", repeat)
    monkeypatch.setattr(measure_gpu, "repeat", repeat)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    steps = []
    found = profile.write_profile(
        folder / "mine.toml", progress=lambda *step: steps.append(step), gpu="rtx-4090", limits=SMALL
    )
    return folder, found, steps


def test_what_is_written_loads_and_says_where_it_comes_from(measured):
    folder, found, steps = measured
    assert steps == [(done, 5) for done in range(6)]
    assert [p.name for p in folder.iterdir()] == ["mine.toml"]
    assert set(HOST) <= set(found["values"]) == set(found["sources"])
    machine = load_hardware(str(folder / "mine.toml"))
    for key, value in found["values"].items():
        assert getattr(machine, key) == value and machine.sources[key] == found["sources"][key]
        assert value > 0 or key == "cpu_overhead_s"
    today = datetime.date.today().isoformat()
    assert found["date"] <= today
    for key in HOST:
        start = f"measured on {found['cpu']}, {found['date']}, by moetrace profile: "
        assert found["sources"][key].startswith(start) and len(found["sources"][key]) > len(start)
    text = (folder / "mine.toml").read_text(encoding="utf-8")
    assert found["cpu"] in text and all(key in text for key in found["measurements"])
    if found["gpu"] is None:
        assert machine.gpu_bytes_per_s == 1008e9
        note = cost_model(machine, meta_of({1: RouterSpec(8, 2)}).model)[1]
        assert "roofline of mine's data-sheet and measured peaks" in note


def test_measurements_that_no_formula_uses_are_kept(measured):
    kept = measured[1]["measurements"]
    assert kept["cpu_expert_tokens"] == list(measure_host.TOKENS)
    seconds = kept["cpu_expert_seconds"]
    assert seconds == sorted(seconds) and seconds[0] > 0 and kept["memcpy_bytes_per_s"] > 0


def test_a_file_without_a_gpu_asks_for_one(measured, tmp_path):
    found = measured[1] | {"gpu": None, "values": {key: measured[1]["values"][key] for key in HOST}}
    path = tmp_path / "host.toml"
    path.write_text(profile.profile_text(found), encoding="utf-8")
    with pytest.raises(UserError, match=r"host\.toml has no gpu_memory_bytes, .*; add .* or a part: gpu = NAME"):
        load_hardware(str(path))
    assert load_hardware(str(path), {"gpu": "h200"}).gpu_bytes_per_s == 4.8e12


def test_a_gpu_is_measured_beside_the_host(monkeypatch, tmp_path):
    fake = types.SimpleNamespace(cuda=types.SimpleNamespace(get_device_name=lambda at: 'A "fast" card'))
    values = {key: 2.5 + at for at, key in enumerate(PARTS["gpu"])}
    monkeypatch.setattr(profile, "cuda_torch", lambda: fake)
    monkeypatch.setattr(profile, "gpu_speed", lambda torch, limits: values | {"gpu_overhead_s": 0.5})
    found = profile.write_profile(tmp_path / "mine.toml", limits=SMALL, gpu="l40s")
    machine = load_hardware(str(tmp_path / "mine.toml"))
    assert {key: getattr(machine, key) for key in values} == values
    assert all(machine.sources[key].startswith('measured on A "fast" card, ') for key in values)
    assert found["measurements"]["gpu_overhead_s"] == 0.5 and machine.kernel.name == "grouped_mm"
    assert found["gpu"] == 'A "fast" card' and 'beside A "fast" card' in machine.description


def test_existing_files_stay_and_bad_names_are_refused(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("kept")
    for broken, options, reason in (
        (path, {}, r"mine\.toml exists already; choose another name, or overwrite it with --force"),
        (tmp_path / "mine.json", {}, r"ends in \.toml and mine\.json does not; name it mine\.toml"),
        (tmp_path / "other.toml", {"gpu": "abacus"}, "There is no gpu part 'abacus'; there are a100-40gb"),
        (tmp_path / "absent" / "mine.toml", {}, "There is no folder .*absent to measure the drive in"),
    ):
        with pytest.raises(UserError, match=reason):
            profile.write_profile(broken, limits=SMALL, **options)
    assert path.read_text() == "kept"
    profile.write_profile(path, force=True, limits=SMALL)
    assert "by moetrace profile" in path.read_text(encoding="utf-8")


def test_speeds_are_bytes_and_operations_over_the_best_time(clock):
    held = min(SMALL.buffer_bytes, measure_host.free_memory() // 4) // 16 * 8
    assert measure_host.memory_speed(SMALL) == (held / 2, held / 2)
    assert measure_host.matrix_speed(SMALL) == 2 * 64**3 / 2
    assert measure_host.expert_seconds(SMALL) == dict.fromkeys(measure_host.TOKENS, 2.0)


def test_matrices_double_until_one_takes_long(monkeypatch):
    sizes = []

    def repeat(run, seconds):
        sizes.append(len(run.args[0]))
        return [sizes[-1] ** 3 * 1e-11, 9.0]

    monkeypatch.setattr(measure_host, "repeat", repeat)
    assert measure_host.matrix_speed(Limits(seconds=0.4, matrix=8192)) == pytest.approx(2e11)
    # 2048 takes 0.086 s, and 4096 would take eight times as long.
    assert sizes == [512, 1024, 2048]


def test_an_expert_of_fewer_tokens_is_never_slower(monkeypatch):
    times = iter([9.0, 3.0, 5.0, 4.0, 6.0, 6.0, 8.0, 7.0, 9.5])
    monkeypatch.setattr(measure_host, "repeat", lambda run, seconds: [99.0, next(times)])
    found = measure_host.expert_seconds(SMALL)
    assert list(found.values()) == [3.0, 3.0, 4.0, 4.0, 6.0, 6.0, 7.0, 7.0, 9.5]


def test_the_timed_work_is_the_work_it_stands_for():
    rng = np.random.default_rng(1)
    words = rng.integers(-(2**62), 2**62, 1001)
    assert measure_host._total(words) == np.sum(words)
    rows, gate, up, down = (rng.standard_normal(shape, np.float32) for shape in ((3, 8), (8, 4), (8, 4), (4, 8)))
    gated = (rows @ gate).astype(np.float64)
    expected = (gated / (1 + np.exp(-gated)) * (rows @ up)) @ down
    np.testing.assert_allclose(measure_host._expert(rows, gate, up, down), expected, rtol=1e-4, atol=1e-5)


def test_repeat_leaves_the_first_run_out_and_stops(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(measure_host.time, "perf_counter", lambda: next(ticks))
    runs = []
    assert measure_host.repeat(lambda: runs.append(1), 4.5) == [1] * 5
    assert len(runs) == 6
    assert measure_host.repeat(lambda: None, 0) == [1] * 3


def test_the_drive_is_left_out_where_it_cannot_be_read_directly(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    assert measure_host.disk_speed(tmp_path, SMALL) is None
    found = profile.profile_machine(folder=tmp_path, limits=SMALL)
    assert not set(PARTS["nvme"]) & set(found["values"])
    assert any("drive was not measured" in note for note in found["notes"])
    assert list(tmp_path.iterdir()) == []


def test_pieces_of_the_file_are_read_one_after_the_other(monkeypatch, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * 8192))
    asked = []

    def preadv(file, buffers, offset):
        asked.append((len(buffers[0]), offset))
        return len(buffers[0])

    monkeypatch.setattr(measure_host.os, "preadv", preadv)
    monkeypatch.setattr(measure_host, "repeat", lambda run, seconds: [run() and 2.0 for _ in range(5)])
    found = measure_host._read_speed(0, 4 * 8192, 8192, np.random.default_rng(0), 0.1)
    assert found == (8192 / 2, 2.0)
    assert asked[:5] == [(8192, at * 8192) for at in (0, 1, 2, 3, 0)]
    assert {size for size, _ in asked[5:]} == {4096} and all(at % 4096 == 0 and at < 32768 for _, at in asked[5:])


def test_a_busy_machine_is_told(monkeypatch, tmp_path):
    for load, told in ((None, False), (0.0, False), (100.0 * measure_host.threads(), True)):
        monkeypatch.setattr(profile, "load_average", lambda load=load: load)
        found = profile.profile_machine(folder=tmp_path, limits=SMALL)
        assert any("The machine was busy" in note for note in found["notes"]) == told
        assert ("The machine was busy" in profile.profile_text(found)) == told


def test_the_gpu_s_numbers_are_divided_right(clock):
    found = measure_gpu.gpu_speed(torch, SMALL, "cpu")
    assert tuple(found) == (
        "gpu_memory_bytes",
        "h2d_bytes_per_s",
        "d2h_bytes_per_s",
        "copy_latency_s",
        "gpu_bytes_per_s",
        "gpu_flops",
        "gpu_overhead_s",
    )
    assert set(found) == {*PARTS["gpu"], "gpu_overhead_s"}
    assert found["h2d_bytes_per_s"] == found["d2h_bytes_per_s"] == (1 << 24) / 2
    assert found["copy_latency_s"] == 3.0 / measure_gpu.LAUNCHES
    # The fewest that can take turns.
    experts = 2
    assert found["gpu_bytes_per_s"] == experts * measure_gpu.EXPERT_BYTES / 2
    assert found["gpu_flops"] == 2 * 64**3 / 3
    floor = max(measure_gpu.EXPERT_BYTES / found["gpu_bytes_per_s"], measure_gpu.EXPERT_FLOPS / found["gpu_flops"])
    assert found["gpu_overhead_s"] == max(0.0, 3.0 / experts - floor)


def test_torch_is_asked_for_only_where_it_is_installed(monkeypatch):
    torch_seen = measure_gpu.cuda_torch()
    assert (torch_seen is torch) == torch.cuda.is_available()
    monkeypatch.setattr(measure_gpu.importlib.util, "find_spec", lambda name: None)
    assert measure_gpu.cuda_torch() is None
    code = "import sys, simulator.profile; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True, capture_output=True)
