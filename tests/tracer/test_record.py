"""The recorder: it changes nothing, misses nothing, lets go always, and follows loops that tell it nothing."""

from __future__ import annotations

import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tests.made_up.calls import assert_unfinished
from tests.tiny_models import (
    BLOCK,
    EOS,
    FAMILIES,
    MASK,
    VOCAB,
    block_causal,
    hooks_left,
    prompt,
    tiny_model,
)
from tests.tracer.cells import cells
from tracer.checking import check
from tracer.decode import decode_llada2, decode_own, decode_sdar
from tracer.errors import UserError
from tracer.parquet import TraceWriter, open_trace
from tracer.recording.context import record
from tracer.recording.describe import describe_model
from tracer.recording.sink import MOST_WAITING

OPTIONS = {"mask_id": MASK, "eos_id": None, "block_length": BLOCK, "steps": BLOCK, "threshold": 0.9}


def forward(model, tokens):
    """One call over whole blocks of ``tokens`` [B, T]."""
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=block_causal(tokens.shape[1])).logits


def layer_numbers(model):
    """Layers that have a gate."""
    return [n for n, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "gate")]


# Nothing is changed.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", ["ids", "active", "scores"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_output_is_bit_for_bit_the_plain_one(family, level, dtype):
    model, tokens = tiny_model(family, dtype), prompt(24)
    plain = forward(model, tokens)
    with record(model, level=level):
        recorded = [forward(model, tokens) for _ in range(2)]
    assert all(torch.equal(plain, r) for r in recorded)


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_decoding_is_the_plain_one(family):
    model, tokens = tiny_model(family), prompt(13)
    options = {"gen_length": 16, "temperature": 1.0, "seed": 3, **OPTIONS}
    for kv_cache in (False, True):
        plain = decode_llada2(model, tokens, kv_cache=kv_cache, **options)
        with record(model, level="scores") as recorder:
            recorded = decode_llada2(model, tokens, kv_cache=kv_cache, recorder=recorder, **options)
        assert torch.equal(plain.ids, recorded.ids) and plain.forwards == recorded.forwards == len(recorder.calls)


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_device_gives_whole_calls(tmp_path, family, device):
    """On a GPU this runs the packed copy on the side stream; the ids must be those the experts received there."""
    model, out, received = tiny_model(family).to(device), tmp_path / "a.trace", []
    handle = model.model.layers[2].mlp.experts.register_forward_pre_hook(lambda m, a: received.append(a[1].clone()))
    plain = decode_sdar(model, prompt(11), gen_length=20, **OPTIONS)
    received.clear()
    with record(model, level="scores") as recorder, recorder.request(prompt_tokens=11):
        recorded = decode_sdar(model, prompt(11), gen_length=20, recorder=recorder, **OPTIONS)
    assert torch.equal(plain.ids, recorded.ids) and len(received) == len(recorder.calls)
    for call, ids in zip(recorder.calls, received, strict=True):
        assert np.array_equal(cells(call.routing)[2]["expert_ids"], ids.cpu().numpy())
        assert call.parts[0]["duration_ns"] > 0
    handle.remove()
    with record(model, out, level="active"), torch.no_grad():
        foreign_loop(model, prompt(11).to(device), 13, kv_cache=True)
    assert check(out) == []


