"""Block-diffusion decoding loops, for models whose own ``generate`` cannot be used or does not say what it did.

The sequence is cut into blocks of ``block_length`` positions from 0 on; rows of a block see their own block and everything
before it. The first generated block holds the prompt's tail (prompt length mod block length). Blocks are denoised one after the
other until nothing in them is masked; decoding ends with the block in which the end token stands, or when the blocks that hold
``gen_length`` tokens are done. Source: the generate methods of LLaDA2.0's and SDAR's released code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tracer.decoding.block_loop import BlockLoop, DecodeResult, Step
from tracer.decoding.checks import DecodeOptions, check_prompt
from tracer.decoding.own_generate import generate_arguments
from tracer.decoding.team_loop import decode_team

__all__ = ["DecodeResult", "Step", "decode_llada2", "decode_own", "decode_sdar", "decode_team"]


def decode_llada2(
    model: nn.Module,
    input_ids: Any,
    *,
    gen_length: int,
    mask_id: int,
    eos_id: int | None = None,
    block_length: int = 32,
    steps: int = 32,
    threshold: float = 0.95,
    temperature: float = 0.0,
    seed: int | None = None,
    kv_cache: bool = False,
    early_stop: bool = False,
    on_step: Callable[[Step], None] | None = None,
    recorder: Any = None,
) -> DecodeResult:
    """Decode one prompt the way LLaDA2 does.

    Without ``kv_cache`` every call runs prompt, finished blocks and current block under a block-causal mask, and there is
    nothing but denoise calls: LLaDA2.0's released loop. With it, as in later engines, the prompt's whole blocks are prefilled,
    denoise calls run the current block alone, and a commit call stores each finished block.

    Parameters
    ----------
    model : nn.Module
        Returns ``.logits`` at the rows it is given, without a shift; takes a 4-dimensional attention mask.
    input_ids : int [prompt] or [1, prompt]
    gen_length : int
        Tokens to generate; the last block is filled to its end all the same, and the result cut.
    mask_id, eos_id : int
        Mask token, and the token that ends the text (None: never).
    block_length, steps, threshold : int, int, float
        The rule of :func:`tracer.decoding.accepting.accept`; the quota of a step comes from ``block_length / steps``. (The
        released LLaDA2 code lowers ``steps`` to ``gen_length`` where that is smaller; this loop does not.)
    temperature, seed : float, int
        0 writes the most probable token. Above it tokens are drawn, reproducibly with a seed. (The released LLaDA2 code draws
        at temperature 1 when told 0; this loop does not.)
    early_stop : bool
        Stop inside a block, as soon as an accepted end token has no masked position before it.
    on_step : callable, optional
        Called with a :class:`Step` after every model call.
    recorder : tracer.recording.recorder.Recorder, optional
        Is told kind, block, step, predictions and acceptance of every call.

    Raises
    ------
    UserError
        An option out of range, an empty prompt, or one too long for the model.
    """
    options = DecodeOptions(gen_length, mask_id, eos_id, block_length, steps, threshold, temperature, seed)
    return BlockLoop(model, input_ids, options, on_step, recorder).run(kv_cache=kv_cache, early_stop=early_stop)


def decode_sdar(
    model: nn.Module,
    input_ids: Any,
    *,
    gen_length: int,
    mask_id: int,
    eos_id: int | None = None,
    block_length: int = 32,
    steps: int = 32,
    threshold: float = 0.95,
    temperature: float = 0.0,
    seed: int | None = None,
    on_step: Callable[[Step], None] | None = None,
    recorder: Any = None,
) -> DecodeResult:
    """Decode one prompt the way SDAR does: prefill the prompt's whole blocks, then a block at a time.

    Denoise calls run the block's rows against the cache and store nothing; when nothing is masked a commit call stores the
    block. Parameters as in :func:`decode_llada2`.
    """
    options = DecodeOptions(gen_length, mask_id, eos_id, block_length, steps, threshold, temperature, seed)
    return BlockLoop(model, input_ids, options, on_step, recorder).run(kv_cache=True, early_stop=False)


def decode_own(
    model: nn.Module,
    input_ids: Any,
    *,
    gen_length: int,
    eos_id: int | None = None,
    seed: int | None = None,
    recorder: Any = None,
    given: Mapping[str, Any] | None = None,
    known: Mapping[str, Any] | None = None,
    **options: Any,
) -> DecodeResult:
    """Run a model's own ``generate``, which a recorder follows by its default rules.

    The length is passed as ``gen_length`` where the method has that parameter, else as ``max_new_tokens``; ``given`` and
    ``known`` under the method's names for them (:func:`tracer.decoding.own_generate.generate_arguments`), ``options`` as they
    are. ``forwards`` of the result is counted by the recorder, 0 without one.
    """
    prompt = check_prompt(model, input_ids)
    if seed is not None:
        torch.manual_seed(seed)
    before = 0 if recorder is None else recorder.hooks.calls
    with torch.no_grad():
        generate: Any = model.generate
        result = generate(prompt, **generate_arguments(model, gen_length, given, known), **options)
    tensor = result if isinstance(result, torch.Tensor) else getattr(result, "sequences", None)
    if tensor is None:
        tensor = next(item for item in result if isinstance(item, torch.Tensor))
    ids = tensor.reshape(-1).to(prompt.device)
    length = prompt.shape[1]
    if len(ids) < length or not torch.equal(ids[:length], prompt[0]):
        ids = torch.cat((prompt[0], ids))
    forwards = 0 if recorder is None else recorder.hooks.calls - before
    ended = eos_id is not None and bool((ids[length:] == eos_id).any())
    return DecodeResult(ids, "eos" if ended else "length", forwards, len(ids) - length)
