"""Let a model's own ``generate`` tell where a request begins and what came out of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tracer.decoding.own_generate import called_with
from tracer.errors import UserError


def follow_generate(model: nn.Module, recorder: Any) -> Callable[[], None]:
    """Wrap ``model.generate`` on this one object: a call of it is a request (one a row of a batch), its result settles the end.

    A generate inside ``recorder.request(...)`` belongs to that request.

    Returns
    -------
    callable
        Puts the method back.
    """
    generate = getattr(model, "generate", None)
    if not callable(generate):
        return lambda: None
    own = model.__dict__.get("generate")

    @functools.wraps(generate)
    def follow(*args, **kwargs):
        if not recorder.hooks.follows():
            return generate(*args, **kwargs)
        _refuse_beams(model, kwargs)
        recorder.follow_options(*called_with(generate, args, kwargs))
        prompt = next(
            (v for v in (*args, kwargs.get("input_ids"), kwargs.get("inputs")) if isinstance(v, torch.Tensor)), None
        )
        prompt_tokens = prompt.shape[1] if prompt is not None and prompt.dim() == 2 and prompt.shape[0] == 1 else None
        if prompt_tokens is not None:
            recorder.begin(prompt_tokens)
        result = generate(*args, **kwargs)
        output = _token_ids(result)
        recorder.catch_up()
        if output is not None and recorder.states.sequences and len(output) == len(recorder.states.sequences):
            recorder.finish(output)
        return result

    setattr(model, "generate", follow)  # noqa: B010 - nn.Module types its attributes as modules and tensors

    def restore() -> None:
        if own is None:
            del model.generate
        else:
            setattr(model, "generate", own)  # noqa: B010

    return restore


def _refuse_beams(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Beams and several answers to a prompt repeat and reorder the rows of a batch, which are requests here."""
    configs = (kwargs.get("generation_config"), getattr(model, "generation_config", None))
    for name in ("num_beams", "num_return_sequences"):
        said = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        if (next((value for value in said if value is not None), None) or 1) > 1:
            raise UserError(
                f"generate was called with {name} above 1: beams and repeated prompts share and swap rows, so that no row is a "
                f"request; record with {name}=1."
            )


def _token_ids(result: Any) -> torch.Tensor | None:
    """The generated ids in what a generate method returned: a tensor, an output object's sequences, a tuple's first tensor."""
    if isinstance(result, torch.Tensor):
        return result if result.dim() == 2 else None
    sequences = getattr(result, "sequences", None)
    if isinstance(sequences, torch.Tensor):
        return sequences
    if isinstance(result, tuple | list):
        return next((item for item in result if isinstance(item, torch.Tensor) and item.dim() == 2), None)
    return None
