"""Kills, full disks and second runs: what was committed stays, leftovers go, nothing foreign is touched."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.made_up.calls import assert_unfinished, record
from tests.tracer.test_round_trip import naive_rows, read_rows
from tracer.checking import check
from tracer.errors import TraceError, UserError
from tracer.parquet import TraceWriter, open_trace

ROOT = Path(__file__).parent.parent.parent

# writes calls for ever, saying after each one how many have been handed over
ENDLESS = """
import sys
import numpy as np
from tests.made_up.calls import record
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


def naive_kept(path):
    """Calls and parts up to the last call of a request that ended, and the requests that ended; none in a new trace."""
    if not path.exists():
        return 0, 0, set()
    trace = open_trace(path)
    ended = set(trace.requests.filter(trace.requests["stop_reason"] != "interrupted")["request_id"])
    calls, parts = 0, 0
    for number, part in enumerate(trace.parts("forwards"), 1):
        columns = part.arrays(["forward_id", "request_id"])
        for forward, request in zip(columns["forward_id"].tolist(), columns["request_id"].tolist()):
            if request in ended:
                calls, parts = forward + 1, number
    return calls, parts, ended


def killed_run(path, seconds, segments):
    """Run the endless writer, kill it some time after it has committed so many segments; calls it had handed over."""
    calls, parts, _ = naive_kept(path)
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(path)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    first = process.stdout.readline()
    assert int(first) == calls
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout))
    reader.start()
    wait_for_parts(path, parts + segments)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    reader.join()
    whole = [line for line in (first, *lines) if line.endswith(b"\n")]
    return int(whole[-1]) + 1


def test_kill_at_any_moment(tmp_path):
    path = tmp_path / "a.trace"
    moments = random.Random(time.time_ns())
    for segments in (0, 1, 2, 1):
        kept, _, ended = naive_kept(path)
        handed_over = killed_run(path, moments.uniform(0.0, 0.3), segments)
        assert_unfinished(path)
        trace = open_trace(path)
        assert kept + segments <= trace.num_forwards <= handed_over
        assert set(trace.requests["stop_reason"]) <= {"length", "interrupted"}
        assert ended <= naive_kept(path)[2]
    kept, _, ended = naive_kept(path)
    recorded = record(np.random.default_rng(0), level="scores", layers=range(1, 5))
    with TraceWriter(path, recorded.meta, append=True) as writer:
        assert (writer.next_forward, writer.ended, writer.next_request) == (kept, ended, max(ended, default=-1) + 1)
        assert not list(path.glob("*/.part*")) and not list(path.glob(".meta*"))
    assert check(path) == [] and open_trace(path).meta.complete
    assert open_trace(path).num_forwards == kept
    assert open_trace(path).requests["stop_reason"].to_list() == ["length"] * len(ended)


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
    assert_unfinished(path, 7)
    recorded.write(writer, 9)
    writer.close()
    assert open_trace(path).num_forwards == len(recorded.calls)
    assert open_trace(path).meta.complete
    writer.close()
    with pytest.raises(UserError, match="is closed: open a TraceWriter with append=True"):
        writer.add_call(*recorded.calls[0])


def test_segments_end_by_time(tmp_path):
    recorded = record(np.random.default_rng(0), batch=1)
    for seconds, expected in (
        (1e-9, [[0], [1, 2, 3], [4, 5, 6], [7], [8, 9, 10], [11, 12, 13]]),
        (1e9, [[*range(14)]]),
    ):
        path = tmp_path / f"{seconds}.trace"
        with TraceWriter(path, recorded.meta, segment_seconds=seconds) as writer:
            recorded.write(writer)
        parts = open_trace(path).parts("forwards")
        assert [part.arrays(["forward_id"])["forward_id"].tolist() for part in parts] == expected
        assert check(path) == [] and read_rows(path) == naive_rows(recorded)


