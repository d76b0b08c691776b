"""What released models leave out of their configs: masks, end tokens, block lengths, and loops of models without any."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tests.tiny_models import BLOCK, MASK, block_causal, prompt, tiny_model
from tracer.capture import run_capture
from tracer.capture_plan import CaptureOptions, demo_prompts, plan_capture
from tracer.checking import check
from tracer.errors import UserError
from tracer.families import DecodingFacts, decoding_facts
from tracer.models import load_model
from tracer.parquet import open_trace
from tracer.recording.context import record

RELEASED, RELEASED_MASK, RELEASED_END = 157184, 156895, 156892


def bare(class_name="Model", **config):
    """A module without weights: what facts are read from is its config and the name of its class."""
    model = type(class_name, (nn.Module,), {})()
    model.config = SimpleNamespace(**config)
    return model


@pytest.mark.parametrize(
    ("model", "facts"),
    [
        (bare(model_type="llada2_moe", vocab_size=RELEASED), DecodingFacts("llada2", 156895, 156892, 32)),
        (bare("LLaDA2MoeModelLM", vocab_size=RELEASED), DecodingFacts("llada2", 156895, 156892, 32)),
        (bare(model_type="sdar_moe", vocab_size=151936, block_size=4), DecodingFacts("sdar", 151669, None, 4)),
        (bare(model_type="llada", vocab_size=RELEASED), DecodingFacts("own", 156895, None, None)),
        (bare(model_type="diffusion_gemma", vocab_size=262144), DecodingFacts("own", None, None, 256)),
        (bare(model_type="qwen3_moe", vocab_size=151936, eos_token_id=[5, 6]), DecodingFacts("own", None, 5, None)),
        (bare(model_type="qwen3_moe", vocab_size=64, mask_token_id=1), DecodingFacts("sdar", 1, None, None)),
        # A small vocabulary does not hold the released ids, and what the config says goes first.
        (bare(model_type="llada2_moe", vocab_size=64), DecodingFacts("own", None, None, 32)),
        (
            bare(model_type="llada2_moe", vocab_size=64, mask_token_id=3, block_length=8),
            DecodingFacts("llada2", 3, None, 8),
        ),
        # LLaDA2's vocabulary on a model of another kind, which may be autoregressive.
        (bare(model_type="bailing_moe", vocab_size=RELEASED), DecodingFacts("own", None, None, None)),
    ],
)
def test_config_first_then_the_family(model, facts):
    assert decoding_facts(model) == facts


@pytest.mark.parametrize("name", ["inclusionAI/LLaDA2.0-mini", "Qwen/Qwen1.5-MoE-A2.7B", "JetLM/SDAR-30B-A3B-Chat"])
def test_hub_ids_may_hold_dots(name, monkeypatch):
    asked = []

    def missing(source, **options):
        asked.append(source)
        raise OSError("not here")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", missing)
    with pytest.raises(UserError, match="could not be loaded: not here"):
        load_model(name, device="cpu")
    assert asked == [name]


class LLaDA2Released(nn.Module):
    """A model as LLaDA2 is released: config without mask, end and block; generate knows them, fills blocks, cuts the result."""

    def __init__(self, vocabulary=RELEASED, mask=RELEASED_MASK):
        super().__init__()
        self.inner, self.mask = tiny_model("llada2", vocab_size=vocabulary, num_hidden_layers=2), mask
        self.config = self.inner.config
        for name in ("mask_token_id", "block_length", "eos_token_id"):
            setattr(self.config, name, None)
        with torch.no_grad():
            self.inner.lm_head.weight[RELEASED_END:] = 0

    def forward(self, input_ids, attention_mask):
        hidden = self.inner.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return SimpleNamespace(logits=self.inner.lm_head(hidden))

    def get_output_embeddings(self):
        return self.inner.lm_head

    @torch.no_grad()
    def generate(self, inputs, gen_length=32, block_length=32, threshold=0.9):
        length = inputs.shape[1]
        total = -(-(length + gen_length) // block_length) * block_length
        x = torch.full((1, total), self.mask)
        x[:, :length] = inputs
        for high in range((length // block_length + 1) * block_length, total + 1, block_length):
            now = x[:, :high].clone()
            while (now == self.mask).any():
                logits = self.forward(now, attention_mask=block_causal(high, block_length)).logits
                probability, best = logits[0, -block_length:].softmax(-1).max(-1)
                block = now[0, -block_length:]
                left = block == self.mask
                sure = left & (probability > threshold)
                if sure.sum() < 4:
                    sure = torch.zeros_like(left)
                    sure[torch.where(left, probability, -1.0).topk(min(4, int(left.sum()))).indices] = True
                block[sure] = best[sure]
            x[:, :high] = now
        return x[:, : length + gen_length]


def test_an_adapter_is_named_on_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "my_reader.py").write_text(
        "def read(gate, args, output):\n"
        "    logits, weights, expert_ids = output\n"
        "    return expert_ids, weights, logits\n"
    )
    monkeypatch.chdir(tmp_path)
    options = CaptureOptions(level="ids", gen_length=4, adapter="my_reader:read", mask_id=3, eos_id=4)
    plan = plan_capture("demo:sdar", Path("a.trace"), demo_prompts()[:1], options)
    assert run_capture(plan).requests == 1
    meta = open_trace(tmp_path / "a.trace").meta.raw
    assert meta["router"]["adapter"] == "user"
    assert (meta["decoding"]["mask_id"], meta["decoding"]["eos_id"]) == (3, 4)


def test_a_released_models_own_generate_is_recorded_as_denoising(tmp_path, capsys):
    model = LLaDA2Released()
    with record(model, tmp_path / "a.trace"):
        assert capsys.readouterr().err == "Level scores: about 2.34 kB a forward of 32 rows.\n"
        output = model.generate(prompt(20), gen_length=44)
    assert check(tmp_path / "a.trace") == []
    trace = open_trace(tmp_path / "a.trace")
    assert trace.meta.raw["decoding"]["mask_id"] == RELEASED_MASK
    assert trace.meta.raw["capture_level"] == "scores"
    forwards = trace.scan("forwards").collect()
    assert set(forwards["kind"]) == {"denoise"} and set(forwards["block"]) == {0, 1}
    assert forwards["num_accepted"].sum() == 44 and (forwards["num_accepted"] > 0).all()
    tokens = trace.scan("tokens").collect()
    accepted = tokens.filter(tokens["accepted"]).sort("position")
    assert accepted["predicted_id"].to_list() == output[0, 20:].tolist()


def test_denoising_without_a_known_mask_is_refused():
    model = LLaDA2Released(vocabulary=64, mask=MASK)
    with pytest.raises(UserError, match="no mask token is known; pass mask_id="), record(model):
        model.generate(prompt(20), gen_length=12)
    # Nor outside of generate, where nothing tells requests apart.
    with pytest.raises(UserError, match="no mask token is known; pass mask_id="), record(model):
        LLaDA2Released.generate(model, prompt(20), gen_length=12)
    with record(model, mask_id=MASK) as recorder:
        model.generate(prompt(20), gen_length=12)
    assert {call.parts[0]["kind"] for call in recorder.calls} == {"denoise"}


@pytest.mark.parametrize("given", [{"mask_id": 500}, {"eos_id": 500}])
def test_ids_outside_the_vocabulary_are_refused(given):
    with pytest.raises(UserError, match=r"_id=500 lies outside the model's vocabulary of 500 tokens"):
        decoding_facts(bare(vocab_size=500), **given)


@pytest.mark.parametrize("kv_cache", [False, True])
def test_autoregressive_decoding_needs_no_mask(kv_cache):
    model = tiny_model("sdar")
    model.config.mask_token_id = None
    with record(model) as recorder:
        for seed in (1, 2):
            model.generate(prompt(9, seed), max_new_tokens=6, do_sample=False, use_cache=kv_cache, eos_token_id=None)
    assert [row["prompt_tokens"] for row in recorder.requests] == [9, 9]
    assert [row["generated_tokens"] for row in recorder.requests] == [6, 6]


def test_prompts_of_one_length_are_no_denoising():
    model = tiny_model("sdar")
    model.config.mask_token_id = None
    with record(model) as recorder, torch.no_grad():
        for seed in (1, 2):
            model(input_ids=prompt(2 * BLOCK, seed))
    assert [call.parts[0]["kind"] for call in recorder.calls] == ["prefill"] * 2
    assert np.all([call.tokens["state"] == 0 for call in recorder.calls])
