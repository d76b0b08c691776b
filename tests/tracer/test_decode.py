"""The decoding loops and their accept rule, against rules written out."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_models import BLOCK, EOS, FAMILIES, MASK, VOCAB, block_causal, prompt, tiny_model
from tests.tracer.cells import cells
from tracer.decode import decode_llada2, decode_sdar
from tracer.decoding.accepting import accept, accept_rule, quotas
from tracer.decoding.block_loop import predict
from tracer.errors import UserError
from tracer.recording.context import record

OPTIONS = {"mask_id": MASK, "eos_id": None, "block_length": BLOCK, "steps": BLOCK}


def naive_accept(probability, masked, threshold, quota):
    """Rows above the threshold if they reach the quota, else the quota most probable masked rows, lowest row first."""
    rows = [r for r in range(len(masked)) if masked[r]]
    high = {r for r in rows if probability[r] > threshold}
    if threshold < 1 and len(high) >= quota:
        return high
    return set(sorted(rows, key=lambda r: (-probability[r], r))[:quota])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_accept_is_the_naive_rule(data):
    size = data.draw(st.integers(1, 12))
    # A few values only, so that ties and probabilities equal to the threshold are common.
    probability = data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.5, 0.75, 1.0]), min_size=size, max_size=size))
    masked = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    threshold = data.draw(st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]))
    quota = data.draw(st.integers(1, 13))
    known, found = ~np.array(masked), np.zeros(size, np.uint8)
    accept(accept_rule(threshold, [quota]), 0, known.view(np.uint8), np.array(probability, np.float32), found)
    assert set(found.nonzero()[0].tolist()) == naive_accept(probability, masked, threshold, quota)


@given(st.integers(1, 64), st.integers(1, 80))
def test_quotas_finish_a_block_in_time(block_length, steps):
    found = quotas(block_length, steps)
    assert len(found) == steps
    assert min(found) >= 1 and sum(found) >= block_length
    if block_length % steps == 0:
        assert set(found) == {block_length // steps}
    elif steps < block_length:
        assert sum(found) == block_length and max(found) - min(found) <= 1


def test_predict_at_temperature_zero_takes_the_argmax_and_never_the_mask():
    logits = torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    logits[:7, MASK] = 50
    token, probability, best, best_probability = predict(logits, MASK, 0.0, None)
    distribution = logits.softmax(-1)
    for row in range(20):
        allowed = [v for v in range(VOCAB) if v != MASK]
        assert token[row] == max(allowed, key=lambda v: distribution[row, v])
        assert probability[row] == distribution[row, token[row]]
    assert torch.equal(token, best) and torch.equal(probability, best_probability)


def test_predict_draws_from_the_distribution_at_its_temperature():
    logits = torch.tensor([[0.0, -50.0, 1.0, 2.0]]).repeat(20000, 1)
    token, probability, best, _ = predict(logits, 1, 0.5, torch.Generator().manual_seed(0))
    expected = (logits[0] / 0.5).softmax(-1)
    share = torch.bincount(token, minlength=4) / len(token)
    assert torch.allclose(share, expected, atol=0.01)
    assert torch.equal(probability, expected[token]) and set(best.tolist()) == {3}


def naive_llada2(model, tokens, gen_length, threshold, quota):
    """The loop in its plainest form: the whole window at every step, logits straight from the model."""
    length = tokens.shape[1]
    total = -(-(length + gen_length) // BLOCK) * BLOCK
    ids = tokens[0].tolist() + [MASK] * (total - length)
    calls = 0
    for block in range(length // BLOCK, total // BLOCK):
        low, high = block * BLOCK, (block + 1) * BLOCK
        while MASK in ids[low:high]:
            with torch.no_grad():
                logits = model(
                    input_ids=torch.tensor([ids[:high]]),
                    attention_mask=block_causal(high),
                    position_ids=torch.arange(high)[None],
                ).logits[0, low:high]
            calls += 1
            distribution = logits.float().softmax(-1)
            best = distribution.argmax(-1).tolist()
            probability = [float(distribution[r, best[r]]) for r in range(BLOCK)]
            masked = [token == MASK for token in ids[low:high]]
            for row in naive_accept(probability, masked, threshold, quota):
                ids[low + row] = best[row]
    return ids[: length + gen_length], calls


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [3, 8, 13])
@pytest.mark.parametrize("threshold", [0.3, 0.95])
def test_loop_is_the_naive_loop(family, length, threshold):
    model, tokens = tiny_model(family), prompt(length, seed=length)
    expected, calls = naive_llada2(model, tokens, 20, threshold, 1)
    result = decode_llada2(model, tokens, gen_length=20, threshold=threshold, **OPTIONS)
    assert result.ids.tolist() == expected
    assert result.forwards == calls and result.generated == 20 and result.stop_reason == "length"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [5, 16, 21])
def test_cached_and_full_window_decoding_route_alike(family, length):
    """Same tokens, and the same expert sets at equal positions of equal steps, except where the router all but ties."""
    model, tokens = tiny_model(family), prompt(length, seed=length)
    seen = []
    for kv_cache in (False, True):
        with record(model, level="scores") as recorder:
            result = decode_llada2(
                model, tokens, gen_length=24, threshold=0.99, kv_cache=kv_cache, recorder=recorder, **OPTIONS
            )
        routed = {}
        for call in recorder.calls:
            part = call.parts[0]
            if part["kind"] == "denoise":
                for layer, cell in cells(call.routing).items():
                    for row, position in enumerate(call.tokens["position"]):
                        if position // BLOCK == part["block"]:
                            key = (part["block"], part["step"], layer, int(position))
                            routed[key] = (set(cell["expert_ids"][row].tolist()), cell["router_scores"][row])
        seen.append((result.ids.tolist(), routed))
    (full_ids, full), (cached_ids, cached) = seen
    assert full_ids == cached_ids
    assert full.keys() == cached.keys() and len(full) > 200
    router = recorder.meta["router"]
    ties = 0
    for key, (experts, scores) in full.items():
        other, other_scores = cached[key]
        np.testing.assert_allclose(scores, other_scores, atol=1e-5)
        bias = np.array(router["expert_bias"][str(key[2])], np.float32) if router["expert_bias"] else 0
        if experts != other:
            assert margin(scores + bias, 2, router["n_group"], router["topk_group"]) < 1e-5
            ties += 1
    assert ties <= len(full) // 500


def margin(selection, top_k, n_group, topk_group):
    """How near a row is to choosing otherwise: the K-th score above the next, or the last kept group above the next."""
    groups = selection.reshape(n_group, -1)
    strength = np.sort(groups, axis=1)[:, -2:].sum(axis=1)
    order = np.argsort(-strength)
    allowed = np.sort(np.concatenate([groups[g] for g in order[:topk_group]]))[::-1]
    gaps = [allowed[top_k - 1] - allowed[top_k]]
    if topk_group < n_group:
        gaps.append(strength[order[topk_group - 1]] - strength[order[topk_group]])
    return min(gaps)


@pytest.mark.parametrize("family", FAMILIES)
def test_sdar_prefills_denoises_and_commits(family):
    model, tokens = tiny_model(family), prompt(19)
    with record(model) as recorder:
        result = decode_sdar(model, tokens, gen_length=16, recorder=recorder, **OPTIONS)
    assert result.forwards == len(recorder.calls)
    parts = [call.parts[0] for call in recorder.calls]
    assert (parts[0]["kind"], parts[0]["num_tokens"], parts[0]["kv_tokens"]) == ("prefill", 16, 0)
    for block in (2, 3, 4):
        own = [p for p in parts if p["block"] == block]
        assert [p["kind"] for p in own] == ["denoise"] * (len(own) - 1) + ["commit"]
        assert [p["step"] for p in own] == [*range(len(own) - 1), -1]
        assert {p["kv_tokens"] for p in own} == {block * BLOCK}
        assert {p["num_tokens"] for p in own} == {BLOCK}
        assert sum(p["num_accepted"] for p in own) == own[0]["num_masked"]
    assert parts[1]["num_masked"] == BLOCK - 19 % BLOCK


class SDARForCausalLM(torch.nn.Module):
    """Takes the cache the way SDAR's own modeling file does: it keeps what a call computed only when told so."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config, self.told = model, model.config, []

    def forward(self, past_key_values, store_kv=False, **arguments):
        self.told.append(store_kv)
        assert arguments["attention_mask"].dtype == torch.bool
        used = past_key_values if store_kv else copy.deepcopy(past_key_values)
        return self.inner(past_key_values=used, **arguments)


