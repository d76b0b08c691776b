"""How to record: the options of a recording, and what follows from them before the model runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from tracer.families import decoding_facts
from tracer.meta import read_meta


@dataclass(slots=True)
class RecordOptions:
    """How to record; see :func:`tracer.recording.context.record`."""

    level: str = "scores"
    decoding: dict[str, Any] = field(default_factory=dict)
    model_id: str | None = None
    revision: str | None = None
    adapter: Callable | None = None
    force: bool = False
    append: bool = False
    compact: bool = False
    first_request: int | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


def decoding_of(model: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """The section ``decoding``: what the user said, completed from the model's configuration."""
    facts = decoding_facts(model, given.get("mask_id"), given.get("eos_id"))
    known = {"block_length": facts.block_length, "mask_id": facts.mask_id, "eos_id": facts.eos_id}
    return {**known, **{key: value for key, value in given.items() if value is not None or key not in known}}


def first_request_of(out: Any, options: RecordOptions) -> int:
    """Number of the first request; refuses a trace that is there before the model runs rather than after."""
    known = options.first_request
    if out is None or hasattr(out, "add_call") or not (Path(out) / "meta.json").exists():
        return known or 0
    from tracer.files.folder import last_state, there_already

    if options.append:
        state = last_state(Path(out), read_meta(Path(out)))
        return max(state.held | state.ended, default=-1) + 1 if known is None else known
    if not options.force:
        raise there_already(Path(out))
    return known or 0
