"""Hardware presets: every number has a source, parts combine, and what breaks a rule is refused."""

from __future__ import annotations

import tomllib

import pytest

from simulator.presets import (
    FOLDER,
    MEASURED,
    MEASUREMENTS,
    OPTIONAL,
    PARTS,
    VALUES,
    Kernel,
    find_hardware,
    hardware_names,
    hardware_text,
    list_hardware,
    list_parts,
    load_hardware,
    load_kernel,
    part_names,
)
from tracer.errors import UserError

MACHINES = {
    "a100-80gb",
    "a100-pcie4",
    "a6000",
    "b200",
    "gh200",
    "h100-card",
    "h100-pcie5",
    "h200",
    "l40s",
    "m3-max",
    "m3-ultra",
    "mi300x",
    "rtx-3090",
    "rtx-4060-laptop",
    "rtx-4080",
    "rtx-4090",
    "rtx-5090",
}
# Gigabytes, GB/s, BF16 TFLOPS without sparsity, GB/s of the bus each way: vendors' data sheets.
PUBLISHED = {
    "a100-40gb": (40, 1555, 312, 32),
    "a100-80gb": (80, 2039, 312, 32),
    "a6000": (48, 768, 154.85, 32),
    "b200": (180, 8000, 2250, 64),
    "gh200": (96, 4000, 990, 450),
    "h100-card": (80, 2000, 756.5, 64),
    "h100-sxm": (80, 3350, 989.4, 64),
    "h200": (141, 4800, 989.5, 64),
    "l40s": (48, 864, 362.05, 32),
    "m3-max": (128, 400, 14.13, 400),
    "m3-ultra": (512, 819, 28.26, 819),
    "mi300x": (192, 5300, 1307.4, 64),
    "rtx-3090": (24, 936, 71, 32),
    "rtx-4060-laptop": (8, 256, 29.1, 16),
    "rtx-4080": (16, 716.8, 97.5, 32),
    "rtx-4090": (24, 1008, 165.2, 32),
    "rtx-5090": (32, 1792, 209.5, 64),
}


def whole(**changes):
    """The text of a machine file that names no part, its values and sources changed by ``key=(value, source)``."""
    entries = {key: ("1.5", '"somewhere"') for key in VALUES} | changes
    return "".join(f"[{key}]\nvalue = {value}\nsource = {source}\n" for key, (value, source) in entries.items())


