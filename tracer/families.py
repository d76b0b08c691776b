"""What is known of released model families: mask and end token, block length, loop. The one home of such facts.

A model's own configuration goes first; the family answers for what it leaves out. Ids are those of a family's released
vocabulary and count only where the model's vocabulary holds them, so that a small model of the same class is not given the mask
of a large one. A vocabulary alone makes no family: autoregressive models share LLaDA2's 157184 tokens.

Sources: defaults of ``generate`` in modeling_llada2_moe.py of inclusionAI/LLaDA2.0-mini and -flash; mask of SDARMoeForCausalLM
in SGLang's python/sglang/srt/dllm/config.py and ``block_size`` of JetLM's SDAR configs; the model card of
inclusionAI/LLaDA-MoE-7B-A1B; transformers 5, ``DiffusionGemmaConfig``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tracer.adapters.gate import setting, text_config
from tracer.errors import UserError

BLOCK_LENGTHS = ("block_length", "block_size", "canvas_length")


@dataclass(frozen=True, slots=True)
class Family:
    """Facts of one family; None where a family has no such thing, or leaves it to its configs.

    ``model_types`` are values of ``config.model_type``, ``class_prefix`` begins the names of its classes. ``loop`` is the loop
    that decodes it: "llada2", "sdar" or "own" (the model's ``generate``).
    """

    model_types: tuple[str, ...]
    class_prefix: str
    loop: str
    mask_id: int | None = None
    eos_id: int | None = None
    block_length: int | None = None


FAMILIES = (
    Family(("llada2_moe", "llada2_moe_compact"), "LLaDA2", "llada2", mask_id=156895, eos_id=156892, block_length=32),
    Family(("sdar_moe", "sdar"), "SDAR", "sdar", mask_id=151669),
    Family(("llada",), "LLaDAMoE", "own", mask_id=156895),
    # Its canvas is filled with random tokens, not masks.
    Family(("diffusion_gemma",), "DiffusionGemma", "own", block_length=256),
    # Qwen's own class holds SDAR's weights too; one without a mask token is autoregressive.
    Family(("qwen3_moe",), "Qwen3Moe", "sdar"),
)


@dataclass(frozen=True, slots=True)
class DecodingFacts:
    """How a model is decoded, None where unknown. ``loop`` is "own" for every model that has no mask token."""

    loop: str
    mask_id: int | None
    eos_id: int | None
    block_length: int | None


def family_of(model: nn.Module) -> Family | None:
    """The family of a model, by its ``model_type`` first and by the name of its class else."""
    kind = str(getattr(getattr(model, "config", None), "model_type", None) or "").lower()
    by_type = (family for family in FAMILIES if kind in family.model_types)
    by_class = (family for family in FAMILIES if type(model).__name__.startswith(family.class_prefix))
    return next(by_type, None) or next(by_class, None)


def decoding_facts(model: nn.Module, mask_id: int | None = None, eos_id: int | None = None) -> DecodingFacts:
    """What a model's configuration and its family say about its decoding; ids that are given go before both.

    Raises
    ------
    UserError
        A given id is none of the model's vocabulary.
    """
    family = family_of(model)
    config, outer = text_config(model), getattr(model, "config", None)
    generation = getattr(model, "generation_config", None)
    vocabulary = setting(("vocab_size",), config, outer) or 0

    for name, token in (("mask_id", mask_id), ("eos_id", eos_id)):
        if token is not None and vocabulary and not 0 <= token < vocabulary:
            raise UserError(f"{name}={token} lies outside the model's vocabulary of {vocabulary} tokens.")

    def known(token: int | None) -> int | None:
        return token if token is not None and token < vocabulary else None

    mask_id = setting(("mask_token_id",), config, outer) if mask_id is None else mask_id
    # transformers' generate ends at what its generation config says, whatever the model's says.
    ends = (config, outer) if generation is None else (generation,)
    eos_id = setting(("eos_token_id",), *ends) if eos_id is None else eos_id
    block_length = setting(BLOCK_LENGTHS, config, outer)
    if family is not None:
        mask_id = known(family.mask_id) if mask_id is None else mask_id
        eos_id = known(family.eos_id) if eos_id is None else eos_id
        block_length = family.block_length if block_length is None else block_length
    loop = family.loop if family is not None and mask_id is not None else "own"
    return DecodingFacts(loop, mask_id, eos_id, block_length)
