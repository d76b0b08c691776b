"""Every adapter against what the experts really received or ran."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from tests.made_up.routers import route_row
from tests.tiny_models import MASK, VOCAB, hooks_left, prompt, tiny_model
from tests.tracer.cells import cells
from tracer.adapters.find import find_gates
from tracer.checking import check
from tracer.errors import UserError
from tracer.recording.context import record
from tracer.schema import NOISE
from tracer.trace import RouterSpec

BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
E = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
LATENT = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_shared_experts": 1,
}
ERNIE = {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 0}
# family -> (settings, score function, adapter)
NATIVE = {
    "qwen3_moe": (E, "softmax"),
    "qwen2_moe": ({**E, "shared_expert_intermediate_size": 16}, "softmax"),
    "mixtral": (LOCAL, "softmax"),
    "olmoe": (E, "softmax"),
    "deepseek_v2": ({**LATENT, "topk_method": "group_limited_greedy"}, "softmax"),
    "deepseek_v3": (LATENT, "sigmoid"),
    "glm4_moe": (LATENT, "sigmoid"),
    "gpt_oss": (LOCAL, "softmax"),
    "minimax": (LOCAL, "softmax"),
    "minimax_m2": (LOCAL, "sigmoid"),
    "hunyuan_v1_moe": ({"num_experts": 8, "moe_topk": 2}, "softmax"),
    "ernie4_5_moe": (ERNIE, "softmax"),
    "dots1": (LATENT, "sigmoid"),
    "granitemoe": (LOCAL, "softmax"),
    "flex_olmo": (E, "softmax"),
    "gemma4_text": ({**E, "top_k_experts": 2, "enable_moe_block": True}, "softmax"),
}


def native(family, settings):
    """A tiny native model with weights, biases and per-expert scales large enough to matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**BASE, **settings})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.4, generator=generator)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "correction_bias" in name:
                tensor.uniform_(-0.3, 0.3, generator=generator)
            if name.endswith("per_expert_scale"):
                tensor.uniform_(0.5, 1.5, generator=generator)
    return model


def listen(model, gates):
    """What every experts module receives: {layer: [(ids, weights), ...]}, filled as the model runs."""
    received = {gate.layer: [] for gate in gates.gates}
    for gate in gates.gates:
        gate.experts.register_forward_pre_hook(
            lambda m, a, k, n=gate.layer: received[n].append([v.clone() for v in (*a, *k.values())][1:3]),
            with_kwargs=True,
        )
    return received


def spec_of(meta, layer):
    """The rule in meta.json as the simulator will read it."""
    rule, model = meta["router"], meta["model"]
    vector = lambda name: None if rule[name] is None else np.array(rule[name][str(layer)], np.float32)  # noqa: E731
    return RouterSpec(
        num_experts=model["num_experts"],
        top_k=model["top_k"],
        score_function=rule["score_function"],
        norm_topk_prob=rule["norm_topk_prob"],
        n_group=rule["n_group"],
        topk_group=rule["topk_group"],
        routed_scaling_factor=rule["routed_scaling_factor"],
        expert_bias=vector("expert_bias"),
        bias_in_weights=rule["bias_in_weights"],
        group_score=rule["group_score"],
        expert_scale=vector("expert_scale"),
    )