def test_a_complete_trace_counts_its_segments_and_has_a_checksum(tmp_path):
    recorded = record(np.random.default_rng(0), batch=1)
    writer = TraceWriter(tmp_path / "a.trace", recorded.meta, segment_forwards=3)
    for segments in (None, 4):
        document = json.loads((tmp_path / "a.trace" / "meta.json").read_text())
        assert document.get("segments") == segments and document["complete"] == (segments is not None)
        found = document.pop("checksum")
        text = json.dumps(document, sort_keys=True, separators=(",", ":"))
        assert found == hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        if segments is None:
            recorded.write(writer)
            writer.close()


def test_exception_leaves_a_readable_trace(tmp_path):
    recorded = record(np.random.default_rng(0))
    path = tmp_path / "a.trace"
    with pytest.raises(KeyboardInterrupt), TraceWriter(path, recorded.meta) as writer:
        recorded.write(writer, 0, 5)
        raise KeyboardInterrupt
    assert_unfinished(path, 5)
    assert set(open_trace(path).requests["stop_reason"]) == {"interrupted"} and writer.folder == path


def test_append_goes_on(tmp_path):
    recorded = record(np.random.default_rng(0), batches=3)
    half = 2 * len(recorded.calls) // 3
    path = tmp_path / "a.trace"
    writer = TraceWriter(path, recorded.meta, append=True)
    assert writer.ended == frozenset()
    recorded.write(writer, 0, half)
    writer.close(complete=False)
    created = open_trace(path).meta.raw["created"]
    for leftover in ("routing/part-00001.parquet", "tokens/.part-00001.parquet.tmp", ".meta.json.tmp"):
        (path / leftover).write_bytes(b"half")
    with TraceWriter(path, recorded.meta, append=True) as writer:
        assert (writer.next_forward, writer.next_request, writer.ended) == (half, 4, {0, 1, 2, 3})
        assert not list(path.glob("*/*00001*")) and not (path / ".meta.json.tmp").exists()
        assert_unfinished(path, half)
        recorded.write(writer, half)
    trace = open_trace(path)
    assert check(path) == [] and trace.num_forwards == len(recorded.calls) and trace.meta.complete
    assert trace.meta.raw["created"] == created
    assert trace.requests["stop_reason"].to_list() == ["length"] * 6


@pytest.mark.parametrize("segment_forwards", [1, 3, 1024])
@pytest.mark.parametrize(("level", "compact"), [("ids", False), ("active", True), ("scores", True), ("scores", False)])
def test_append_drops_what_was_interrupted_at_the_end(tmp_path, level, compact, segment_forwards):
    recorded = record(np.random.default_rng(0), batches=3, level=level, count=True)
    path, options = tmp_path / "a.trace", {"compact": compact, "segment_forwards": segment_forwards}
    with pytest.raises(KeyboardInterrupt), TraceWriter(path, recorded.meta, **options) as writer:
        recorded.write(writer, 0, 19)
        raise KeyboardInterrupt
    assert_unfinished(path, 19)
    with TraceWriter(path, recorded.meta, append=True, **options) as writer:
        assert (writer.next_forward, writer.next_request, writer.ended) == (14, 4, {0, 1, 2, 3})
        assert_unfinished(path, 14)
        assert open_trace(path).requests["stop_reason"].to_list() == ["length"] * 4
        # the requests that were dropped begin again
        recorded.write(writer, 14)
    assert check(path) == [] and read_rows(path) == naive_rows(recorded)
    assert open_trace(path).requests["request_id"].to_list() == list(range(6))
    encodings = {
        part.metadata.row_group(0).column(part.schema.names.index("gate_weights")).encodings
        for part in open_trace(path).parts("routing")
    }
    assert all(("BYTE_STREAM_SPLIT" in found) == compact for found in encodings)


