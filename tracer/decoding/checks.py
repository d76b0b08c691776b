"""What a decoding loop needs of its arguments, each fault told in one sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tracer.adapters.gate import text_config
from tracer.errors import UserError


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """The numbers of a block-diffusion decoding; see :func:`tracer.decode.decode_llada2`.

    Raises
    ------
    UserError
        Naming the first that is out of range.
    """

    gen_length: int
    mask_id: int
    eos_id: int | None
    block_length: int
    steps: int
    threshold: float
    temperature: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("gen_length", "block_length", "steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a whole number of at least 1, not {value!r}.")
        if self.mask_id is None or self.mask_id < 0:
            raise UserError("This loop needs the mask token: pass mask_id, the id the model was trained with.")
        if not 0 <= self.threshold <= 1:
            raise UserError(f"threshold is a probability between 0 and 1, not {self.threshold!r}.")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UserError(f"temperature must be 0 or more and finite, not {self.temperature!r}.")


def check_prompt(model: nn.Module, input_ids: Any, gen_length: int = 0, block_length: int = 1) -> torch.Tensor:
    """The prompt as int64 [1, P] on the model's device.

    Raises
    ------
    UserError
        It is empty, a batch, outside the vocabulary, or longer than the model takes together with what is to be generated
        (``max_position_embeddings``; blocks are filled to their end).
    """
    ids = torch.as_tensor(input_ids)
    if ids.dim() == 2 and ids.shape[0] != 1:
        raise UserError(f"The decoding loops take one prompt at a time, not a batch of {ids.shape[0]}.")
    ids = ids.reshape(1, -1)
    if ids.shape[1] == 0:
        raise UserError("The prompt is empty; give at least one token.")
    if ids.is_floating_point():
        raise UserError("The prompt must be token ids, not floating-point numbers.")
    config = text_config(model)
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and not (int(ids.min()) >= 0 and int(ids.max()) < vocabulary):
        raise UserError(f"The prompt holds a token id outside the vocabulary of {vocabulary}.")
    needed = -(-(ids.shape[1] + gen_length) // block_length) * block_length
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and needed > context:
        raise UserError(
            f"The prompt of {ids.shape[1]} tokens with {gen_length} generated ones fills {needed} positions in blocks of "
            f"{block_length}, but the model takes {context}; shorten the prompt or lower gen_length."
        )
    parameter = next(model.parameters(), None)
    return ids.to(device=parameter.device if parameter is not None else ids.device, dtype=torch.long)