def check_rule(recorder):
    """The recorded scores lead to the recorded ids and weights by the rule in meta.json, written out row by row."""
    meta = recorder.meta
    assert meta["router"]["verified"]
    for call in recorder.calls:
        for layer, cell in cells(call.routing).items():
            spec = spec_of(meta, layer)
            for scores, ids, weights in zip(
                cell["router_scores"], cell["expert_ids"], cell["gate_weights"], strict=True
            ):
                expected, expected_weights = route_row(scores, spec)
                assert set(expected) == set(ids.tolist())
                by_id = dict(zip(expected, expected_weights, strict=True))
                np.testing.assert_allclose(weights, [by_id[e] for e in ids.tolist()], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("family", NATIVE)
def test_native_routers_are_read_as_the_experts_receive_them(family):
    settings, function = NATIVE[family]
    model = native(family, settings)
    received = listen(model, find_gates(model))
    with torch.no_grad(), record(model, level="scores") as recorder:
        for seed in range(2):
            model(input_ids=prompt(12, seed), use_cache=False)
    assert recorder.meta["router"]["score_function"] == function
    assert recorder.gates.gates[0].adapter == ("gemma" if family == "gemma4_text" else "router_tuple")
    for number, call in enumerate(recorder.calls):
        assert list(call.routing.layers) == sorted(received) == recorder.meta["model"]["moe_layers"]
        for layer, cell in cells(call.routing).items():
            ids, weights = received[layer][number]
            assert np.array_equal(cell["expert_ids"], ids.numpy())
            assert np.array_equal(cell["gate_weights"], weights.half().numpy())
    check_rule(recorder)


def test_llada2_order_is_not_mistaken_for_the_native_one():
    for family, adapter in (("llada2", "llada2"), ("sdar", "router_tuple")):
        model = tiny_model(family)
        received = listen(model, find_gates(model))
        with torch.no_grad(), record(model, level="scores") as recorder:
            model(input_ids=prompt(16))
        assert {gate.adapter for gate in recorder.gates.gates} == {adapter}
        for layer, cell in cells(recorder.calls[0].routing).items():
            assert np.array_equal(cell["expert_ids"], received[layer][0][0].numpy())
        check_rule(recorder)


def test_llada2_gate_under_another_name_is_still_read():
    model = tiny_model("llada2")
    for layer in model.model.layers[1:]:
        kind = type(layer.mlp.gate)
        layer.mlp.gate.__class__ = type("SomebodysGate", (kind,), {})
    with torch.no_grad(), record(model, level="scores") as recorder:
        model(input_ids=prompt(16))
    assert recorder.gates.gates[0].adapter == "router_tuple"
    check_rule(recorder)


def test_sparse_mixer_works_at_level_ids_only():
    model = native("phimoe", LOCAL)
    received = listen(model, find_gates(model))
    with torch.no_grad(), record(model, level="ids") as recorder:
        model(input_ids=prompt(12), use_cache=False)
    assert not recorder.meta["router"]["verified"]
    for layer, cell in cells(recorder.calls[0].routing).items():
        assert np.array_equal(cell["expert_ids"], received[layer][0][0].numpy())
    with pytest.raises(UserError, match="level ids works"), torch.no_grad(), record(model, level="scores"):
        model(input_ids=prompt(12), use_cache=False)


def test_llama4_is_refused():
    model = native("llama4_text", LOCAL)
    with pytest.raises(UserError, match="Llama4Router returns no ids"), torch.no_grad(), record(model):
        model(input_ids=prompt(12), use_cache=False)
    assert hooks_left(model) == 0


# Blocks with a plain linear gate, as remote code and transformers 4 write them.


class Expert(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.up, self.down = nn.Linear(hidden, inner, bias=False), nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.up(x)))


class LinearBlock(nn.Module):
    """Softmax, top-k, perhaps a bias that counts in the weights, perhaps a division; experts one by one."""

    def __init__(self, hidden=32, num_experts=12, top_k=3, normed=True, bias=False, wrong=None):
        super().__init__()
        self.gate = nn.Linear(hidden, num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(hidden, 8) for _ in range(num_experts))
        self.top_k, self.normed, self.wrong = top_k, normed, wrong
        if bias:
            self.register_buffer("expert_bias", torch.rand(num_experts) * 0.05)
        self.seen = []

    def forward(self, hidden):
        rows = hidden.reshape(-1, hidden.shape[-1])
        scores = self.gate(rows).softmax(dim=-1, dtype=torch.float)
        if hasattr(self, "expert_bias"):
            scores = scores + self.expert_bias
        weights, ids = scores.topk(self.top_k, dim=-1)
        if self.normed:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if self.wrong == "shift":
            ids = (ids + 1) % len(self.experts)
        if self.wrong == "double":
            weights = weights * 2
        weights = weights.to(hidden.dtype)
        self.seen.append((ids, weights))
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(ids == number)
            out.index_add_(0, row, expert(rows[row]) * weights[row, slot, None])
        return out.view_as(hidden), None