def test_requests_interrupted_before_one_that_ended_stay(tmp_path):
    recorded = record(np.random.default_rng(0), batches=3)
    del recorded.ended[6]
    path = tmp_path / "a.trace"
    with TraceWriter(path, recorded.meta) as writer:
        recorded.write(writer, 0, 16)
    with TraceWriter(path, recorded.meta, append=True) as writer:
        assert (writer.next_forward, writer.next_request, writer.ended) == (14, 4, {2, 3})
        with pytest.raises(UserError, match="request 0 has ended"):
            recorded.write(writer, 0)
        recorded.write(writer, 14)
    assert check(path) == [] and read_rows(path) == naive_rows(recorded)
    assert open_trace(path).requests["stop_reason"].to_list() == ["interrupted"] * 2 + ["length"] * 4


def test_nothing_ended_and_all_goes(tmp_path):
    recorded = record(np.random.default_rng(0))
    with TraceWriter(tmp_path / "a.trace", recorded.meta) as writer:
        recorded.write(writer, 0, 3)
    with TraceWriter(tmp_path / "a.trace", recorded.meta, append=True) as writer:
        assert (writer.next_forward, writer.next_request, writer.ended) == (0, 0, frozenset())
        assert_unfinished(tmp_path / "a.trace", 0)
        recorded.write(writer)
    assert check(tmp_path / "a.trace") == [] and read_rows(tmp_path / "a.trace") == naive_rows(recorded)


@pytest.mark.parametrize("segment_forwards", [1, 1024])
def test_a_request_whose_row_comes_among_calls_that_are_dropped_has_ended(tmp_path, segment_forwards):
    recorded = record(np.random.default_rng(0), batches=2, level="active")
    path = tmp_path / "a.trace"
    rows = recorded.ended.pop(6)
    with TraceWriter(path, recorded.meta, segment_forwards=segment_forwards) as writer:
        recorded.write(writer, 0, 9)
        writer.add_request(rows[0])
        recorded.write(writer, 9, 11)
        # and one that never had a call
        writer.add_request({**rows[1], "request_id": 9, "stop_reason": "error"})
        recorded.write(writer, 11, 12)
    with TraceWriter(path, recorded.meta, append=True) as writer:
        assert (writer.next_forward, writer.next_request, writer.ended) == (7, 10, {0, 9})
        assert_unfinished(path, 7)
        recorded.write(writer, 7)
    assert check(path) == [] and read_rows(path) == naive_rows(recorded)
    reasons = dict(zip(*open_trace(path).requests.select("request_id", "stop_reason")))
    assert reasons == {0: "length", 1: "interrupted", 2: "length", 3: "length", 9: "error"}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("segment_forwards", [3, 1024])
def test_killed_while_the_interrupted_calls_are_dropped(tmp_path, monkeypatch, segment_forwards):
    recorded = record(np.random.default_rng(0), batches=2, level="active")
    begun = tmp_path / "begun.trace"
    with TraceWriter(begun, recorded.meta, segment_forwards=segment_forwards) as writer:
        recorded.write(writer, 0, 12)
    plain = {name: getattr(os, name) for name in ("replace", "unlink")}
    for last in range(100):
        path, done = tmp_path / f"{last}.trace", []
        shutil.copytree(begun, path)

        def counted(name, *arguments, done=done, last=last, **options):
            if len(done) == last:
                raise Killed
            done.append(name)
            return plain[name](*arguments, **options)

        with monkeypatch.context() as patch:
            for name in plain:
                patch.setattr(os, name, lambda *a, name=name, counted=counted, **k: counted(name, *a, **k))
            try:
                TraceWriter(path, recorded.meta, append=True).close()
                break
            except Killed:
                pass
        if not open_trace(path).meta.complete:
            assert_unfinished(path)
            assert 7 <= open_trace(path).num_forwards <= 12
        with TraceWriter(path, recorded.meta, append=True) as writer:
            assert (writer.next_forward, writer.next_request, writer.ended) == (7, 2, {0, 1})
            recorded.write(writer, 7)
        assert check(path) == [] and read_rows(path) == naive_rows(recorded)
    assert 5 < last < 99


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


