"""Ctrl-C at every line of the writer leaves a readable trace that lacks no call it took."""

from __future__ import annotations

import gc
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

import tracer
from tests.made_up.calls import record
from tests.tracer.cells import cells
from tracer.checking import check
from tracer.interrupts import undisturbed
from tracer.parquet import TraceWriter, open_trace

HOME = Path(tracer.__file__).parent
WATCHED = tuple(str(HOME / name) for name in ("files", "interrupts.py", "meta.py"))


@pytest.fixture(autouse=True)
def only_new_garbage():
    """Collecting what a run leaves must not walk over all that other tests have imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Lines:
    """Counts the lines that run in the writer's files, and sends SIGINT at one of them."""

    def __init__(self, at=None):
        self.at, self.seen = at, []

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def _call(self, frame, event, argument):
        return self._line if frame.f_code.co_filename.startswith(WATCHED) else None

    def _line(self, frame, event, argument):
        if event == "line":
            self.seen.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.seen) - 1 == self.at:
                signal.raise_signal(signal.SIGINT)
        return self._line


def places(run, files=("",), twice=()):
    """Where each line of the given files runs first and, in the files ``twice``, last."""
    with Lines() as lines:
        run()
    first, last = {}, {}
    for number, line in enumerate(lines.seen):
        if line[0].endswith(tuple(files)):
            first.setdefault(line, number)
        if line[0].endswith(tuple(twice)):
            last[line] = number
    return sorted({*first.values(), *last.values()})


def assert_prefix(path, recorded, taken):
    """The trace is sound, holds at least the calls that were taken, and nothing but the recorded ones."""
    faults = check(path)
    trace = open_trace(path)
    assert faults == [] or (len(faults) == 1 and "was not finished" in faults[0] and not trace.meta.complete)
    assert taken <= trace.num_forwards <= len(recorded.calls)
    assert trace.forwards.call_ids.tolist() == list(range(trace.num_forwards))
    found = [segment.layer(2).expert_ids for segment in trace.segments()]
    expected = [cells(routing)[2]["expert_ids"] for _, _, routing in recorded.calls[: trace.num_forwards]]
    if expected:
        assert np.array_equal(np.sort(np.concatenate(found)), np.sort(np.concatenate(expected)))


class Taken:
    """A writer that counts the calls that came back."""

    def __init__(self, writer):
        self.writer, self.calls = writer, 0

    def add_call(self, *call):
        self.writer.add_call(*call)
        self.calls += 1

    def add_request(self, row):
        self.writer.add_request(row)


def test_at_every_line_of_a_new_trace(tmp_path):
    recorded = record(np.random.default_rng(0), batches=1, batch=1, layers=(1, 2))

    def run(path, at=None):
        taken = None
        try:
            with (
                Lines(at) if at is not None else undisturbed(),
                TraceWriter(path, recorded.meta, segment_forwards=3) as writer,
            ):
                taken = Taken(writer)
                recorded.write(taken)
        except KeyboardInterrupt:
            assert at is not None
        # a writer whose with-statement was never entered lets go of its folder when it is dropped
        gc.collect()
        return taken.calls if taken else 0

    run(tmp_path / "warm.trace")
    chosen = places(lambda: run(tmp_path / "counted.trace"), twice=("writer.py", "interrupts.py"))
    assert len(chosen) > 200
    for number in chosen:
        path = tmp_path / "a.trace"
        taken = run(path, number)
        if (path / "meta.json").exists():
            assert_prefix(path, recorded, taken)
        else:
            assert not taken
        if number % 5 == 0:
            # whoever comes next is not kept out
            with TraceWriter(path, recorded.meta, append=True) as writer:
                recorded.write(writer, writer.next_forward)
            assert check(path) == [] and open_trace(path).num_forwards == len(recorded.calls)
        shutil.rmtree(path, ignore_errors=True)


@pytest.mark.parametrize("mode", ["force", "append"])
def test_at_every_line_of_taking_a_trace_over(tmp_path, mode):
    recorded = record(np.random.default_rng(1), batches=2, batch=1, layers=(1, 2))
    half = len(recorded.calls) // 2
    with pytest.raises(ZeroDivisionError), TraceWriter(tmp_path / "before.trace", recorded.meta) as writer:
        # the second request is interrupted
        recorded.write(writer, 0, half + 2)
        raise ZeroDivisionError
    path = tmp_path / "a.trace"

    def run(at=None):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(tmp_path / "before.trace", path)
        try:
            with (
                Lines(at) if at is not None else undisturbed(),
                TraceWriter(path, recorded.meta, **{mode: True}) as writer,
            ):
                recorded.write(writer, writer.next_forward)
        except KeyboardInterrupt:
            assert at is not None
        gc.collect()

    run()
    for number in places(run, ("folder.py", "writer.py")):
        run(number)
        for partial in tmp_path.glob("a.partial*"):
            assert mode == "force"
            assert_prefix(partial, recorded, 0)
            shutil.rmtree(partial)
        # the old trace, the new one, or, appending, more of the old one
        assert_prefix(path, recorded, half)
        if number % 5 == 0:
            run()
            assert check(path) == []