# Nothing is missed.


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_weights_are_what_the_experts_received(family):
    model, received = tiny_model(family), {n: [] for n in layer_numbers(tiny_model(family))}
    handles = [
        model.model.layers[n].mlp.experts.register_forward_pre_hook(lambda m, a, n=n: received[n].append(a[1:]))
        for n in received
    ]
    with record(model, level="scores") as recorder:
        decode_sdar(model, prompt(11), gen_length=16, recorder=recorder, **OPTIONS)
    for handle in handles:
        handle.remove()
    for number, call in enumerate(recorder.calls):
        assert list(call.routing.layers) == list(received)
        for layer, cell in cells(call.routing).items():
            ids, weights = received[layer][number]
            assert np.array_equal(cell["expert_ids"], ids.numpy()) and cell["expert_ids"].dtype == np.uint8
            assert np.array_equal(cell["gate_weights"], weights.half().numpy())


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_follow_from_the_gate_by_the_rule_in_meta(family):
    model = tiny_model(family)
    gate_input = []
    gate = model.model.layers[1].mlp.gate
    handle = gate.register_forward_hook(lambda m, a, o: gate_input.append(a[0]))
    with record(model, level="scores") as recorder:
        forward(model, prompt(16))
    handle.remove()
    rule = recorder.meta["router"]
    logits = gate_input[0].reshape(16, -1) @ gate.weight.detach().T
    expected = logits.sigmoid() if family == "llada2" else logits.softmax(-1)
    scores = cells(recorder.calls[0].routing)[1]["router_scores"]
    np.testing.assert_allclose(scores, expected.numpy(), atol=1e-6)
    assert rule["verified"] and rule["score_function"] == ("sigmoid" if family == "llada2" else "softmax")
    assert rule["norm_topk_prob"] and rule["routed_scaling_factor"] == (2.5 if family == "llada2" else 1.0)
    assert (rule["n_group"], rule["topk_group"]) == ((4, 2) if family == "llada2" else (1, 1))
    if family == "llada2":
        assert rule["expert_bias"]["1"] == pytest.approx(gate.expert_bias.tolist())
    else:
        assert rule["expert_bias"] is None


def test_active_keeps_the_columns_the_format_names(tmp_path):
    model, tokens = tiny_model("llada2"), prompt(16)
    with record(model, level="scores") as full:
        forward(model, tokens)
    with record(model, level="active") as held:
        forward(model, tokens)
    with record(model, tmp_path / "a.trace", level="active"):
        forward(model, tokens)
    (segment,) = open_trace(tmp_path / "a.trace").segments()
    bias = full.meta["router"]["expert_bias"]
    for layer, whole in cells(full.calls[0].routing).items():
        # what is kept is chosen by the writer, in memory there is all
        assert np.array_equal(cells(held.calls[0].routing)[layer]["router_scores"], whole["router_scores"])
        selection = whole["router_scores"] + np.array(bias[str(layer)], np.float32)
        wanted = set(whole["expert_ids"].ravel().tolist())
        for row in selection:
            wanted |= set(sorted(range(16), key=lambda e, row=row: (-row[e], e))[:2])
        scores = segment.layer(layer, with_scores=True).router_scores
        columns = sorted(wanted)
        assert np.flatnonzero(~np.isnan(scores).any(axis=0)).tolist() == columns
        assert np.isnan(np.delete(scores, columns, axis=1)).all()
        assert np.array_equal(scores[:, columns], whole["router_scores"][:, columns])


def test_meta_counts_every_weight_once():
    for family in FAMILIES:
        model = tiny_model(family)
        section = describe_model(model)["model"]
        total = sum(p.numel() * p.element_size() for p in model.parameters())
        assert section["moe_layers"] == layer_numbers(model)
        assert section["expert_bytes"] == 3 * 32 * 8 * 4
        assert section["dense_bytes"] + section["expert_bytes"] * 16 * len(section["moe_layers"]) == total
        assert (section["num_experts"], section["top_k"], section["num_layers"]) == (16, 2, 3)
        assert (section["hidden_size"], section["moe_intermediate_size"], section["dtype"]) == (32, 8, "float32")
        assert (section["num_heads"], section["num_kv_heads"], section["head_dim"]) == (2, 1, 16)
        assert section["num_shared_experts"] == (family == "llada2")


def test_heads_that_a_config_leaves_out_follow_from_the_others():
    model = tiny_model("sdar")
    experts = {"num_experts": 16, "num_experts_per_tok": 2, "norm_topk_prob": True}
    model.config = SimpleNamespace(num_attention_heads=4, hidden_size=32, **experts)
    section = describe_model(model)["model"]
    assert (section["num_heads"], section["num_kv_heads"], section["head_dim"]) == (4, 4, 8)
    model.config = SimpleNamespace(**experts)
    section = describe_model(model)["model"]
    assert (section["num_heads"], section["num_kv_heads"], section["head_dim"]) == (None, None, None)


def test_meta_holds_no_path():
    model = tiny_model("sdar")
    model.config._name_or_path = "/home/someone/models/mine"
    assert describe_model(model)["model"]["id"] == "mine"