class LinearModel(nn.Module):
    """Embeddings, MoE blocks with residuals, head."""

    def __init__(self, layers=2, top_k_named=True, config_norm=None, **block):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 32)
        self.layers = nn.ModuleList(LinearBlock(**block) for _ in range(layers))
        self.lm_head = nn.Linear(32, VOCAB)
        self.config = type("Config", (), {})()
        self.config.num_experts_per_tok, self.config.hidden_size = 3, 32
        if config_norm is not None:
            self.config.norm_topk_prob = config_norm

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)[0]
        return self.lm_head(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(("normed", "bias"), [(True, False), (False, False), (False, True)])
def test_linear_gates_are_recomputed_as_the_block_does(normed, bias, told, dtype):
    model = LinearModel(normed=normed, bias=bias, config_norm=normed if told else None).to(dtype)
    with torch.no_grad(), record(model, level="scores", mask_id=MASK) as recorder:
        for seed in range(3):
            model(prompt(16, seed))
    assert recorder.gates.gates[0].adapter == "linear_gate"
    rule = recorder.meta["router"]
    assert rule["norm_topk_prob"] == normed and rule["bias_in_weights"] == bias == (rule["expert_bias"] is not None)
    for number, call in enumerate(recorder.calls):
        for layer, cell in cells(call.routing).items():
            ids, weights = model.layers[layer].seen[number]
            assert np.array_equal(cell["expert_ids"], ids.numpy())
            assert np.array_equal(cell["gate_weights"], weights.half().numpy())
    if dtype == torch.float32:
        check_rule(recorder)
    assert hooks_left(model) == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"wrong": "shift"}, "selected"),
        ({"wrong": "double"}, "not what its block returns"),
        ({"normed": False, "config_norm": True}, "not what its block returns"),
    ],
)
def test_a_linear_gate_whose_block_does_something_else_is_refused(settings, words):
    model = LinearModel(**settings)
    with pytest.raises(UserError, match=words), torch.no_grad(), record(model, mask_id=MASK):
        model(prompt(16))
    assert hooks_left(model) == 0


def test_a_linear_gate_whose_experts_cannot_be_watched_is_refused():
    model = LinearModel()
    for layer in model.layers:
        layer.forward = lambda x, layer=layer: (layer.gate(x).sum(dim=-1, keepdim=True) + x, None)
    with pytest.raises(UserError, match="could not be watched"), torch.no_grad(), record(model, mask_id=MASK):
        model(prompt(16))


def test_a_block_that_restricts_after_its_gate_is_refused():
    """A gate's ids are worth nothing where the block goes on to use other experts, as restricting methods do."""
    model = tiny_model("llada2")
    model.model.layers[2].mlp.experts.register_forward_pre_hook(lambda m, a: (a[0], (a[1] + 1) % 16, a[2]))
    with pytest.raises(UserError, match="other ids than it selected"), torch.no_grad(), record(model):
        model(input_ids=prompt(16))


def test_shared_experts_leave_the_rule_to_the_configuration():
    for config_norm, refused in ((None, True), (True, False)):
        model = LinearModel(config_norm=config_norm)
        for layer in model.layers:
            layer.shared_expert = Expert(32, 8)
            plain = layer.forward
            layer.forward = lambda x, layer=layer, plain=plain: (plain(x)[0] + layer.shared_expert(x), None)
        if refused:
            with pytest.raises(UserError, match="divides the weights"), torch.no_grad(), record(model, mask_id=MASK):
                model(prompt(16))
        else:
            with torch.no_grad(), record(model, mask_id=MASK, level="scores") as recorder:
                model(prompt(16))
            check_rule(recorder)


def test_a_users_own_reader_comes_first():
    model = LinearModel()

    def read(gate, args, output):
        scores = output.reshape(-1, 12).softmax(-1)
        weights, ids = scores.topk(3, dim=-1)
        return ids, weights / weights.sum(-1, keepdim=True), output.reshape(-1, 12)

    with torch.no_grad(), record(model, adapter=read, level="scores", mask_id=MASK) as recorder:
        model(prompt(16))
    assert recorder.gates.gates[0].adapter == "user"
    for layer, cell in cells(recorder.calls[0].routing).items():
        assert np.array_equal(cell["expert_ids"], model.layers[layer].seen[0][0].numpy())


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (lambda n: torch.zeros(n, 3, dtype=torch.long), "same expert twice"),
        (lambda n: torch.tensor([[0, 1, 12]]).expand(n, 3), "outside 0..11"),
        (lambda n: torch.tensor([[0, 1]]).expand(n, 2), "shape"),
        (lambda n: torch.tensor([[0, 1, 2]]).expand(n - 1, 3), "shape"),
        (lambda n: torch.tensor([[0, 1, 2]]).expand(n, 3), "ran on"),
    ],
)
def test_ids_that_cannot_be_are_refused(ids, words):
    model = LinearModel()
    read = lambda gate, args, output: (ids(16), None, None)  # noqa: E731
    with pytest.raises(UserError, match=words), torch.no_grad(), record(model, adapter=read, mask_id=MASK):
        model(prompt(16))
    assert hooks_left(model) == 0