def contents(path):
    """Every file of a folder and what it holds."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def there(tmp_path):
    """A trace that is there, with a file of somebody's in its folder."""
    recorded = record(np.random.default_rng(0))
    path = tmp_path / "a.trace"
    with TraceWriter(path, recorded.meta, segment_forwards=2) as writer:
        recorded.write(writer)
    (path / "notes.txt").write_text("mine")
    return path


def test_an_existing_trace_is_replaced_only_by_force(tmp_path, there):
    recorded, before = record(np.random.default_rng(0)), contents(there)
    with pytest.raises(UserError, match="exists: replace the trace with force=True, go on with it with append=True"):
        TraceWriter(there, recorded.meta)
    with pytest.raises(UserError, match=r"meta.json: model.num_experts must be a whole number"):
        TraceWriter(there, {**recorded.meta, "model": {**recorded.meta["model"], "num_experts": 0}}, force=True)
    assert contents(there) == before
    with TraceWriter(there, recorded.meta, force=True) as writer:
        recorded.write(writer, 0, 2)
        # it is written beside, and the old one stays until then
        assert writer.folder == tmp_path / ".a.trace.new" and writer.folder.is_dir()
        assert contents(there) == before
    assert writer.folder == there
    assert check(there) == [] and open_trace(there).num_forwards == 2
    assert (there / "notes.txt").read_text() == "mine"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.trace"]


def test_a_replacement_that_fails_leaves_the_old_trace_whole(tmp_path, there):
    recorded, before = record(np.random.default_rng(1)), contents(there)
    for name in ("a.partial.trace", "a.partial-2.trace"):
        with pytest.raises(KeyboardInterrupt), TraceWriter(there, recorded.meta, force=True) as writer:
            recorded.write(writer, 0, 5)
            raise KeyboardInterrupt
        assert contents(there) == before and writer.folder == tmp_path / name
        assert_unfinished(tmp_path / name, 5)
    # what has no call is not worth keeping
    with pytest.raises(KeyboardInterrupt), TraceWriter(there, recorded.meta, force=True):
        raise KeyboardInterrupt
    TraceWriter(there, recorded.meta, force=True).close(complete=False)
    assert contents(there) == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.trace", "a.partial.trace", "a.partial-2.trace"}
    # the part that is left can be gone on with
    with TraceWriter(tmp_path / "a.partial.trace", recorded.meta, append=True) as writer:
        recorded.write(writer)
    assert check(writer.path) == [] and read_rows(writer.path) == naive_rows(recorded)


@pytest.mark.parametrize("force", [False, True])
def test_whole_is_all_or_nothing(tmp_path, there, force):
    recorded, before = record(np.random.default_rng(1)), contents(there)
    path = there if force else tmp_path / "b.trace"
    names = sorted(entry.name for entry in tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt), TraceWriter(path, recorded.meta, whole=True, force=force) as writer:
        recorded.write(writer, 0, 5)
        assert force or not path.exists()
        raise KeyboardInterrupt
    assert sorted(entry.name for entry in tmp_path.iterdir()) == names and contents(there) == before
    with TraceWriter(path, recorded.meta, whole=True, force=force) as writer:
        recorded.write(writer)
    assert check(path) == [] and read_rows(path) == naive_rows(recorded)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted({*names, path.name})