# It lets go.


class Crash(Exception):
    pass


@pytest.mark.parametrize("nth", [2, MOST_WAITING + 3])
def test_ctrl_c_while_a_call_is_written_loses_no_call_between_others(nth, tmp_path, monkeypatch):
    model, written = tiny_model("llada2"), []
    add_call = TraceWriter.add_call

    def interrupted(self, *call):
        written.append(call)
        if len(written) == nth:
            os.kill(os.getpid(), signal.SIGINT)
        return add_call(self, *call)

    monkeypatch.setattr(TraceWriter, "add_call", interrupted)
    with pytest.raises(KeyboardInterrupt), record(model, tmp_path / "t") as recorder:
        for _ in range(6):
            decode_llada2(model, prompt(8), recorder=recorder, gen_length=2 * BLOCK, **OPTIONS)
    assert len(written) > nth
    assert_unfinished(tmp_path / "t", len(written))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("error", [Crash, KeyboardInterrupt])
def test_a_crash_leaves_no_hook_and_a_readable_trace(tmp_path, error):
    model, out = tiny_model("llada2"), tmp_path / "crash.trace"
    done = []

    def crash(step):
        done.append(step)
        if len(done) == 15:
            raise error

    with pytest.raises(error), record(model, out, level="scores") as recorder:
        decode_sdar(model, prompt(11, 1), gen_length=8, recorder=recorder, **{**OPTIONS, "threshold": 1.0})
        decode_sdar(
            model, prompt(11, 2), gen_length=64, recorder=recorder, on_step=crash, **{**OPTIONS, "threshold": 1.0}
        )
    assert hooks_left(model) == 0 and "generate" not in model.__dict__
    assert_unfinished(out, recorder.num_forwards)
    trace = open_trace(out)
    assert trace.requests["stop_reason"].to_list() == ["length", "interrupted"]
    requests = np.concatenate([segment.forwards.request_id for segment in trace.segments()])
    # The first request took a prefill, 5 + 8 denoise and 2 commit calls; the crash came in the middle of a block.
    assert len(done) == 15 and (requests == 0).sum() == 16 and (requests == 1).sum() == 15


def test_an_error_inside_request_is_recorded_as_one(tmp_path):
    model, out = tiny_model("sdar"), tmp_path / "error.trace"
    with record(model, out) as recorder:
        with pytest.raises(Crash), recorder.request(dataset="d", prompt="p"):
            decode_sdar(model, prompt(9), gen_length=8, recorder=recorder, on_step=lambda s: raise_(Crash), **OPTIONS)
        decode_sdar(model, prompt(9), gen_length=8, recorder=recorder, **OPTIONS)
    assert check(out) == []
    requests = open_trace(out).requests
    assert requests["stop_reason"].to_list() == ["error", "length"]
    assert requests["dataset"].to_list() == ["d", None] and requests["prompt"].to_list() == ["p", None]


def raise_(error):
    raise error


def test_a_call_cut_short_is_not_recorded():
    model = tiny_model("llada2")
    model.model.layers[2].register_forward_pre_hook(lambda m, a: raise_(Crash))
    with record(model) as recorder:
        with pytest.raises(Crash):
            forward(model, prompt(8))
        model.model.layers[2]._forward_pre_hooks.clear()
        forward(model, prompt(16))
    assert [len(c.tokens["position"]) for c in recorder.calls] == [16]


# It refuses.


def test_a_gate_that_never_fires_is_named():
    model = tiny_model("sdar")
    model.model.layers[1].mlp.forward = lambda x: x
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.gate never fired"), record(model):
        forward(model, prompt(8))
    assert hooks_left(model) == 0


def test_a_gate_that_stops_firing_is_named():
    model = tiny_model("sdar")
    with pytest.raises(UserError, match=r"model\.layers\.2\.mlp\.gate never fired"), record(model):
        forward(model, prompt(8))
        model.model.layers[2].mlp.forward = lambda x: x
        forward(model, prompt(8))


def test_a_model_without_experts_is_refused():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "head_dim": 8,
        "num_hidden_layers": 1,
    }
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=16, num_key_value_heads=1, **small))
    with pytest.raises(UserError, match="no mixture-of-experts layer"), record(model):
        pass


