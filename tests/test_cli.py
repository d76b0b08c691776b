"""The command line as its users meet it: results on stdout, one sentence and exit 2 for what they can mend."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import polars as pl
import pytest
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

from analysis.tables import laid_out
from cli import app
from tests.tracer.test_import_bigmoe import rows, write
from tracer.checking import check
from tracer.parquet import open_trace

ROOT = Path(__file__).parent.parent


def run(*args):
    """Invoke the command line in this process."""
    return CliRunner().invoke(app, [str(a) for a in args])


def refused(*args):
    """Invoke, expect a user error, return its sentence."""
    result = run(*args)
    assert result.exit_code == 2, (result.output, result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("moetrace: ") and lines[0].endswith("."), result.stderr
    assert result.stdout == ""
    return lines[0]


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """A capture of one short prompt."""
    path = tmp_path_factory.mktemp("cli") / "demo.trace"
    result = run(
        "capture",
        "demo:llada2",
        "--out",
        path,
        "--prompt",
        "def main(",
        "--gen-length",
        32,
        "--level",
        "scores",
        "--json",
    )
    assert result.exit_code == 0, (result.output, result.exception)
    document = json.loads(result.stdout)
    assert document["requests"] == 1 and document["interrupted"] is False
    return path


def test_info_and_check(trace):
    facts = json.loads(run("info", trace, "--json").stdout)
    assert facts["model"]["id"] == "demo:llada2"
    assert run("info", trace).exit_code == 0
    assert json.loads(run("check", trace, "--json").stdout)["faults"] == []


def test_compact_files_are_smaller_and_hold_the_same(trace, tmp_path):
    small = tmp_path / "small.trace"
    options = ("--prompt", "def main(", "--gen-length", 32, "--level", "scores", "--compact")
    assert run("capture", "demo:llada2", "--out", small, *options).exit_code == 0
    assert json.loads(run("check", small, "--json").stdout)["faults"] == []
    sizes = [json.loads(run("info", path, "--json").stdout)["bytes_per_decision"] for path in (trace, small)]
    assert sizes[1]["ids_and_weights"] < 0.9 * sizes[0]["ids_and_weights"]
    cells = [open_trace(path).scan("routing").collect() for path in (trace, small)]
    keys = ["forward_id", "layer", "row", "expert_id"]
    assert cells[0].drop("slot").sort(keys).equals(cells[1].drop("slot").sort(keys))


def test_replay_json_and_parquet(trace, tmp_path):
    out = tmp_path / "result"
    result = run(
        "replay", trace, "--routing", "vanilla", "--routing", "dmoe:top_p=0.5", "--residency", "tide:budget=16",
        "--hardware", "h100-pcie5", "--out", out, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    document = json.loads(result.stdout)
    assert [run["routing"]["name"] for run in document["runs"]] == ["vanilla", "dmoe"]
    assert document["runs"][0]["estimate"] is False and document["runs"][1]["estimate"] is True
    cells = pl.read_parquet(out / "replay.parquet")
    assert set(cells["run"].unique()) == {0, 1}
    assert "written to" in run("replay", trace, "--out", tmp_path / "again").stdout
    assert "force" in refused("replay", trace, "--out", out)


def test_existing_trace_is_kept(trace):
    before = sorted((p.name, p.stat().st_mtime_ns) for p in trace.rglob("*"))
    assert "--force" in refused("capture", "demo:llada2", "--out", trace, "--prompt", "x")
    assert sorted((p.name, p.stat().st_mtime_ns) for p in trace.rglob("*")) == before


def test_resume_goes_on_with_the_same_command_only(tmp_path):
    path = tmp_path / "two.trace"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def one(\n")
    common = ["demo:sdar", "--out", path, "--threshold", 0.5, "--prompts", prompts]
    assert run("capture", *common, "--gen-length", 8).exit_code == 0
    before = open_trace(path).num_forwards
    assert "other options" in refused("capture", *common, "--gen-length", 9, "--resume")
    prompts.write_text("def one(\ndef two(\n")
    assert "other prompts" in refused("capture", *common, "--gen-length", 8, "--resume")
    prompts.write_text("def one(\n")
    assert run("capture", *common, "--gen-length", 8, "--resume").exit_code == 0
    assert check(path) == [] and open_trace(path).num_forwards == before


def test_a_team_capture_replays_as_it_ran(tmp_path):
    path, out = tmp_path / "team.trace", tmp_path / "result"
    options = ("--prompt", "def main(", "--gen-length", 40, "--block-length", 16, "--steps", 8, "--threshold", 0.6)
    made = run("capture", "demo:sdar", "--loop", "team", "--out", path, *options, "--level", "scores", "--json")
    assert made.exit_code == 0, (made.output, made.exception)
    assert json.loads(run("check", path, "--json").stdout)["faults"] == []
    trace = open_trace(path)
    decoding = trace.meta.decoding
    assert {
        "loop": "team",
        "block_length": 16,
        "steps": 8,
        "kv_cache": True,
        "hot_distance": 4,
    }.items() <= decoding.items()
    result = run("replay", path, "--routing", "vanilla", "--routing", "team", "--out", out, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    vanilla, team = json.loads(result.stdout)["runs"]
    assert vanilla["estimate"] is team["estimate"] is False and team["bounds"] is None
    figures = vanilla["summary"].keys() - {"gate_retained"}
    assert {name: team["summary"][name] for name in figures} == {name: vanilla["summary"][name] for name in figures}
    forwards = pl.read_parquet(out / "forwards.parquet").filter(pl.col("run") == 1).sort("forward_id")
    recorded = trace.scan("forwards").sort("forward_id").collect()
    assert forwards["forward_id"].to_list() == recorded["forward_id"].to_list()
    assert len(forwards) == json.loads(made.stdout)["forwards"]
    columns = ("num_tokens", "num_masked", "num_accepted", "branches")
    assert all(forwards[name].to_list() == recorded[name].to_list() for name in columns)
    assert forwards["chosen_branch"].to_list() == recorded["chosen_branch"].fill_null(-1).to_list()
    assert set(recorded["branches"]) == {1, 4} and recorded["chosen_branch"].max() > 0


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["capture", "demo:gpt", "--prompt", "x"], "demo:llada2"),
        (["capture", "no/such/folder", "--prompt", "x"], "no/such/folder"),
        (["capture", "demo:llada2"], "--prompt"),
        (["capture", "demo:llada2", "--prompt", " "], "empty"),
        (["capture", "demo:llada2", "--prompts", "missing.txt"], "missing.txt"),
        (["capture", "demo:llada2", "--prompt", "word " * 400], "192"),
        (["capture", "demo:llada2", "--prompt", "x", "--level", "all"], "active"),
        (["capture", "demo:llada2", "--prompt", "x", "--loop", "ar"], "sdar"),
        (["capture", "demo:llada2", "--prompt", "x", "--threshold", "1.5"], "between 0 and 1"),
        (["capture", "demo:llada2", "--prompt", "x", "--gen-length", "0"], "--gen-length"),
        (["capture", "demo:llada2", "--prompt", "x", "--temperature", "-1"], "--temperature"),
        (["capture", "demo:llada2", "--prompt", "x", "--dtype", "int8"], "bfloat16"),
        (["capture", "demo:llada2", "--prompt", "x", "--device", "nowhere"], "nowhere"),
        (["capture", "demo:sdar", "--prompt", "x", "--no-kv-cache"], "KV cache"),
        (["capture", "demo:sdar", "--prompt", "x", "--no-kv-cache", "--loop", "team"], "KV cache"),
        (["capture", "demo:sdar", "--prompt", "x", "--temperature", "1", "--loop", "team"], "--temperature"),
        (["capture", "demo:llada2", "--prompt", "x", "--loop", "team"], "demo:llada2 is not"),
        (["capture", "random:missing.json", "--prompt-tokens", "4"], "missing.json"),
        (["capture", "./LLaDA2.0-mini", "--prompt", "x"], "no model folder ./LLaDA2.0-mini"),
        (["capture", "../models/LLaDA2", "--prompt", "x"], "no model folder"),
        (["capture", "~/LLaDA2.0-mini", "--prompt", "x"], "no model folder"),
        (["capture", "models/config.json", "--prompt", "x"], "random:models/config.json"),
        (["capture", "demo:llada2", "--prompt", "x", "--mask-id", "-1"], "--mask-id"),
        (["capture", "demo:llada2", "--prompt", "x", "--adapter", "mine"], "module:function"),
        (["capture", "demo:llada2", "--prompt", "x", "--adapter", "no_such_module:read"], "no_such_module"),
        (["capture", "demo:llada2", "--prompt", "x", "--adapter", "json:read"], "no function read"),
    ],
)
def test_capture_refuses_in_a_sentence(args, says, tmp_path):
    out = tmp_path / "never.trace"
    assert says in refused(*args, "--out", out)
    assert not out.exists()


def test_capture_refuses_a_model_without_experts(tmp_path):
    config = tmp_path / "dense.json"
    config.write_text(
        json.dumps(
            {
                "model_type": "qwen3",
                "vocab_size": 64,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 8,
                "max_position_embeddings": 64,
            }
        )
    )
    out = tmp_path / "never.trace"
    sentence = refused("capture", f"random:{config}", "--prompt-tokens", 4, "--gen-length", 4, "--out", out)
    assert "MoE" in sentence or "router" in sentence
    assert not out.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_capture_refuses_an_unwritable_folder(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    assert "locked" in refused("capture", "demo:llada2", "--prompt", "x", "--out", folder / "a.trace")


def test_capture_refuses_a_folder_that_cannot_be_made(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert "file" in refused("capture", "demo:llada2", "--prompt", "x", "--out", blocked / "a.trace")
    assert blocked.read_text() == "in the way"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--routing", "magic"], "dmoe"),
        (["--routing", "dmoe:speed=9"], "top_p"),
        (["--routing", "dmoe:top_p=2"], "top_p"),
        (["--routing", "dmoe:top_p=much"], "top_p"),
        (["--residency", "magic"], "tide"),
        (["--residency", "tide:refresh_interval=0,budget=4"], "refresh_interval"),
        (["--residency", "lru:budget=-1"], "budget"),
        (["--hardware", "abacus"], "h100-pcie5"),
    ],
)
def test_replay_refuses_in_a_sentence(args, says, trace):
    assert says in refused("replay", trace, *args)


@pytest.mark.parametrize(
    ("args", "nearest"),
    [
        (["repaly"], "replay"),
        (["import", "bigmo", "a.csv", "--out", "a.trace"], "bigmoe"),
        (["models", "llada2-mni"], "llada2-mini"),
        (["hardware", "gpu=h20"], "h200"),
    ],
)
def test_the_nearest_known_name_is_told(args, nearest):
    assert f"did you mean {nearest}?" in refused(*args)


def test_the_nearest_known_policy_is_told(trace):
    assert "did you mean vanilla?" in refused("replay", trace, "--routing", "vanila")
    assert "did you mean tide?" in refused("sweep", trace, "--residency", "tid:budget=4", "--out", "never.parquet")
    assert "did you mean h100-pcie5?" in refused("replay", trace, "--hardware", "h100-pci5")
    assert "did you mean balanced?" in refused("parallel", trace, "--placement", "balance")


def test_completion_is_on_and_knows_the_verbs():
    environment = {"_MOETRACE_COMPLETE": "complete_bash", "COMP_WORDS": "moetrace re", "COMP_CWORD": "1"}
    result = CliRunner().invoke(app, [], prog_name="moetrace", env=environment)
    assert result.stdout.split() == ["replay", "report"], (result.output, result.exception)
    assert "--install-completion" in run("--help").stdout


def test_every_verb_stands_under_a_heading_of_the_help():
    listed = [line.split()[0] for line in run("--help").stdout.split("Record:")[1].splitlines() if line[:2] == "  "]
    assert sorted(listed) == sorted(get_command(app).commands)


def test_missing_trace(tmp_path):
    for verb in ("info", "check", "replay"):
        assert "nothing.trace" in refused(verb, tmp_path / "nothing.trace")
        assert "File name too long." in refused(verb, tmp_path / ("long" * 100))


def test_kill_during_a_capture_loses_the_open_segment_only(tmp_path):
    path = tmp_path / "killed.trace"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def one(a):\n" * 400)
    command = [
        sys.executable, "-m", "cli", "capture", "demo:llada2", "--out", path, "--prompts", prompts, "--level", "scores",
        "--no-kv-cache",
    ]  # fmt: skip
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while len(list(path.glob("forwards/part-*.parquet"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (fault,) = check(path)
    trace = open_trace(path)
    assert trace.meta.complete is False and fault == trace.unfinished
    parts = len(list(path.glob("forwards/part-*.parquet")))
    assert parts >= 2 and trace.num_forwards > 0
    document = json.loads(run("replay", path, "--residency", "lru:budget=16", "--json").stdout)
    assert fault in document["runs"][0]["notes"]


def test_ctrl_c_leaves_a_readable_trace(tmp_path):
    path = tmp_path / "stopped.trace"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def one(a):\n" * 400)
    command = [sys.executable, "-m", "cli", "capture", "demo:sdar", "--out", path, "--prompts", prompts, "--json"]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (path / "meta.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert json.loads(stdout)["interrupted"] is True
    assert b"Traceback" not in stderr
    (fault,) = check(path)
    assert "was not finished" in fault


def test_reading_works_without_torch(trace, tmp_path):
    blocker = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'safetensors', 'tokenizers'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import cli\n"
        "cli.app(sys.argv[1:])\n"
    )

    def without_torch(*args):
        return subprocess.run(
            [sys.executable, "-c", blocker, *map(str, args)], cwd=ROOT, capture_output=True, text=True, check=False
        )

    for args in (["info", trace], ["check", trace], ["replay", trace, "--residency", "tide:budget=8"]):
        result = without_torch(*args)
        assert result.returncode == 0, result.stderr
    result = without_torch("capture", "demo:llada2", "--prompt", "x", "--out", tmp_path / "a.trace")
    assert result.returncode == 2 and "moetrace[capture]" in result.stderr and "Traceback" not in result.stderr


def test_lists_name_parameters_and_sources():
    policies = json.loads(run("policies", "--json").stdout)
    assert {"axis", "name", "line", "parameters", "source"} == set(policies[0])
    assert all(policy["source"] for policy in policies)
    assert "2605.20179" in run("policies").stdout
    assert {("routing", "dmoe"), ("residency", "tide"), ("acceptance", "team")} <= {
        (p["axis"], p["name"]) for p in policies
    }
    for verb in ("models", "hardware"):
        found = json.loads(run(verb, "--json").stdout)
        assert found and all(item["sources"] for item in found)
        assert run(verb).exit_code == 0


def test_consistency_and_report(trace, tmp_path):
    document = json.loads(run("consistency", trace, "--json").stdout)
    assert "overlap" in document["frames"]
    assert "same position, next step" in run("consistency", trace).stdout
    result = tmp_path / "result"
    assert run("replay", trace, "--residency", "tide:budget=8", "--out", result).exit_code == 0
    page = tmp_path / "page.html"
    assert run("report", trace, result, "--out", page).exit_code == 0
    assert "demo:llada2" in page.read_text()
    assert "force" in refused("report", trace, result, "--out", page)


def test_diff(trace, tmp_path):
    assert "agree in all" in run("diff", trace, trace).stdout
    for name, budget in (("a", 8), ("b", 16)):
        assert run("replay", trace, "--residency", f"tide:budget={budget}", "--out", tmp_path / name).exit_code == 0
    rows = json.loads(run("diff", tmp_path / "a", tmp_path / "b", "--json").stdout)["rows"]
    assert rows[0]["difference"] > 0
    assert "a replay" in refused("diff", trace, tmp_path / "a")


def test_static_fitted_on_another_trace(trace):
    fitted = run("replay", trace, "--residency", "static:budget=8", "--fit", trace, "--json")
    own = run("replay", trace, "--residency", "static:budget=8", "--json")
    first, second = (json.loads(result.stdout)["runs"][0] for result in (fitted, own))
    assert first["summary"]["hit_rate"] == second["summary"]["hit_rate"]
    assert first["residency"]["parameters"]["fit_on"] == str(trace)
    assert any("best case" in note for note in second["notes"]) and not any("best case" in n for n in first["notes"])
    assert "--residency static" in refused("replay", trace, "--fit", trace)
    assert "nowhere" in refused("replay", trace, "--residency", "static:budget=8", "--fit", "nowhere.trace")


def test_parallel(trace):
    runs = json.loads(
        run("parallel", trace, "--gpus", 4, "--routing", "vanilla", "--routing", "dmoe", "--json").stdout
    )["runs"]
    assert [(r["routing"]["name"], r["gpus"]) for r in runs] == [("vanilla", 4)] * 3 + [("dmoe", 4)] * 3
    assert all(r["imbalance"] >= 1 and 0 < r["busy"] <= 1 for r in runs)
    assert "3 groups" in run("parallel", trace, "--gpus", 4).stdout
    assert "1 to 64" in refused("parallel", trace, "--gpus", 65)


def test_interval(trace, tmp_path):
    document = json.loads(run("interval", trace, "--budget", 16, "--json").stdout)
    assert document["regret"] >= 0 and document["best"] in [row["refresh_interval"] for row in document["intervals"]]
    assert "budget=0" in refused("interval", trace, "--budget", 0)
    page = tmp_path / "interval.html"
    assert str(page) in run("interval", trace, "--budget", 16, "--out", page).stdout
    assert "program chooses an interval of" in page.read_text()


def test_sweep_goes_on_where_it_stopped(trace, tmp_path):
    out = tmp_path / "results.parquet"
    first = json.loads(run("sweep", trace, "--residency", "tide:budget=8|16", "--out", out, "--json").stdout)
    assert first["runs"] == 2 and 1 <= len(first["pareto"]) <= 2
    assert "3 runs, 1 computed now" in run("sweep", trace, "--residency", "tide:budget=8|16|24", "--out", out).stdout
    assert "tide" in refused("sweep", trace, "--residency", "tide:budget=8..", "--out", out)


def test_import_of_an_unknown_format(tmp_path):
    assert "bigmoe" in refused("import", "csv", tmp_path / "a.csv", "--out", tmp_path / "a.trace")


def test_tables_fit_their_terminal_with_every_figure_whole(trace, tmp_path, monkeypatch):
    grid = ("--residency", "tide:budget=16,refresh_interval=2..4", "--hardware", "h100-pcie5")
    shown = []
    monkeypatch.setattr("analysis.tables.show", lambda sheet, *_: shown.append(sheet))
    for call in (
        ("interval", trace, "--budget", 16),
        (
            "replay",
            trace,
            "--residency",
            "tide:budget=16",
            "--hardware",
            "h100-pcie5",
            "--routing",
            "team:speculate=false",
        ),
        ("sweep", trace, *grid, "--routing", "dmoe:top_p=0.4|0.8", "--out", tmp_path / "results.parquet"),
        ("consistency", trace),
        ("parallel", trace, "--routing", "dmoe:top_p=0.4,min_experts=12"),
        ("policies",),
        ("models",),
        ("hardware",),
        ("info", trace),
    ):
        result = run(*call)
        assert result.exit_code == 0, (call, result.output, result.exception)
        assert shown
        for sheet in shown:
            for width in (80, 100, 140, None):
                table, wide, below = laid_out(sheet, width)
                assert width is None or wide <= width, (call, width, wide)
                console = Console(width=wide, file=StringIO(), record=True, highlight=False)
                console.print(table)
                text, left = console.export_text(), "\n".join(below)
                assert "…" not in text
                for index, column in enumerate(sheet.columns):
                    if not column.folds and f" {column.name}" not in left:
                        assert all(row[index] in text for row in sheet.rows), (call, width, column.name)
        shown.clear()


def test_a_narrow_pipe_has_narrow_tables(trace, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = run("interval", trace, "--budget", 16).stdout.splitlines()
    rows = [line for line in lines if line[:40].strip()[:1].isdigit()]
    assert rows and all(len(line) <= 80 for line in rows)
    assert any(line.startswith("Left out of 80 columns: ") and "--json has" in line for line in lines)
    monkeypatch.delenv("COLUMNS")
    assert "Left out" not in run("interval", trace, "--budget", 16).stdout


def test_hardware_lists_machines_and_parts_with_their_sources():
    found = json.loads(run("hardware", "--json").stdout)
    kinds = {(item["kind"], item["name"]) for item in found}
    assert {("machine", "h100-pcie5"), ("gpu", "h200"), ("cpu", "grace"), ("kernel", "sglang")} <= kinds
    assert {kind for kind, _ in kinds} == {"machine", "gpu", "cpu", "dram", "nvme", "kernel"}
    assert all(item["values"].keys() == item["sources"].keys() for item in found)
    machine = next(item for item in found if item["name"] == "h100-pcie5")
    parts = {"gpu": "h100-sxm", "cpu": "xeon-8468", "dram": "ddr5-4800x8", "nvme": "nvme-gen5", "kernel": "vllm_fused"}
    assert machine["parts"] == parts
    listed = run("hardware").stdout
    for item in found:
        shown = item["name"] if item["kind"] == "machine" else f"{item['kind']}={item['name']}"
        assert any(line.split()[:1] == [shown] for line in listed.splitlines())
    assert "278.96 us" in listed and "overlap=true" in listed and "host_gib=" in listed
    names = run("hardware", "--quiet").stdout.split()
    assert len(names) == len(found) and {"h200", "gpu=h200", "kernel=sglang"} <= set(names)


def test_one_machine_or_part_has_every_value_with_its_source():
    for name, key, amount in (
        ("h100-pcie5", "gpu_bytes_per_s", "3,350 GB/s"),
        ("h100-pcie5:gpu=h200,kernel=sglang", "floor_s", "278.96 us"),
        ("h100", "bandwidth_efficiency", "83 % of the peak"),
        ("gpu=rtx-4090", "gpu_memory_bytes", "24 GB"),
        ("xeon-8380", "cpu_flops", "5.888 TFLOP/s"),
        ("sglang", "floor_s", "278.96 us"),
        ("nvme-gen5", "nvme_latency_s", "45.5 us"),
    ):
        one = json.loads(run("hardware", name, "--json").stdout)
        title, *lines = run("hardware", name).stdout.splitlines()
        assert title.startswith(f"{one['name']}: " if one["kind"] == "machine" else f"{one['kind']}={one['name']}: ")
        row = next(line for line in lines if line.startswith(key))
        assert amount in row and one["sources"][key] in row
    # A name that a machine has is the machine's.
    assert json.loads(run("hardware", "rtx-4090", "--json").stdout)["kind"] == "machine"
    assert "h100-pcie5" in refused("hardware", "abacus") and "sglang" in refused("hardware", "kernel=abacus")
    for spec in ("line=sglang", "h100:line=1+2"):
        assert "give it a kernel, kernel=grouped_mm" in refused("hardware", spec)
    for verb in ("replay", "sweep", "interval"):
        told = " ".join(run(verb, "--help").stdout.split())
        assert all(
            word in told
            for word in ("gpu, cpu, dram, nvme, kernel", "overlap=true", "host_gib=GIB", "kernel=grouped_mm")
        )


def test_a_machine_prints_as_a_file_that_loads_again(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(run("hardware", "h100", "--toml").stdout, encoding="utf-8")
    mine, theirs = (json.loads(run("hardware", name, "--json").stdout) for name in (path, "h100-pcie5"))
    assert {**mine, "name": "h100-pcie5"} == theirs
    assert "name a machine" in refused("hardware", "gpu=h200", "--toml") and "name it" in refused("hardware", "--toml")


def test_one_model_has_every_value_with_its_source():
    one = json.loads(run("models", "llada2-mini", "--json").stdout)
    rows = run("models", "llada2-mini").stdout.splitlines()
    assert all(
        any(row.startswith(f"{key} ") and source in row for row in rows) for key, source in one["sources"].items()
    )
    listed = [item["name"] for item in json.loads(run("models", "--json").stdout)]
    assert run("models", "--quiet").stdout.split() == listed
    assert "llada2-mini" in refused("models", "gpt")


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    """An imported trace of one token at a time, without denoise forwards, and the file it came from."""
    folder = tmp_path_factory.mktemp("decoded")
    source = write(folder / "tiny.route.csv", rows())
    assert run("import", "bigmoe", source, "--out", folder / "tiny.trace").exit_code == 0
    return folder / "tiny.trace", source


def test_experts_a_layer_of_a_trace_that_denoises_nothing(decoded, trace, tmp_path):
    path, _ = decoded
    summary = json.loads(run("replay", path, "--json").stdout)["runs"][0]["summary"]
    assert summary["unique_experts"] is None and summary["unique_experts_all_forwards"] > 1
    head, row, footnote = run("replay", path).stdout.splitlines()[:3]
    at = re.search("experts/layer", head).end()
    assert row[:at].split()[-1] == f"{summary['unique_experts_all_forwards']:.2f}"
    assert footnote == "experts/layer: over forwards of every kind, as none of this trace denoises."
    assert "of every kind" not in run("replay", trace).stdout
    assert "unique_experts_all_forwards" in run("sweep", path, "--out", tmp_path / "a.parquet").stdout
    assert "unique_experts_all_forwards" not in run("sweep", trace, "--out", tmp_path / "b.parquet").stdout


def test_every_verb_takes_json_and_quiet():
    for name, command in get_command(app).commands.items():
        assert {"as_json", "quiet"} <= {option.name for option in command.params}, name


def test_quiet_leaves_one_line(decoded, trace, tmp_path):
    path, source = decoded
    broken = tmp_path / "broken.trace"
    shutil.copytree(path, broken)
    for part in broken.glob("requests/*.parquet"):
        frame = pl.read_parquet(part)
        frame.with_columns(pl.col("prompt_tokens") + 1, pl.lit("never").alias("stop_reason")).write_parquet(part)
    for call, code, says in (
        (("info", path), 0, "2 requests"),
        (("check", path), 0, "every requirement"),
        (("check", broken), 1, "fault"),
        (("diff", trace, path), 0, "differ in"),
        (("import", "bigmoe", source, "--out", tmp_path / "again.trace"), 0, "again.trace"),
        (("report", path, "--out", tmp_path / "page.html"), 0, "page.html"),
        (("hardware", "gpu=h200"), 0, "gpu=h200"),
        (("models", "llada2-mini"), 0, "llada2-mini"),
    ):
        result = run(*call, "--quiet")
        assert result.exit_code == code, (call, result.output, result.exception)
        assert len(result.stdout.splitlines()) == 1 and says in result.stdout, (call, result.stdout)
    listed = json.loads(run("policies", "--json").stdout)
    assert run("policies", "--quiet").stdout.splitlines() == [f"{one['axis']} {one['name']}" for one in listed]


def test_import_and_report_print_json(decoded, trace, tmp_path):
    path, source = decoded
    again = json.loads(run("import", "bigmoe", source, "--out", tmp_path / "again.trace", "--json").stdout)
    assert again == {"trace": str(tmp_path / "again.trace"), "decisions": len(rows())}
    page = tmp_path / "page.html"
    told = json.loads(run("report", path, "--out", page, "--json").stdout)
    assert told == {"report": str(page), "traces": 1, "replays": 0} and page.exists()


def test_sentences_speak_the_words_of_the_command_line(decoded, trace):
    path, source = decoded
    assert "needs a value for top_p" in refused("replay", trace, "--routing", "dmoe:top_p")
    assert "it takes none." in refused("replay", trace, "--routing", "vanilla:x=1")
    assert "colon and nothing" in refused("sweep", trace, "--routing", "dmoe:", "--out", path.parent / "never.parquet")
    sentence = refused("import", "bigmoe", source, "--out", path)
    assert "--force" in sentence and "append" not in sentence


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("width", [40, 80])
def test_a_terminal_is_never_written_beyond(width):
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
    command = [sys.executable, "-m", "cli", "models"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=theirs, stderr=subprocess.PIPE, env=environment)
    os.close(theirs)
    found = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:
            # How Linux says that the other end is closed.
            break
        if not piece:
            break
        found += piece
    os.close(ours)
    assert process.wait(60) == 0, process.stderr.read()
    text = re.sub(r"\x1b\[[0-9;]*m", "", found.decode()).replace("\r\n", "\n")
    table, _, below = text.partition("Left out of")
    assert "…" not in table and all(len(line) <= width for line in table.splitlines() if "moetrace" not in line)
    assert "llada2-mini" in table and " 256" in table
    assert ("expert_bytes" in below) == (width == 40) and ("6,291,456" in table) == (width == 80)
