"""Capturing with a model's own generate: it gets the options it takes, refuses the others, and meta.json says what was used."""

from __future__ import annotations

import json

import pytest

from tests.tiny_models import MASK, prompt
from tests.tracer.test_families import LLaDA2Released
from tracer.capture import run_capture
from tracer.capture_plan import CaptureOptions, CapturePlan, demo_prompts, own_options, plan_capture
from tracer.checking import check
from tracer.decoding.own_generate import called_with, generate_arguments
from tracer.errors import UserError
from tracer.models import LoadedModel
from tracer.prompts import Prompt
from tracer.recording.context import record


def released():
    return LLaDA2Released(vocabulary=64, mask=MASK)


def captured(path, **options):
    """The section ``decoding`` of a capture of one prompt by the model's own generate."""
    loaded = LoadedModel(released(), "released", "own", None, MASK, None, None, None, None, 64)
    given = CaptureOptions(loop="own", gen_length=16, **options)
    generate_arguments(loaded.model, given.gen_length, **own_options(loaded, given))
    plan = CapturePlan(loaded, path, (Prompt("x"),), (tuple(range(3, 13)),), given, 0, 0)
    run_capture(plan)
    assert check(path) == []
    return json.loads((path / "meta.json").read_text())["decoding"]


def test_what_generate_really_used_is_written(tmp_path):
    used = captured(tmp_path / "a.trace")
    assert (used["block_length"], used["threshold"]) == (32, 0.9)
    assert [used[name] for name in ("steps", "temperature", "remasking", "kv_cache", "eos_id")] == [None] * 5


def test_options_are_handed_on(tmp_path):
    used = captured(tmp_path / "a.trace", block_length=16, threshold=0.5)
    assert (used["block_length"], used["threshold"]) == (16, 0.5)


@pytest.mark.parametrize(("name", "value"), [("steps", 8), ("temperature", 0.5), ("eos_id", 2)])
def test_options_that_generate_does_not_take_are_refused(tmp_path, name, value):
    with pytest.raises(UserError, match=f"takes no {name}; leave --"):
        captured(tmp_path / "a.trace", **{name: value})
    assert not (tmp_path / "a.trace").exists()


def test_a_model_without_generate_is_refused_before_anything_is_written(tmp_path):
    options = CaptureOptions(loop="own", gen_length=4)
    with pytest.raises(UserError, match="has no generate method"):
        plan_capture("demo:llada2", tmp_path / "a.trace", demo_prompts()[:1], options)


def test_an_autoregressive_generate_is_captured(tmp_path):
    plan = plan_capture(
        "demo:sdar", tmp_path / "a.trace", demo_prompts()[:1], CaptureOptions(loop="own", gen_length=4, temperature=1.0)
    )
    arguments = generate_arguments(plan.loaded.model, 4, **own_options(plan.loaded, plan.options))
    assert arguments == {"max_new_tokens": 4, "temperature": 1.0, "do_sample": True}
    run_capture(plan)
    assert json.loads((tmp_path / "a.trace" / "meta.json").read_text())["decoding"]["temperature"] == 1.0
    with pytest.raises(UserError, match="own affair"):
        plan_capture("demo:sdar", tmp_path / "b.trace", demo_prompts(), CaptureOptions(loop="own", kv_cache=True))
    with pytest.raises(UserError, match="takes no threshold"):
        generate_arguments(plan.loaded.model, 4, {"threshold": 0.9})


def test_a_call_says_what_it_uses():
    said, defaults = called_with(released().generate, (prompt(3), 8), {"threshold": 0.5})
    assert said == {"threshold": 0.5} and defaults == {"block_length": 32, "threshold": 0.9}


def test_one_trace_holds_one_block_length():
    model = released()
    with record(model, mask_id=MASK) as recorder:
        model.generate(prompt(3), gen_length=5, block_length=8)
        assert recorder.meta["decoding"]["block_length"] == 8
        with pytest.raises(UserError, match="block_length=32, after calls with 8"):
            model.generate(prompt(3), gen_length=5)
