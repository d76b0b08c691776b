"""A capture that was stopped and resumed is the one that was not: every row, every figure."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from simulator.replaying import replay
from tracer.capture import run_capture
from tracer.capture_plan import CaptureOptions, plan_capture
from tracer.checking import check
from tracer.errors import UserError
from tracer.meta import read_meta, write_meta
from tracer.parquet import open_trace
from tracer.prompts import Prompt

PROMPTS = [Prompt(text=text, dataset="test", token_ids=None) for text in ("def one(", "x = [1, 2", "class A:")]
OPTIONS = CaptureOptions(level="scores", gen_length=12, threshold=0.5)


def capture(path, interrupt_at=None, prompts=PROMPTS, **options):
    """Capture, stopped at a step where told; steps seen."""
    steps = 0

    def step(*_):
        nonlocal steps
        steps += 1
        if steps == interrupt_at:
            raise KeyboardInterrupt

    result = run_capture(plan_capture("demo:sdar", path, prompts, replace(OPTIONS, **options)), step)
    assert result.interrupted == (interrupt_at is not None)
    return steps


def tables(path):
    """Every stored row but for the clock's."""
    trace = open_trace(path)
    found = {name: trace.scan(name).collect() for name in ("requests", "tokens", "routing")}
    # the order of a row's ids is free, and begins anew with each writer
    found["routing"] = found["routing"].drop("slot").sort("forward_id", "layer", "row", "expert_id")
    found["forwards"] = trace.scan("forwards").collect().drop("duration_ns")
    segments = list(trace.segments())
    for layer in trace.meta.model.moe_layers:
        scores = np.concatenate([s.layer(layer, with_scores=True).router_scores for s in segments])
        found[f"scores {layer}"] = pl.DataFrame({"score": scores.ravel()})
    return found


def figures(path):
    runs = replay(open_trace(path), ["vanilla", "dmoe"], ["all_resident", "lru:budget=8"]).runs
    return [run.summary for run in runs]


def test_resumed_equals_uninterrupted(tmp_path):
    whole = tmp_path / "whole.trace"
    steps = capture(whole)
    expected, expected_figures = tables(whole), figures(whole)
    for at in (1, steps // 3, steps // 2, steps - 1):
        path = tmp_path / f"{at}.trace"
        capture(path, at)
        assert [fault for fault in check(path) if "was not finished" not in fault] == []
        if at > 1:
            # a second stop, later on
            capture(path, 2, resume=True)
        capture(path, resume=True)
        assert check(path) == []
        found = tables(path)
        assert found.keys() == expected.keys()
        for name, frame in expected.items():
            assert found[name].equals(frame), (at, name)
        assert figures(path) == expected_figures


def test_only_the_last_meta_json_was_lacking(tmp_path):
    whole, path = tmp_path / "whole.trace", tmp_path / "a.trace"
    capture(whole)
    shutil.copytree(whole, path)
    document = {key: value for key, value in read_meta(path).raw.items() if key != "segments"}
    write_meta(path, {**document, "complete": False})
    assert "was not finished: 3 requests of 3 ended" in check(path)[0]
    assert capture(path, resume=True) == 0
    assert check(path) == [] and (path / "meta.json").read_text() == (whole / "meta.json").read_text()


def test_another_capture_is_not_gone_on_with(tmp_path):
    path = tmp_path / "a.trace"
    capture(path, 5)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="recorded with other options, so --resume cannot go on"):
        capture(path, resume=True, threshold=0.6)
    with pytest.raises(UserError, match="recorded with other prompts, so --resume cannot go on"):
        capture(path, resume=True, prompts=PROMPTS[:2])
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_a_stopped_replacement_leaves_the_old_trace(tmp_path):
    path = tmp_path / "a.trace"
    capture(path)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    capture(path, 5, force=True)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    assert "was not finished" in check(tmp_path / "a.partial.trace")[0]