def test_a_body_without_a_call_is_refused():
    model = tiny_model("llada2")
    with pytest.raises(UserError, match="No call of the model was seen"), record(model):
        forward(tiny_model("llada2"), prompt(8))
    assert hooks_left(model) == 0


def test_compiled_models_are_refused():
    model = tiny_model("sdar")
    with pytest.raises(UserError, match="is compiled"), record(torch.compile(model)):
        pass
    model.model.layers[1].compile()
    with pytest.raises(UserError, match=r"model\.layers\.1 is compiled"), record(model):
        pass


def test_an_unknown_level_and_a_taken_path_are_refused(tmp_path):
    model, out = tiny_model("llada2"), tmp_path / "a.trace"
    with pytest.raises(UserError, match="capture level"), record(model, level="all"):
        pass
    with record(model, out):
        forward(model, prompt(8))
    called = []
    with pytest.raises(UserError, match="exists"), record(model, out):
        called.append(forward(model, prompt(8)))
    assert called == [] and hooks_left(model) == 0


def test_what_a_gate_returned_may_not_change_afterwards():
    model = tiny_model("llada2")
    mlp = model.model.layers[1].mlp

    def halve(module, args):
        args[2].mul_(0.5)

    with pytest.raises(UserError, match="changed in place"), record(model):
        forward(model, prompt(8))
        mlp.experts.register_forward_pre_hook(halve)
        forward(model, prompt(8))


class ReusedOutputs(nn.Module):
    """A gate that returns the same tensors in every call, overwritten."""

    def __init__(self, gate):
        super().__init__()
        self.gate, self.kept = gate, None

    def forward(self, *args):
        found = self.gate(*args)
        if self.kept is None or self.kept[0].shape != found[0].shape:
            self.kept = tuple(torch.empty_like(t) for t in found)
        for kept, new in zip(self.kept, found, strict=True):
            kept.copy_(new)
        return self.kept


@pytest.mark.parametrize("level", ["ids", "active", "scores"])
def test_what_a_later_call_overwrites_is_recorded_as_it_was(level):
    def run(reuse):
        model, predicted, confidence = tiny_model("llada2"), torch.zeros(BLOCK).long(), torch.zeros(BLOCK)
        accepted, tokens = torch.zeros(BLOCK, dtype=torch.bool), torch.zeros(1, 2 * BLOCK).long()
        for layer in layer_numbers(model) if reuse else ():
            model.model.layers[layer].mlp.gate = ReusedOutputs(model.model.layers[layer].mlp.gate)
        with record(model, level=level, mask_id=MASK, block_length=BLOCK) as recorder:
            recorder.begin(BLOCK)
            tokens[:] = prompt(2 * BLOCK)
            for step in range(BLOCK):
                tokens[0, BLOCK + step :] = MASK
                recorder.announce("denoise", 1, step)
                probability, best = forward(model, tokens)[0, -BLOCK:].softmax(-1).max(-1)
                predicted.copy_(best)
                confidence.copy_(probability)
                accepted[:] = torch.arange(BLOCK) == step
                recorder.note(predicted_ids=predicted, confidence=confidence, accepted=accepted)
                tokens[0, BLOCK + step] = predicted[step]
                for tensor in (predicted, confidence, accepted):
                    tensor.zero_()
            recorder.finish(stop_reason="length")
        return recorder.calls

    plain, reused = run(False), run(True)
    same_calls(plain, reused)
    assert len(plain) == BLOCK
    for step, (a, b) in enumerate(zip(plain, reused, strict=True)):
        assert np.flatnonzero(a.tokens["accepted"]).tolist() == [BLOCK + step]
        assert (a.tokens["confidence"][BLOCK:] > 0).all() and (a.tokens["confidence"] == b.tokens["confidence"])[
            BLOCK:
        ].all()
        for name in ("gate_weights", "router_scores"):
            one, other = getattr(a.routing, name), getattr(b.routing, name)
            assert one is other is None if one is None else np.array_equal(one, other)


class Counting:
    """A writer that only counts."""

    calls = 0

    def add_call(self, parts, tokens, routing):
        self.calls += 1

    def add_request(self, row):
        pass

    def close(self, complete=True):
        pass