def test_sdar_models_are_told_what_to_store():
    model, tokens = tiny_model("sdar"), prompt(11)
    expected = decode_sdar(model, tokens, gen_length=24, **OPTIONS)
    wrapped = SDARForCausalLM(model)
    result = decode_sdar(wrapped, tokens, gen_length=24, **OPTIONS)
    assert torch.equal(result.ids, expected.ids) and result.forwards == expected.forwards
    assert wrapped.told[0] and wrapped.told[-1] and wrapped.told.count(True) == 1 + 4


def test_a_model_that_ignores_the_cache_is_refused():
    model = tiny_model("sdar")
    plain = model.forward
    model.forward = lambda past_key_values, **arguments: plain(
        past_key_values=None, **{**arguments, "use_cache": False}
    )
    with pytest.raises(UserError, match="did not store its keys and values"):
        decode_sdar(model, prompt(8), gen_length=8, **OPTIONS)


def test_both_loops_decode_alike_with_a_cache():
    model, tokens = tiny_model("sdar"), prompt(11)
    one = decode_sdar(model, tokens, gen_length=24, **OPTIONS)
    other = decode_llada2(model, tokens, gen_length=24, kv_cache=True, **OPTIONS)
    assert torch.equal(one.ids, other.ids) and one.forwards == other.forwards


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_low_precision_models_take_the_mask(family, dtype):
    model = tiny_model(family, dtype)
    for kv_cache in (False, True):
        result = decode_llada2(model, prompt(5), gen_length=8, kv_cache=kv_cache, **OPTIONS)
        assert result.generated == 8 and MASK not in result.ids.tolist()