def written(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_machines_are_there():
    assert set(hardware_names()) == MACHINES
    assert [info.name for info in list_hardware()] == sorted(MACHINES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_gpus_say_what_was_published(name):
    found = {info.name: info.values for info in list_parts("gpu")}
    assert set(found) == set(PUBLISHED)
    memory, bandwidth, flops, bus = PUBLISHED[name]
    expected = (memory * 1e9, bandwidth * 1e9, flops * 1e12, bus * 1e9, bus * 1e9)
    keys = ("gpu_memory_bytes", "gpu_bytes_per_s", "gpu_flops", "h2d_bytes_per_s", "d2h_bytes_per_s")
    assert tuple(found[name][key] for key in keys) == pytest.approx(expected, rel=1e-12)


def test_every_number_of_every_machine_and_part_has_a_source():
    for info in [*list_hardware(), *(part for kind in PARTS for part in list_parts(kind))]:
        assert info.line and set(info.sources) == set(info.values)
        assert all(len(source) > 10 for source in info.sources.values())
        # Only what a profile writes says that it was measured on a machine.
        assert not any(MEASURED in source for source in info.sources.values())
    for info in list_hardware():
        assert set(info.values) | {"row_s"} == {*VALUES, *OPTIONAL}
    for kind, keys in PARTS.items():
        # Only some kernels have a row term.
        assert all(set(keys) - {"row_s"} == set(info.values) - {"row_s"} for info in list_parts(kind))


def test_every_part_belongs_to_a_machine_or_can_be_asked_for():
    for kind in PARTS:
        for name in part_names(kind):
            machine = load_hardware("h100-pcie5", {kind: name})
            assert machine.name == f"h100-pcie5:{kind}={name}" and machine.description.endswith(
                f"here with {kind}={name}"
            )


def test_one_is_found_by_name_or_kind():
    assert find_hardware("h200") == next(info for info in list_hardware() if info.name == "h200")
    assert find_hardware("gpu=h200") == next(info for info in list_parts("gpu") if info.name == "h200")
    assert (find_hardware("grace").kind, find_hardware("gh200").kind) == ("cpu", "machine")
    other = find_hardware("h200", {"gpu": "b200", "kernel": "sglang"})
    assert other.parts == {**find_hardware("h200").parts, "gpu": "b200", "kernel": "sglang"}
    assert (other.values["floor_s"], other.values["gpu_memory_bytes"]) == (278.96e-6, 180e9)
    for info in list_hardware():
        assert set(info.parts) == set(PARTS)
        assert all(part in part_names(kind) for kind, part in info.parts.items())
    for name, reason in (
        ("gpu=abacus", "There is no gpu part 'abacus'; there are a100"),
        ("abacus", "no hardware preset"),
    ):
        with pytest.raises(UserError, match=reason):
            find_hardware(name)


def test_the_slower_end_of_the_bus_counts():
    host = {info.name: info.values["h2d_bytes_per_s"] for info in list_parts("cpu")}
    card = {info.name: info.values["h2d_bytes_per_s"] for info in list_parts("gpu")}
    for cpu, of_host in host.items():
        for gpu, of_card in card.items():
            machine = load_hardware("h200", {"cpu": cpu, "gpu": gpu})
            assert machine.h2d_bytes_per_s == machine.d2h_bytes_per_s == min(of_host, of_card)
    assert "Xeon Platinum 8380" in load_hardware("h200", {"cpu": "xeon-8380"}).sources["h2d_bytes_per_s"]


def test_own_numbers_win_over_parts_and_asked_parts_over_both(tmp_path):
    own = 'gpu = "l40s"\ncpu = "xeon-8468"\ndram = "ddr5-4800x8"\n[gpu_flops]\nvalue = 7\nsource = "mine"\n'
    path = written(tmp_path, own)
    machine = load_hardware(path)
    assert (machine.gpu_flops, machine.sources["gpu_flops"]) == (7.0, "mine")
    assert (machine.gpu_bytes_per_s, machine.h2d_bytes_per_s) == (864e9, 32e9)
    assert (machine.nvme_bytes_per_s, machine.nvme_latency_s) == (None, None)
    other = load_hardware(path, {"gpu": "h200", "nvme": "nvme-gen5", "kernel": "loop"})
    assert (other.gpu_flops, other.h2d_bytes_per_s, other.nvme_bytes_per_s) == (989.5e12, 64e9, 14.7e9)
    assert other.kernel == load_kernel("loop") and "CUDA Graphs" in other.sources["overhead_s"]


def test_a_kernel_is_asked_for_or_named_or_its_gpu_s_or_the_one_of_all_others(tmp_path):
    data_centre = {"a100-40gb", "a100-80gb", "b200", "gh200", "h100-card", "h100-sxm", "h200", "l40s", "mi300x"}
    for gpu in part_names("gpu"):
        kernel = load_hardware("rtx-4090", {"gpu": gpu}).kernel
        assert kernel == load_kernel("vllm_fused" if gpu in data_centre else "grouped_mm")
    for name in hardware_names():
        machine = load_hardware(name)
        assert machine.kernel.name == ("vllm_fused" if machine.parts["gpu"] in data_centre else "grouped_mm")
    named = written(tmp_path, 'gpu = "h200"\ncpu = "grace"\ndram = "lpddr5x-grace"\nkernel = "sglang"\n')
    assert load_hardware(named, {"gpu": "l40s"}).kernel == load_kernel("sglang")
    assert load_hardware(named, {"kernel": "ideal"}).kernel == load_kernel("ideal")
    assert load_hardware(written(tmp_path, whole())).kernel == load_kernel("grouped_mm")
    own = {key: ("0.5", '"mine"') for key in ("floor_s", "bandwidth_efficiency", "overhead_s", "flops_efficiency")}
    path = written(tmp_path, whole(**own))
    assert load_hardware(path).kernel == Kernel("mine", 0.5, 0.5, 0.5, 0.5, 0.0, "the numbers of mine.toml")
    asked = load_hardware(path, {"kernel": "vllm_fused"})
    assert (asked.kernel, asked.sources["floor_s"]) == (
        load_kernel("vllm_fused"),
        find_hardware("vllm_fused").sources["floor_s"],
    )


def test_efficiencies_are_shares_but_for_what_was_published_beyond_the_peak():
    for info in list_parts("kernel"):
        shares = info.values["bandwidth_efficiency"], info.values["flops_efficiency"]
        if info.name == "sglang":
            assert "more than the card can read" in info.sources["bandwidth_efficiency"]
        else:
            assert max(shares) <= 1
    ideal = find_hardware("kernel=ideal")
    assert "a bound" in ideal.line and set(ideal.values.values()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("short", "name", "said"),
    [("h100", "h100-pcie5", "SXM"), ("a100", "a100-80gb", "80 GB"), ("4090", "rtx-4090", "4090")],
)
def test_what_people_call_a_machine_resolves(short, name, said):
    assert load_hardware(short) == load_hardware(name) and said in find_hardware(short).line
    assert load_hardware(short, {"kernel": "loop"}).name == f"{name}:kernel=loop"


@pytest.mark.parametrize("name", hardware_names())
def test_a_machine_is_a_file_to_start_from(name, tmp_path):
    path = tmp_path / f"{name}.toml"
    path.write_text(hardware_text(find_hardware(name)), encoding="utf-8")
    assert load_hardware(str(path)) == load_hardware(name)


def test_a_file_to_start_from_keeps_a_kernel_of_one_s_own_and_is_no_part(tmp_path):
    own = {key: ("0.25", '"mine \u00fc"') for key in OPTIONAL}
    path = written(tmp_path, whole(**own))
    machine = load_hardware(path)
    (tmp_path / "mine.toml").write_text(hardware_text(find_hardware(path)), encoding="utf-8")
    assert load_hardware(path) == machine
    with pytest.raises(UserError, match="gpu=h200 is a part and makes no hardware file; name a machine"):
        hardware_text(find_hardware("gpu=h200"))


def test_a_file_may_give_everything_itself(tmp_path):
    machine = load_hardware(
        written(tmp_path, 'description = "mine"\n' + whole() + "[measurements]\nanything = [1, 2]\n")
    )
    assert (machine.name, machine.description) == ("mine", "mine")
    assert all(getattr(machine, key) == 1.5 for key in VALUES)
    given = whole(**{key: ("2.5", '"there"') for key in OPTIONAL})
    machine = load_hardware(written(tmp_path, given))
    assert (machine.nvme_bytes_per_s, machine.kernel.floor_s, machine.kernel.row_s) == (2.5, 2.5, 2.5)


@pytest.mark.parametrize("key", (*VALUES, *OPTIONAL))
def test_a_number_without_a_source_does_not_load(tmp_path, key):
    rest = {other: ("1.5", '"there"') for other in OPTIONAL}
    for value, source, reason in (
        ("1.5", '" "', f"hardware file mine.toml: {key}.source must be a text that says where .*, not ' '"),
        ("1.5", "3", f"hardware file mine.toml: {key}.source must be a text that says where .*, not 3"),
        ("-1", '"x"', f"hardware file mine.toml: {key}.value must be a number .*0, not -1"),
        ("nan", '"x"', f"{key}.value must be a number .*0, not nan"),
        ("inf", '"x"', f"{key}.value must be a number .*0, not inf"),
        ("true", '"x"', f"{key}.value must be a number .*0, not True"),
        ('"1"', '"x"', f"{key}.value must be a number .*0, not '1'"),
    ):
        with pytest.raises(UserError, match=reason):
            load_hardware(written(tmp_path, whole(**(rest | {key: (value, source)}))))
    text = whole(**rest)
    entry = f"[{key}]\nvalue = 1.5\n"
    assert text.count(entry) == 1
    for broken, reason in (
        (text.replace(entry + "source", entry + "note"), f"{key}.source is missing: it must be a text that says where"),
        (text.replace(entry, f"[{key}]\n"), f"{key}.value is missing: it must be a number"),
        (text.replace(entry, f"[{MEASUREMENTS}]\n"), rf"has no {key}; add \[{key}\] with value and source, or a part"),
    )[: 2 if key == "row_s" else 3]:
        with pytest.raises(UserError, match=reason):
            load_hardware(written(tmp_path, broken))


def test_unknown_presets_and_broken_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no hardware preset 'abacus'; there are a100-80gb, a100-pcie4, a6000, b200"):
        load_hardware("abacus")
    with pytest.raises(UserError, match="no hardware preset"):
        load_hardware("../hardware/h100-pcie5")
    with pytest.raises(UserError, match="no hardware preset"):
        load_hardware("gpu/h200")
    with pytest.raises(UserError, match=r"no hardware file .*absent\.toml; check the path"):
        load_hardware(str(tmp_path / "absent.toml"))
    for text, reason in (
        ("value = ", "is not TOML"),
        (
            whole() + "[colour]\nvalue = 1\n",
            "mine.toml: it has an unknown entry colour; it takes gpu, .*flops_efficiency",
        ),
        (whole() + "[gpu_flop]\nvalue = 1\n", r"it has an unknown entry gpu_flop, did you mean gpu_flops\."),
        ("gpu = 3\n" + whole(), "mine.toml: gpu must be a text, not 3"),
        ("description = 3\n" + whole(), "mine.toml: description must be a text, not 3"),
        ('gpu = "abacus"\n' + whole(), "There is no gpu part 'abacus'; there are a100-40gb"),
        (
            'gpu = "l40s"\n',
            r"has no cpu_flops.*; add \[cpu_flops\] with value and source.*, or a part: cpu = NAME; and no cpu_bytes",
        ),
        (
            "gpu_flops = 3\n" + whole().replace("gpu_flops", "colour"),
            r"unknown entry colour; .*; gpu_flops must be a table \[gpu_flops\] with value and source, not 3\.",
        ),
    ):
        with pytest.raises(UserError, match=reason):
            load_hardware(written(tmp_path, text))
    with pytest.raises(UserError, match="A machine has no part 'wheels'; its parts are gpu, cpu, dram, nvme, kernel"):
        load_hardware("h200", {"wheels": "four"})
    with pytest.raises(UserError, match=r"There is no dram part '\.\./gpu/h200'"):
        load_hardware("h200", {"dram": "../gpu/h200"})


def test_all_faults_are_told_at_once(tmp_path):
    text = whole(gpu_flops=("0", '"x"'), cpu_flops=("1", '""'), h2d_bytes_per_s=('"fast"', "2"))
    with pytest.raises(UserError) as told:
        load_hardware(written(tmp_path, "colour = 1\n" + text))
    assert str(told.value).split(": ", 1)[0] == "The hardware file mine.toml"
    faults = str(told.value).split(": ", 1)[1].split("; ")
    assert faults[0] == "it has an unknown entry colour" and faults[1].startswith("it takes gpu, cpu")
    assert faults[2:] == [
        "gpu_flops.value must be a number above 0, not 0",
        "cpu_flops.source must be a text that says where the value comes from, not ''",
        "h2d_bytes_per_s.value must be a number above 0, not 'fast'",
        "h2d_bytes_per_s.source must be a text that says where the value comes from, not 2.",
    ]
    with pytest.raises(UserError, match=r"gpu_memory_bytes\.value .*; and 6 more\.$"):
        load_hardware(written(tmp_path, whole(**{key: ("-1", '"x"') for key in (*VALUES, *PARTS["nvme"])})))


def test_the_wheel_takes_every_file_that_is_no_source():
    root = FOLDER.parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = settings["package-data"]["*"]
    files = [p for name in ("tracer", "simulator", "analysis") for p in (root / name).rglob("*.*") if p.is_file()]
    data = [p for p in files if p.suffix != ".py" and "__pycache__" not in p.parts]
    assert {p.suffix for p in data} >= {".toml", ".html", ".css", ".js", ".jsonl", ".safetensors", ".json"}
    assert [p.name for p in data if not any(p.match(pattern) for pattern in patterns)] == []
