"""Kills, full disks and second runs: what was committed stays, leftovers go, nothing foreign is touched."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.tracer.recorded import record
from tracer.check import check
from tracer.errors import UserError
from tracer.parquet import TraceWriter, open_trace

ROOT = Path(__file__).parent.parent.parent

# writes calls for ever, saying after each one how many have been handed over
ENDLESS = """
import sys
import numpy as np
from tests.tracer.recorded import record
from tracer.parquet import TraceWriter

rng = np.random.default_rng(0)
recorded = record(rng, level="scores", layers=range(1, 5))
writer = TraceWriter(sys.argv[1], recorded.meta, append=True, segment_forwards=3)
first = writer.next_request
while True:
    again = record(rng, level="scores", layers=range(1, 5))
    for number, (parts, tokens, routing) in enumerate(again.calls):
        for part in parts:
            part["request_id"] += first
        print(writer.add_call(parts, tokens, routing), flush=True)
        for row in again.ended.get(number, ()):
            writer.add_request({**row, "request_id": row["request_id"] + first})
    first += 4
"""


def killed_run(path, seconds, segments):
    """Run the endless writer, kill it some time after it has committed so many more segments; calls it had handed over."""
    before = len(list(path.glob("forwards/part-*")))
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(path)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    first = process.stdout.readline()
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout))
    reader.start()
    wait_for_parts(path, before + segments)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    reader.join()
    whole = [line for line in (first, *lines) if line.endswith(b"\n")]
    return int(whole[-1]) + 1


def test_kill_at_any_moment(tmp_path):
    path = tmp_path / "a.trace"
    moments = random.Random(time.time_ns())
    committed = 0
    for segments in (0, 1, 2, 1):
        handed_over = killed_run(path, moments.uniform(0.0, 0.3), segments)
        assert check(path) == []
        trace = open_trace(path)
        assert committed + segments <= trace.num_forwards <= handed_over
        assert not trace.meta.complete
        committed = trace.num_forwards
        assert set(trace.requests["stop_reason"]) <= {"length", "interrupted"}
    recorded = record(np.random.default_rng(0), level="scores", layers=range(1, 5))
    with TraceWriter(path, recorded.meta, append=True) as writer:
        assert writer.next_forward == committed
        assert writer.ended == set(trace.requests.filter(trace.requests["stop_reason"] == "length")["request_id"])
        assert writer.next_request == max(trace.requests["request_id"]) + 1
        assert not list(path.glob("*/.part*")) and not list(path.glob(".meta*"))
    assert check(path) == [] and open_trace(path).meta.complete


def test_killed_before_there_was_a_meta_json(tmp_path):
    recorded = record(np.random.default_rng(0))
    for append in (False, True):
        path = tmp_path / f"{append}.trace"
        (path / "tokens").mkdir(parents=True)
        (path / ".meta.json.tmp").write_text("{")
        with TraceWriter(path, recorded.meta, append=append) as writer:
            recorded.write(writer)
        assert check(path) == [] and open_trace(path).num_forwards == len(recorded.calls)


def wait_for_parts(path, count):
    """Until so many segments are committed."""
    deadline = time.monotonic() + 60
    while len(list(path.glob("forwards/part-*"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_all_but_the_open_segment_is_there_while_writing(tmp_path):
    recorded = record(np.random.default_rng(0), batch=1)
    path = tmp_path / "a.trace"
    writer = TraceWriter(path, recorded.meta, segment_forwards=3)
    # segments end at block ends: calls 0..3 (prefill, block 1), 4..6 (block 2), 7..
    recorded.write(writer, 0, 9)
    wait_for_parts(path, 2)
    assert check(path) == [] and open_trace(path).num_forwards == 7
    recorded.write(writer, 9)
    writer.close()
    assert open_trace(path).num_forwards == len(recorded.calls)
    assert open_trace(path).meta.complete
    writer.close()
    with pytest.raises(UserError, match="is closed: open a TraceWriter with append=True"):
        writer.add_call(*recorded.calls[0])


def test_exception_leaves_a_readable_trace(tmp_path):
    recorded = record(np.random.default_rng(0))
    path = tmp_path / "a.trace"
    with pytest.raises(KeyboardInterrupt), TraceWriter(path, recorded.meta) as writer:
        recorded.write(writer, 0, 5)
        raise KeyboardInterrupt
    trace = open_trace(path)
    assert check(path) == [] and trace.num_forwards == 5 and not trace.meta.complete
    assert set(trace.requests["stop_reason"]) == {"interrupted"}


def test_append_goes_on(tmp_path):
    recorded = record(np.random.default_rng(0), batches=3)
    half = 2 * len(recorded.calls) // 3
    path = tmp_path / "a.trace"
    with TraceWriter(path, recorded.meta, append=True) as writer:
        recorded.write(writer, 0, half)
        assert writer.ended == frozenset()
    created = open_trace(path).meta.raw["created"]
    for leftover in ("routing/part-00001.parquet", "tokens/.part-00001.parquet.tmp", ".meta.json.tmp"):
        (path / leftover).write_bytes(b"half")
    with TraceWriter(path, recorded.meta, append=True) as writer:
        assert (writer.next_forward, writer.next_request, writer.ended) == (half, 4, {0, 1, 2, 3})
        assert not list(path.glob("*/*00001*")) and not (path / ".meta.json.tmp").exists()
        assert not open_trace(path).meta.complete
        recorded.write(writer, half)
    trace = open_trace(path)
    assert check(path) == [] and trace.num_forwards == len(recorded.calls) and trace.meta.complete
    assert trace.meta.raw["created"] == created
    assert trace.requests["stop_reason"].to_list() == ["length"] * 6


def test_interrupted_requests_cannot_go_on(tmp_path):
    recorded = record(np.random.default_rng(0))
    with TraceWriter(tmp_path / "a.trace", recorded.meta) as writer:
        recorded.write(writer, 0, 3)
    with TraceWriter(tmp_path / "a.trace", recorded.meta, append=True) as writer:
        with pytest.raises(UserError, match="request 0 has ended"):
            recorded.write(writer, 3)
        assert writer.next_request == 2


@pytest.mark.parametrize("key", ["capture_level", "model", "router", "decoding", "tables"])
def test_append_wants_the_same_capture(tmp_path, key):
    recorded = record(np.random.default_rng(0))
    path = tmp_path / "a.trace"
    with TraceWriter(path, recorded.meta) as writer:
        recorded.write(writer)
    other = json.loads(json.dumps(recorded.meta))
    changes = {"capture_level": "scores", "tables": ["requests", "forwards", "routing"]}
    other[key] = changes.get(key) or {**other[key], "revision": "x", "norm_topk_prob": False, "seed": 1}
    with pytest.raises(UserError, match=f"recorded with another {key}, so nothing can be appended"):
        TraceWriter(path, other, append=True)
    assert check(path) == [] and open_trace(path).meta.complete


def test_an_existing_trace_is_replaced_only_by_force(tmp_path):
    recorded = record(np.random.default_rng(0))
    path = tmp_path / "a.trace"
    with TraceWriter(path, recorded.meta, segment_forwards=2) as writer:
        recorded.write(writer)
    (path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists: replace the trace with force=True, go on with it with append=True"):
        TraceWriter(path, recorded.meta)
    with pytest.raises(UserError, match=r"meta.json: model.num_experts must be a whole number"):
        TraceWriter(path, {**recorded.meta, "model": {**recorded.meta["model"], "num_experts": 0}}, force=True)
    assert open_trace(path).num_forwards == len(recorded.calls)
    with TraceWriter(path, recorded.meta, force=True) as writer:
        recorded.write(writer, 0, 2)
    assert check(path) == [] and open_trace(path).num_forwards == 2
    assert (path / "notes.txt").read_text() == "mine"


def test_nothing_but_a_trace_is_ever_replaced(tmp_path):
    meta = record(np.random.default_rng(0)).meta
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "meta.json").write_text('{"name": "somebody else"}')
    for name, words in (
        ("folder", "exists and is not a trace"),
        ("file", "is a file"),
        ("other", "is left alone, it is not a readable trace"),
    ):
        for force in (False, True):
            with pytest.raises(UserError, match=words):
                TraceWriter(tmp_path / name, meta, force=force)
    assert (tmp_path / "folder" / "thesis.txt").exists() and (tmp_path / "other" / "meta.json").exists()
    with pytest.raises(UserError, match="choose one of the two"):
        TraceWriter(tmp_path / "new", meta, force=True, append=True)
    (tmp_path / "empty").mkdir()
    TraceWriter(tmp_path / "empty", meta).close()
    assert check(tmp_path / "empty") == []


def test_a_folder_that_cannot_be_written(tmp_path):
    meta = record(np.random.default_rng(0)).meta
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError) as caught:
        TraceWriter(tmp_path / "file" / "a.trace", meta)
    assert str(caught.value) == f"{tmp_path / 'file' / 'a.trace'} cannot be written: Not a directory."


def test_a_failing_disk_surfaces_in_the_caller(tmp_path, monkeypatch):
    recorded = record(np.random.default_rng(0), batches=6, batch=1)
    path = tmp_path / "a.trace"
    writer = TraceWriter(path, recorded.meta, segment_forwards=2)
    recorded.write(writer, 0, 5)
    wait_for_parts(path, 1)
    failed = threading.Event()

    def full(descriptor):
        failed.set()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tracer.files.commit.os.fsync", full)
    with pytest.raises(UserError) as caught:
        recorded.write(writer, 5)
        failed.wait(30)
        writer.close()
    assert str(caught.value) == f"{path} cannot be written any more: [Errno 28] No space left on device."
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"cannot be written any more|is closed"):
        writer.add_call(*recorded.calls[5])
    assert check(path) == [] and not list(path.glob("*/.part*"))
    assert open_trace(path).num_forwards == 4 and not open_trace(path).meta.complete


def test_the_buffer_is_bounded(tmp_path, monkeypatch):
    recorded = record(np.random.default_rng(0), batches=8, batch=1, level="scores")
    gate = threading.Event()
    commit = sys.modules["tracer.files.commit"].commit_segment
    monkeypatch.setattr("tracer.files.commit.commit_segment", lambda *a: gate.wait(30) and commit(*a))
    writer = TraceWriter(tmp_path / "a.trace", recorded.meta, segment_forwards=1, max_buffer_bytes=3000)
    held = []

    def write():
        for number, call in enumerate(recorded.calls):
            writer.add_call(*call)
            held.append(number)

    thread = threading.Thread(target=write)
    thread.start()
    time.sleep(0.3)
    one = writer._last_bytes
    # it stands still with at most 3000 bytes waiting for the disk
    assert len(held) * one <= 3000 + one and len(held) < len(recorded.calls)
    gate.set()
    thread.join(30)
    writer.close()
    assert check(tmp_path / "a.trace") == [] and open_trace(tmp_path / "a.trace").num_forwards == len(recorded.calls)


def test_parameters(tmp_path):
    meta = record(np.random.default_rng(0)).meta
    with pytest.raises(UserError, match="must be at least 1"):
        TraceWriter(tmp_path / "a.trace", meta, segment_forwards=0)
    with pytest.raises(UserError, match="cannot hold what was given"):
        TraceWriter(tmp_path / "a.trace", {**meta, "provenance": {"x": object()}})
    assert not (tmp_path / "a.trace").exists()
