"""What a model's own ``generate`` takes, and what it was called with, in the names of meta.json's section ``decoding``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from tracer.errors import UserError

# Names of the same thing in the generate methods of LLaDA2, SDAR, LLaDA-MoE and transformers.
NAMES = {
    "block_length": ("block_length", "block_size"),
    "steps": ("steps", "denoising_steps", "max_denoising_steps"),
    "threshold": ("threshold", "confidence_threshold"),
    "temperature": ("temperature",),
    "mask_id": ("mask_id", "mask_token_id"),
    "eos_id": ("eos_id", "eos_token_id"),
}
LENGTHS = ("gen_length", "max_new_tokens")


def generate_arguments(
    model: nn.Module, gen_length: int, given: Mapping[str, Any] | None = None, known: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Keyword arguments for a model's own generate method.

    Parameters
    ----------
    model : nn.Module
    gen_length : int
    given : mapping, optional
        What the user asked for, by a name of :data:`NAMES`; None values count as not given.
    known : mapping, optional
        The same, of what is known of the model; left out where the method does not take it.

    Raises
    ------
    UserError
        No generate method, or one that takes no such option as the user gave.
    """
    parameters, settings = _taken(model)

    def keyword(*names: str) -> str | None:
        return next((name for name in names if name in parameters or hasattr(settings, name)), None)

    arguments: dict[str, Any] = {keyword(*LENGTHS) or LENGTHS[-1]: gen_length}
    for name, value in (known or {}).items():
        # What transformers' generation config holds, the model has told it already.
        taken = next((each for each in NAMES[name] if each in parameters), None)
        if value is not None and taken is not None:
            arguments[taken] = value
    for name, value in (given or {}).items():
        if value is None:
            continue
        taken = keyword(*NAMES[name])
        if taken is None:
            raise UserError(
                f"The generate method of {type(model).__name__} takes no {name}; leave --{name.replace('_', '-')} out, or "
                "choose a loop of this package."
            )
        arguments[taken] = value
    if "temperature" in arguments and keyword("do_sample"):
        # transformers samples when told so, and wants a temperature above 0 then.
        arguments["do_sample"] = arguments["temperature"] > 0
        if not arguments["do_sample"]:
            del arguments["temperature"]
    return arguments


def _taken(model: nn.Module) -> tuple[Mapping[str, inspect.Parameter], Any]:
    """The parameters of generate, and transformers' generation config where its settings may be passed too, else None."""
    generate = getattr(model, "generate", None)
    if not callable(generate):
        raise UserError(f"{type(model).__name__} has no generate method; choose a loop of this package.")
    parameters = inspect.signature(generate).parameters
    free = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    return parameters, getattr(model, "generation_config", None) if free else None


def called_with(generate: Callable, args: tuple, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a call says, and what the method's defaults say, by a name of :data:`NAMES`; what neither says is left out."""
    signature = inspect.signature(generate)
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError:
        # The call itself will say what is wrong with it.
        return {}, {}
    bound = {**bound, **kwargs}
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    return _by_our_names(bound), _by_our_names(defaults)


def _by_our_names(arguments: Mapping[str, Any]) -> dict[str, Any]:
    said = {}
    for name, alternatives in NAMES.items():
        values = (arguments.get(each) for each in alternatives)
        value = next((v for v in values if isinstance(v, int | float) and not isinstance(v, bool)), None)
        if value is not None:
            said[name] = value
    return said