@pytest.mark.parametrize("first", ["new", "append", "force", "whole"])
def test_one_writer_a_folder(tmp_path, there, first):
    recorded = record(np.random.default_rng(0))
    path = tmp_path / "b.trace" if first in ("new", "whole") else there
    sentence = f"{path} is being written by another process: wait for it, or give another name."
    options = {} if first == "new" else {first: True}
    with TraceWriter(path, recorded.meta, **options) as writer:
        for second in ({}, {"append": True}, {"force": True}, {"whole": True}):
            with pytest.raises(UserError) as caught:
                TraceWriter(path, recorded.meta, **second)
            assert str(caught.value) == sentence
        if first == "new":
            code = "import sys; from tracer.parquet import TraceWriter; TraceWriter(sys.argv[1], eval(sys.argv[2]), force=True)"
            arguments = [sys.executable, "-c", code, str(path), repr(recorded.meta)]
            other = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
            assert other.returncode == 1 and sentence in other.stderr
        if first != "append":
            recorded.write(writer)
        # another folder is another matter
        TraceWriter(tmp_path / "c.trace", recorded.meta).close()
    assert check(path) == [] and read_rows(path) == naive_rows(recorded)
    TraceWriter(path, recorded.meta, append=True).close()
    assert not list(tmp_path.glob(".*"))


def test_a_swap_that_was_killed_in_the_middle(tmp_path, there):
    recorded, before = record(np.random.default_rng(0)), contents(there)
    old, new = tmp_path / ".a.trace.old", tmp_path / ".a.trace.new"

    def cut_short():
        # between the two renames: the old trace has gone out of the way, the new one has not come yet
        with TraceWriter(tmp_path / "other.trace", recorded.meta) as writer:
            recorded.write(writer, 0, 2)
        shutil.rmtree(new, ignore_errors=True)
        os.rename(tmp_path / "other.trace", new)
        os.rename(there, old)
        with pytest.raises(TraceError) as caught:
            open_trace(there)
        words = f"replacing it was cut short, and the one before is whole at {old}"
        assert str(caught.value) == f"there is no trace at {there}; {words}."

    cut_short()
    with pytest.raises(UserError, match="exists: replace the trace with force=True"):
        TraceWriter(there, recorded.meta)
    assert contents(there) == before and not old.exists()
    cut_short()
    with TraceWriter(there, recorded.meta, append=True) as writer:
        assert writer.next_forward == len(recorded.calls)
    assert check(there) == [] and read_rows(there) == naive_rows(recorded)
    cut_short()
    with TraceWriter(there, recorded.meta, force=True) as writer:
        recorded.write(writer, 0, 3)
    assert check(there) == [] and open_trace(there).num_forwards == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.trace"]
    assert (there / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("options", [{"force": True}, {"append": True}])
def test_a_swap_that_was_killed_before_other_files_came_along(tmp_path, there, options):
    recorded, old = record(np.random.default_rng(0)), tmp_path / ".a.trace.old"
    with TraceWriter(tmp_path / "b.trace", recorded.meta) as writer:
        recorded.write(writer)
    os.rename(there, old)
    os.rename(tmp_path / "b.trace", there)
    TraceWriter(there, recorded.meta, **options).close()
    assert check(there) == [] and (there / "notes.txt").read_text() == "mine"
    assert open_trace(there).num_forwards == (0 if options == {"force": True} else len(recorded.calls))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.trace"]


def test_nothing_but_a_trace_is_ever_replaced(tmp_path):
    meta = record(np.random.default_rng(0)).meta
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "meta.json").write_text('{"name": "somebody else"}')
    for name, words in (
        ("folder", "is there and is not a trace: choose another name"),
        ("file", "is a file"),
        ("other", "is left alone, it is not a trace: its meta.json is another's"),
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
    assert not list(path.glob("*/.part*"))
    assert_unfinished(path, 4)


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
    for name in ("segment_forwards", "segment_seconds", "max_buffer_bytes"):
        with pytest.raises(UserError, match="must be at least 1"):
            TraceWriter(tmp_path / "a.trace", meta, **{name: 0})
    with pytest.raises(UserError, match="cannot hold what was given"):
        TraceWriter(tmp_path / "a.trace", {**meta, "provenance": {"x": object()}})
    assert not list(tmp_path.iterdir())