def test_eager_attention_gets_an_additive_mask():
    model, tokens = tiny_model("sdar"), prompt(9)
    expected = decode_sdar(model, tokens, gen_length=16, **OPTIONS)
    model.set_attn_implementation("eager")
    assert torch.equal(decode_sdar(model, tokens, gen_length=16, **OPTIONS).ids, expected.ids)


def test_a_seed_makes_drawing_reproducible():
    model, tokens = tiny_model("llada2"), prompt(6)
    draw = lambda seed: decode_llada2(model, tokens, gen_length=16, temperature=1.0, seed=seed, **OPTIONS).ids.tolist()  # noqa: E731
    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize("kv_cache", [False, True])
def test_decoding_ends_with_the_block_of_the_end_token(kv_cache):
    model, tokens = tiny_model("llada2"), prompt(6)
    free = decode_llada2(model, tokens, gen_length=32, kv_cache=kv_cache, **OPTIONS)
    end = int(free.ids[12])
    first = next(i for i in range(6, len(free.ids)) if free.ids[i] == end)
    result = decode_llada2(model, tokens, gen_length=32, kv_cache=kv_cache, **{**OPTIONS, "eos_id": end})
    assert result.stop_reason == "eos" and result.generated == first - 5
    assert result.ids.tolist() == free.ids[: first + 1].tolist()
    assert result.forwards < free.forwards


def test_early_stop_leaves_the_rest_of_the_block_masked():
    model, tokens = tiny_model("llada2"), prompt(8)
    free = decode_llada2(model, tokens, gen_length=16, threshold=1.0, **OPTIONS)
    end = int(free.ids[8])
    options = {**OPTIONS, "eos_id": end, "threshold": 1.0, "gen_length": 16}
    whole, early = decode_llada2(model, tokens, **options), decode_llada2(model, tokens, early_stop=True, **options)
    assert early.ids.tolist() == whole.ids.tolist() == free.ids[:9].tolist()
    assert early.stop_reason == "eos" and early.forwards <= whole.forwards


def test_steps_are_told_in_order():
    model, told = tiny_model("sdar"), []
    result = decode_sdar(model, prompt(10), gen_length=22, on_step=told.append, **OPTIONS)
    assert len(told) == result.forwards
    assert told[-1].generated == 22
    assert [s.generated for s in told] == sorted(s.generated for s in told)
    assert told[0].kind == "prefill" and told[-1].kind == "commit"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gen_length": 0}, "gen_length"),
        ({"block_length": 0}, "block_length"),
        ({"block_length": 2.5}, "block_length"),
        ({"steps": 0}, "steps"),
        ({"threshold": 1.5}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"mask_id": None}, "mask_id"),
        ({"gen_length": 90}, "the model takes 96"),
    ],
)
@pytest.mark.parametrize("decode", [decode_llada2, decode_sdar])
def test_bad_options_are_told_in_one_sentence(decode, changes, words):
    with pytest.raises(UserError, match=words):
        decode(tiny_model("llada2"), prompt(10), **{"gen_length": 8, **OPTIONS, **changes})


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([], "empty"),
        (torch.zeros(2, 4, dtype=torch.long), "one prompt at a time"),
        ([VOCAB], "outside the vocabulary"),
        ([-1], "outside the vocabulary"),
        ([0.5], "token ids"),
        (list(range(3, 53)) * 2, "the model takes 96"),
    ],
)
def test_bad_prompts_are_told_in_one_sentence(tokens, words):
    with pytest.raises(UserError, match=words):
        decode_sdar(tiny_model("sdar"), tokens, gen_length=8, **OPTIONS)


def test_end_token_of_the_prompt_does_not_end_anything():
    tokens = torch.tensor([[5, EOS, 7, EOS, 9]])
    result = decode_llada2(tiny_model("llada2"), tokens, gen_length=8, **{**OPTIONS, "eos_id": EOS})
    assert result.generated >= 1 and result.ids[:5].tolist() == tokens[0].tolist()


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for seed in (None, 7):
        decode_llada2(tiny_model_kept("llada2"), prompt(4), gen_length=4, temperature=1.0, seed=seed, **OPTIONS)
    assert torch.equal(torch.rand(3), expected)


def tiny_model_kept(family):
    """A tiny model, made without touching the global generator."""
    with torch.random.fork_rng():
        return tiny_model(family)