@pytest.mark.parametrize(("bound", "most"), [("MOST_WAITING", 3), ("MOST_WAITING_BYTES", 1), (None, MOST_WAITING)])
def test_calls_wait_in_bounded_number_and_whoever_asks_sees_them_all(monkeypatch, bound, most):
    if bound:
        monkeypatch.setattr(f"tracer.recording.sink.{bound}", most)
    model, writer = tiny_model("sdar"), Counting()
    with record(model, writer) as recorder:
        behind = []
        for _ in range(2 * MOST_WAITING):
            forward(model, prompt(8))
            behind.append(recorder.hooks.calls - writer.calls)
        assert max(behind) == most - 1 and behind[0] == 0
        forward(model, prompt(8))
        assert recorder.num_forwards == writer.calls == 2 * MOST_WAITING + 1


def test_an_announced_step_must_be_described():
    model = tiny_model("llada2")
    with pytest.raises(UserError, match="never described"), record(model) as recorder:
        recorder.announce("denoise", 0, 0)
        forward(model, prompt(8))
        forward(model, prompt(8))
    assert hooks_left(model) == 0


# It follows loops that tell it nothing.


def foreign_loop(model, tokens, gen_length, kv_cache=False, sample=None, stop_after=None):
    """A loop of somebody else's: calls the inner model, writes into the tensor it passed, tells nobody."""
    from transformers import DynamicCache

    length = tokens.shape[1]
    total = -(-(length + gen_length) // BLOCK) * BLOCK
    ids = torch.full((1, total), MASK, device=tokens.device)
    ids[:, :length] = tokens
    cache = DynamicCache() if kv_cache else None
    mask, positions = block_causal(total).to(tokens.device), torch.arange(total, device=tokens.device)[None]

    def run(low, high):
        hidden = model.model(
            ids[:, low:high], attention_mask=mask[:, :, low:high, :high], position_ids=positions[:, low:high],
            past_key_values=cache, use_cache=kv_cache,
        ).last_hidden_state  # fmt: skip
        return model.lm_head(hidden)

    calls = 0
    with torch.no_grad():
        first = length // BLOCK
        if kv_cache and first:
            run(0, first * BLOCK)
        for block in range(first, total // BLOCK):
            low, high = block * BLOCK, (block + 1) * BLOCK
            view = ids[:, low:high]
            while (view == MASK).any():
                logits = run(low if kv_cache else 0, high)[0, -BLOCK:]
                calls += 1
                if kv_cache:
                    cache.crop(-BLOCK)
                best = logits.argmax(-1) if sample is None else sample(logits)
                probability = logits.softmax(-1).gather(-1, best[:, None])[:, 0]
                masked = view[0] == MASK
                high_enough = masked & (probability > 0.9)
                if not high_enough.any():
                    high_enough[torch.where(masked, probability, -1.0).argmax()] = True
                view[0, high_enough] = best[high_enough]
                logits.zero_()
                if calls == stop_after:
                    return ids
            if kv_cache:
                run(low, high)
    return ids[:, : length + gen_length]


def same_calls(told, found):
    """All columns equal; probabilities to rounding, since the loop and the hook sum in another order."""
    assert len(told) == len(found)
    for a, b in zip(told, found, strict=True):
        assert [{**p, "duration_ns": 0} for p in a.parts] == [{**p, "duration_ns": 0} for p in b.parts]
        for name, values in a.tokens.items():
            if "confidence" in name:
                np.testing.assert_allclose(values, b.tokens[name], rtol=2e-5)
            else:
                assert np.array_equal(values, b.tokens[name]), name
        assert a.routing.layers == b.routing.layers
        assert np.array_equal(a.routing.expert_ids, b.routing.expert_ids)


@pytest.mark.parametrize("kv_cache", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [3, 13, 16])
def test_a_foreign_loop_gives_the_trace_of_one_that_tells(family, length, kv_cache):
    model, tokens = tiny_model(family), prompt(length, length)
    # Every position is known at the end of this many tokens, so nothing generated is cut from the foreign output.
    gen_length = 24 - length % BLOCK
    with record(model) as told:
        ours = decode_llada2(model, tokens, gen_length=gen_length, kv_cache=kv_cache, recorder=told, **OPTIONS)
    with record(model, mask_id=MASK, block_length=BLOCK) as found, found.request(prompt_tokens=length):
        ids = foreign_loop(model, tokens, gen_length, kv_cache)
        found.finish(ids)
    assert ids[0].tolist() == ours.ids.tolist()
    predicted_at_commit(told.calls, found.calls)
    same_calls(told.calls, found.calls)
    assert told.requests == found.requests
    assert found.unresolved == 0


def predicted_at_commit(told, found):
    """Commit calls have predictions in both: the head's argmax for the block's rows."""
    for a, b in zip(told, found, strict=True):
        if a.parts[0]["kind"] == "commit":
            assert (a.tokens["predicted_id"] >= 0).all() and (b.tokens["predicted_id"] >= 0).all()


@pytest.mark.parametrize("kv_cache", [False, True])
def test_requests_are_told_apart_without_help(kv_cache):
    model = tiny_model("sdar")
    lengths = [13, 13, 3, 16, 16, 21]
    prompts = [prompt(13, 1), prompt(13, 1), prompt(3, 2), prompt(16, 3), prompt(16, 4), prompt(21, 5)]
    with record(model) as recorder:
        outputs = [foreign_loop(model, tokens, 16, kv_cache) for tokens in prompts]
    assert [c.parts[0]["request_id"] for c in recorder.calls] == sorted(
        c.parts[0]["request_id"] for c in recorder.calls
    )
    by_request = {r: [c for c in recorder.calls if c.parts[0]["request_id"] == r] for r in range(6)}
    assert sorted({c.parts[0]["request_id"] for c in recorder.calls}) == list(range(6))
    for number, tokens in enumerate(prompts):
        calls = by_request[number]
        masked = [c.parts[0] for c in calls if c.parts[0]["kind"] == "denoise"]
        assert masked[0]["block"] == lengths[number] // BLOCK and masked[0]["step"] == 0
        known = {
            int(p): int(t)
            for p, t in zip(calls[0].tokens["position"], calls[0].tokens["token_id"])
            if p < lengths[number]
        }
        assert all(tokens[0, p] == t for p, t in known.items())
    if kv_cache:
        # The commit call after the last block shows what its last step accepted, so every request is whole.
        assert recorder.unresolved == 0 and [r["prompt_tokens"] for r in recorder.requests] == lengths
        assert [r["generated_tokens"] for r in recorder.requests] == [
            -(-(n + 16) // BLOCK) * BLOCK - n for n in lengths
        ]
    else:
        # Nobody said what came of the last step of a request, so it stays interrupted.
        assert recorder.unresolved > 0 and recorder.requests == []
    assert len(outputs) == 6


def test_a_sampled_token_is_stored_with_its_own_probability():
    model, tokens = tiny_model("llada2"), prompt(5)
    logits_seen, generator = [], torch.Generator().manual_seed(0)

    def sample(logits):
        logits_seen.append(logits.clone())
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0].masked_fill(torch.tensor([False]), 0)

    with record(model) as recorder, recorder.request(prompt_tokens=5):
        ids = foreign_loop(model, tokens, 19, sample=sample)
        recorder.finish(ids)
    other = 0
    for call, logits in zip(recorder.calls, logits_seen, strict=True):
        block = call.tokens["position"] // BLOCK == call.parts[0]["block"]
        distribution = logits.softmax(-1).numpy()
        for row, predicted, probability, best, best_probability, accepted, position in zip(
            range(BLOCK),
            call.tokens["predicted_id"][block],
            call.tokens["confidence"][block],
            call.tokens["argmax_id"][block],
            call.tokens["argmax_confidence"][block],
            call.tokens["accepted"][block],
            call.tokens["position"][block],
            strict=True,
        ):
            assert best == distribution[row].argmax()
            assert best_probability == pytest.approx(distribution[row].max(), rel=1e-5)
            if accepted:
                assert predicted == ids[0, position]
                assert probability == pytest.approx(distribution[row, predicted], rel=1e-4)
                other += predicted != best
    assert other > 0


def test_a_loop_that_stops_early_leaves_its_masks_unaccepted():
    model, tokens = tiny_model("sdar"), prompt(9)
    with record(model) as recorder, recorder.request(prompt_tokens=9):
        ids = foreign_loop(model, tokens, 15, stop_after=2)
        recorder.finish(ids)
    last = recorder.calls[-1]
    in_block = last.tokens["position"] >= BLOCK
    still = ids[0, BLOCK : 2 * BLOCK].numpy() == MASK
    was = last.tokens["state"][in_block] == 2
    assert np.array_equal(last.tokens["accepted"][in_block], was & ~still) and (was & still).any()
    assert recorder.unresolved == 0


class WithGenerate(nn.Module):
    """A model whose generate calls ``self.forward``, as LLaDA2's does, where no hook on the whole model would fire."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config = model, model.config

    def forward(self, tokens):
        return self.inner.lm_head(
            self.inner.model(tokens, attention_mask=block_causal(tokens.shape[1])).last_hidden_state
        )

    def get_output_embeddings(self):
        return self.inner.lm_head

    def generate(self, tokens, gen_length=11):
        total = -(-(tokens.shape[1] + gen_length) // BLOCK) * BLOCK
        ids = torch.cat((tokens, torch.full((len(tokens), total - tokens.shape[1]), MASK)), dim=1)
        for high in range(BLOCK, total + 1, BLOCK):
            view = ids[:, :high]
            while (view == MASK).any():
                best = self.forward(view).argmax(-1)
                for row in range(len(view)):
                    at = (view[row] == MASK).nonzero()[:3, 0]
                    view[row, at] = best[row, at]
        return ids[:, tokens.shape[1] :]


def test_a_models_own_generate_tells_where_requests_begin_and_end():
    model = WithGenerate(tiny_model("llada2"))
    with record(model) as recorder:
        outputs = [decode_own(model, prompt(5, seed), gen_length=11, recorder=recorder) for seed in (1, 1, 2)]
    assert [r["prompt_tokens"] for r in recorder.requests] == [5, 5, 5]
    assert [r["generated_tokens"] for r in recorder.requests] == [11, 11, 11] == [o.generated for o in outputs]
    assert [o.forwards for o in outputs] == [4, 4, 4] and recorder.unresolved == 0
    accepted = sum(int(c.tokens["accepted"].sum()) for c in recorder.calls)
    assert accepted == 33
    assert [(c.parts[0]["block"], c.parts[0]["step"]) for c in recorder.calls[:4]] == [(0, 0), (1, 0), (1, 1), (1, 2)]
    assert "generate" not in model.__dict__


def test_a_generate_inside_request_belongs_to_it():
    model = WithGenerate(tiny_model("llada2"))
    with record(model) as recorder, recorder.request(dataset="set", prompt_tokens=5, prompt="text"):
        result = decode_own(model, prompt(5), gen_length=11, recorder=recorder)
        recorder.finish(result.ids)
    (row,) = recorder.requests
    assert (row["dataset"], row["prompt"], row["generated_tokens"]) == ("set", "text", 11)


def test_a_batch_is_one_request_a_row(tmp_path):
    model, out = WithGenerate(tiny_model("llada2")), tmp_path / "batch.trace"
    tokens = torch.cat((prompt(5, 1), prompt(5, 2), prompt(5, 3)))
    with record(model, out) as recorder, torch.no_grad():
        model.generate(tokens)
    assert check(out) == []
    assert recorder.num_requests == 3
    trace = open_trace(out)
    assert trace.requests["generated_tokens"].to_list() == [11, 11, 11]
    first = next(trace.segments()).forwards
    assert first.request_id[:3].tolist() == [0, 1, 2] and first.row_start[:3].tolist() == [0, 8, 16]


def test_left_padding_is_told_from_tokens():
    model = tiny_model("sdar")
    tokens = torch.cat((prompt(16, 1), prompt(16, 2)))
    tokens[0, :5] = 0
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with record(model) as recorder, torch.no_grad():
        model(input_ids=tokens, attention_mask=mask, position_ids=positions)
    columns = recorder.calls[0].tokens
    assert columns["state"].reshape(2, 16)[0, :6].tolist() == [3] * 5 + [0]
    assert columns["position"].reshape(2, 16).tolist() == [[-1] * 5 + list(range(11)), list(range(16))]


# On disk.


@pytest.mark.parametrize("level", ["ids", "active", "scores"])
@pytest.mark.parametrize("loop", ["llada2", "cached", "sdar", "foreign"])
def test_traces_keep_every_requirement_of_the_format(tmp_path, loop, level):
    family = "sdar" if loop == "sdar" else "llada2"
    model, out = tiny_model(family), tmp_path / "a.trace"
    options = {"gen_length": 19, **OPTIONS, "eos_id": EOS}
    with record(model, out, level=level, decoding={"loop": loop, "threshold": 0.9}) as recorder:
        for seed, length in enumerate((3, 16, 21)):
            tokens = prompt(length, seed)
            if loop == "sdar":
                decode_sdar(model, tokens, recorder=recorder, **options)
            elif loop == "foreign":
                with recorder.request(prompt_tokens=length):
                    recorder.finish(foreign_loop(model, tokens, 19))
            else:
                decode_llada2(model, tokens, recorder=recorder, kv_cache=loop == "cached", early_stop=True, **options)
    assert check(out) == []
    meta = json.loads((out / "meta.json").read_text())
    assert meta["complete"] and meta["capture_level"] == level and meta["decoding"]["block_length"] == BLOCK
    trace = open_trace(out)
    assert trace.num_forwards == recorder.num_forwards and len(trace.requests) == 3
    assert recorder.bytes_written > 0


def test_appending_goes_on_numbering(tmp_path):
    model, out = tiny_model("llada2"), tmp_path / "a.trace"
    for seed in range(2):
        with record(model, out, append=True) as recorder:
            decode_sdar(model, prompt(9, seed), gen_length=8, recorder=recorder, **OPTIONS)
    assert check(out) == []
    assert open_trace(out).requests["request_id"].to_list() == [0, 1]


def test_appending_begins_an_interrupted_request_again(tmp_path):
    model, out = tiny_model("llada2"), tmp_path / "a.trace"
    plain = tmp_path / "plain.trace"
    with record(model, plain) as recorder:
        for seed in range(2):
            decode_sdar(model, prompt(9, seed), gen_length=8, recorder=recorder, **OPTIONS)
    steps = []

    def crash(step):
        steps.append(step)
        if len(steps) == recorder.num_forwards - 2:
            raise Crash

    with pytest.raises(Crash), record(model, out) as broken:
        for seed in range(2):
            decode_sdar(model, prompt(9, seed), gen_length=8, recorder=broken, on_step=crash, **OPTIONS)
    assert broken.num_requests == 1
    assert_unfinished(out, len(steps))
    with record(model, out, append=True) as again:
        decode_sdar(model, prompt(9, 1), gen_length=8, recorder=again, **OPTIONS)
    assert check(out) == []
    for table in ("requests", "forwards", "tokens", "rows"):
        found, expected = (open_trace(path).scan(table).collect() for path in (out, plain))
        if table == "forwards":
            found, expected = found.drop("duration_ns"), expected.drop("duration_ns")
        if table == "rows":
            # a layer's rows stand together in each segment, and the traces have other segments
            found, expected = (rows.sort("layer", "forward_id", "row") for rows in (found, expected))
        assert found.equals(expected), table


def test_accepted_tokens_rebuild_the_output():
    model, tokens = tiny_model("llada2"), prompt(11)
    with record(model) as recorder:
        result = decode_llada2(model, tokens, gen_length=21, recorder=recorder, **OPTIONS)
    ids = tokens[0].tolist() + [MASK] * 21
    for call in recorder.calls:
        rows = {int(p): i for i, p in enumerate(call.tokens["position"])}
        held = [ids[p] for p in sorted(rows)]
        assert held == [int(call.tokens["token_id"][rows[p]]) for p in sorted(rows)]
        for position, row in rows.items():
            state = call.tokens["state"][row]
            assert state == (2 if ids[position] == MASK else 0 if position < 11 else 1)
            if call.tokens["accepted"][row]:
                ids[position] = int(call.tokens["predicted_id"][row])
    assert ids == result.ids.tolist() and max(ids) < VOCAB