# DiffusionGemma: its own generate, encoder and decoder roles, no mask token.


def diffusion_gemma():
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, Gemma4VisionConfig
    from transformers.models.diffusion_gemma.configuration_diffusion_gemma import DiffusionGemmaTextConfig

    text = DiffusionGemmaTextConfig(
        **{**BASE, "num_key_value_heads": 2, "max_position_embeddings": 128},
        global_head_dim=8,
        num_experts=8,
        top_k_experts=2,
        moe_intermediate_size=16,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
    )
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8}
    vision = Gemma4VisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, **heads)
    torch.manual_seed(0)
    model = DiffusionGemmaForBlockDiffusion(
        DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=16)
    ).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2, generator=generator)
        for layer in model.model.decoder.layers:
            layer.router.per_expert_scale.uniform_(0.5, 1.5, generator=generator)
    return model


def generate(model, seed=3):
    torch.manual_seed(seed)
    return model.generate(prompt(11), max_new_tokens=32, max_denoising_steps=5).sequences


def test_diffusion_gemma_is_followed_through_its_own_generate(tmp_path):
    model = diffusion_gemma()
    plain = generate(model)
    received = {}
    for role in ("encoder", "decoder"):
        stack = model.model.decoder if role == "decoder" else model.model.encoder.language_model
        for n, layer in enumerate(stack.layers):
            layer.experts.register_forward_pre_hook(
                lambda m, a, key=(role, n): received.setdefault(key, []).append([v.clone() for v in a[1:3]])
            )
    compiled = model.generation_config.disable_compile
    with record(model, level="scores") as recorder:
        recorded = generate(model)
    assert torch.equal(plain, recorded)
    assert model.generation_config.disable_compile == compiled and "_prepare_sampler" not in model.__dict__
    kinds = [call.parts[0]["kind"] for call in recorder.calls]
    assert kinds == ["prefill", *["denoise"] * 5, "commit", *["denoise"] * 5]
    assert [call.parts[0]["kv_tokens"] for call in recorder.calls] == [0, *[11] * 6, *[27] * 5]
    counters = {"encoder": 0, "decoder": 0}
    for call in recorder.calls:
        role = "decoder" if call.parts[0]["kind"] == "denoise" else "encoder"
        for layer, cell in cells(call.routing).items():
            ids, weights = received[role, layer][counters[role]]
            assert np.array_equal(cell["expert_ids"], ids.numpy())
            assert np.array_equal(cell["gate_weights"], weights.half().numpy())
        counters[role] += 1
    check_rule(recorder)
    # What the last step of a canvas keeps is the output; before it, a token counts as masked unless the step before took it.
    for start in (1, 7):
        calls = recorder.calls[start : start + 5]
        assert (calls[0].tokens["state"] == NOISE).all()
        for before, after in itertools.pairwise(calls):
            taken = (before.tokens["state"] == NOISE) & before.tokens["accepted"]
            assert (after.tokens["state"][taken] == 1).all()
            kept = after.tokens["state"] == 1
            assert np.array_equal(after.tokens["token_id"][kept], before.tokens["predicted_id"][kept])
        assert np.array_equal(calls[-1].tokens["accepted"], calls[-1].tokens["state"] == NOISE)
        canvas = recorded[0, calls[-1].tokens["position"]].numpy()
        written = calls[-1].tokens["accepted"]
        assert np.array_equal(calls[-1].tokens["predicted_id"][written], canvas[written])
    (row,) = recorder.requests
    assert (row["prompt_tokens"], row["generated_tokens"]) == (11, 32)
    assert recorder.meta["model"]["moe_layers"] == [0, 1] and recorder.meta["model"]["num_layers"] == 2


def test_diffusion_gemma_traces_keep_the_format(tmp_path):
    model = diffusion_gemma()
    with record(model, tmp_path / "a.trace", level="active"):
        generate(model)
        generate(model, seed=4)
    assert check(tmp_path / "a.trace") == []


def test_untied_encoder_layers_get_numbers_of_their_own():
    model = diffusion_gemma()
    for layer in model.model.encoder.language_model.layers:
        layer.experts.down_proj = nn.Parameter(layer.experts.down_proj.detach().clone())
    gates = find_gates(model)
    assert {gate.role: [g.layer for g in gates.of_role(gate.role)] for gate in gates.gates} == {
        "encoder": [2, 3],
        "decoder": [0, 1],
    }
