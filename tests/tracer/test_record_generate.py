"""Recording around a model's own generate: cut last blocks, padded batches, beams, other threads, compiled models."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from tests.tiny_models import EOS, MASK, VOCAB, hooks_left, prompt, tiny_model
from tests.tracer.test_families import LLaDA2Released
from tracer.checking import check
from tracer.errors import UserError
from tracer.parquet import open_trace
from tracer.recording.context import record


def released():
    return LLaDA2Released(vocabulary=VOCAB, mask=MASK)


@pytest.mark.parametrize("gen_length", [1, 5, 12, 13])
def test_the_last_step_keeps_what_the_loop_accepted_and_cut_off(tmp_path, gen_length):
    model = released()
    with record(model, tmp_path / "a.trace", mask_id=MASK, block_length=8) as recorder:
        model.generate(prompt(20), gen_length=gen_length, block_length=8)
    assert check(tmp_path / "a.trace") == [] and recorder.unresolved == 0
    trace = open_trace(tmp_path / "a.trace")
    filled = -(-(20 + gen_length) // 8) * 8 - 20
    assert trace.scan("forwards").collect()["num_accepted"].sum() == filled
    assert trace.requests["generated_tokens"].to_list() == [gen_length]


def test_what_no_output_and_no_tensor_shows_is_counted(capsys, tmp_path):
    model = released()

    def generate(inputs, gen_length):
        ids = torch.cat((inputs, torch.full((1, 32 - inputs.shape[1]), MASK)), dim=1)
        best = LLaDA2Released.forward(model, ids, attention_mask=None).logits.argmax(-1)
        return torch.where(ids == MASK, best, ids)[:, : inputs.shape[1] + gen_length]

    model.generate = generate
    with record(model, tmp_path / "a.trace", mask_id=MASK, block_length=32) as recorder:
        model.generate(prompt(20), 4)
    assert recorder.unresolved == 8
    assert "Whether 8 masked tokens were accepted never became known" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences"])
def test_beams_are_refused(name):
    model = tiny_model("sdar")
    with pytest.raises(UserError, match=f"{name} above 1: beams"), record(model):
        model.generate(prompt(9), max_new_tokens=2, do_sample=name != "num_beams", **{name: 2})
    assert hooks_left(model) == 0


def test_left_padded_rows_are_counted_each():
    model = tiny_model("sdar")
    model.config.mask_token_id = None
    tokens = torch.cat((prompt(9, 1), prompt(9, 2)))
    mask = torch.ones_like(tokens)
    tokens[0, :5], mask[0, :5] = 0, 0
    with record(model) as recorder:
        model.generate(tokens, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert [row["prompt_tokens"] for row in recorder.requests] == [4, 9]
    assert [row["generated_tokens"] for row in recorder.requests] == [4, 4]
    assert recorder.calls[0].tokens["position"][:9].tolist() == [-1] * 5 + [0, 1, 2, 3]
    assert [call.tokens["position"].tolist() for call in recorder.calls[1:]] == [[4, 9], [5, 10], [6, 11]]


def test_generated_tokens_end_with_the_end_token():
    model = released()
    with record(model, mask_id=MASK, block_length=8, eos_id=EOS) as recorder, recorder.request(prompt_tokens=20):
        output = LLaDA2Released.generate(model, prompt(20), gen_length=12, block_length=8)
        output[0, 23] = EOS
        output[0, 24:] = 0
        recorder.finish(output)
    (row,) = recorder.requests
    assert (row["generated_tokens"], row["stop_reason"]) == (4, "eos")


@pytest.mark.parametrize("before", [False, True])
def test_a_thread_that_runs_the_same_model_is_left_alone(before):
    model, stop, faults, begun = tiny_model("sdar"), threading.Event(), [], threading.Event()

    def serve():
        try:
            while not stop.is_set():
                with torch.no_grad():
                    model(input_ids=prompt(24))
                begun.set()
        except BaseException as error:
            faults.append(error)

    other = threading.Thread(target=serve)
    if before:
        other.start()
    with record(model, mask_id=MASK) as recorder, torch.no_grad():
        for number in range(8):
            model(input_ids=prompt(16))
            if number == 0 and not before:
                other.start()
            begun.wait()
    stop.set()
    other.join()
    assert faults == []
    assert [len(call.tokens["position"]) for call in recorder.calls] == [16] * 8


def test_threads_that_generate_for_the_body_are_recorded():
    model = tiny_model("sdar")
    with record(model) as recorder:
        for seed in (1, 2):
            thread = threading.Thread(target=lambda seed=seed: model(input_ids=prompt(16, seed)))
            thread.start()
            thread.join()
    assert len(recorder.calls) == 2 and not np.array_equal(*(call.tokens["token_id"] for call in recorder.calls))


def test_a_compiled_model_called_inside_is_one_sentence():
    model = tiny_model("sdar")
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(UserError, match="compiled"), record(model), torch.no_grad():
        compiled(input_ids=prompt(8))
    assert hooks_left(model) == 0
