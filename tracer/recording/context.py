"""Record what a model's routers decide: ``with record(model, "out.trace") as recorder:`` around any decoding.

The model computes exactly what it would without the recorder. Loops of :mod:`tracer.decode` tell the recorder what they
accepted; any other loop is followed by the default rules of :mod:`tracer.recording.step_states`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tracer.errors import UserError
from tracer.recording.options import RecordOptions
from tracer.recording.recorder import Recorder
from tracer.schema import LEVELS


@contextmanager
def record(
    model: nn.Module,
    out: Any = None,
    *,
    level: str = "scores",
    block_length: int | None = None,
    mask_id: int | None = None,
    eos_id: int | None = None,
    decoding: dict[str, Any] | None = None,
    model_id: str | None = None,
    revision: str | None = None,
    adapter: Callable | None = None,
    force: bool = False,
    append: bool = False,
    compact: bool = False,
    quiet: bool = False,
    first_request: int | None = None,
    provenance: dict[str, Any] | None = None,
    meta: dict[str, Any] | None = None,
) -> Iterator[Recorder]:
    """Record every model call of the ``with`` body.

    Parameters
    ----------
    model : nn.Module
        Uncompiled; hooks come off when the body ends, however it ends.
    out : path, writer or None
        Folder of the trace, an object with the methods of :class:`tracer.parquet.TraceWriter`, or None to keep the calls in
        memory (``recorder.calls``, ``recorder.requests``).
    level : str
        "scores" (ids, weights and all router scores), "active" (scores of a quarter of the experts or so) or "ids" (no
        scores). Policies that select experts anew need scores; :data:`tracer.levels.RULED_OUT` names them.
    block_length, mask_id, eos_id : int, optional
        What the decoding uses; by default what the model's configuration or its family says (:mod:`tracer.families`).
    decoding : dict, optional
        The section ``decoding`` of meta.json; the three above go into it.
    model_id, revision : str, optional
        Name and revision of the model for meta.json.
    adapter : callable, optional
        Reads routers of an unknown kind: (gate module, args, output) -> (expert_ids [N, K], gate_weights or None, scores or
        None).
    force, append : bool
        Replace a trace that is there, or go on with it.
    quiet : bool
        Do not say, on the error stream, how large a forward gets and what the level rules out; in memory nothing is said.
    first_request : int
        Number of the first request; by default 0, with ``append`` the next one.
    provenance, meta : dict, optional
        Added to, or put in place of, what is found out about the run.

    Yields
    ------
    Recorder

    Raises
    ------
    UserError
        No MoE layer, an unreadable or compiled model, a router that never fires, no model call at all; the message says what
        to do.
    """
    if level not in LEVELS:
        raise UserError(f"Unknown capture level '{level}'; choose one of {', '.join(LEVELS)}.")
    given = {"block_length": block_length, "mask_id": mask_id, "eos_id": eos_id}
    if block_length is not None and block_length < 1:
        raise UserError(f"block_length must be at least 1, not {block_length}.")
    options = RecordOptions(
        level=level,
        decoding={**(decoding or {}), **{name: value for name, value in given.items() if value is not None}},
        model_id=model_id,
        revision=revision,
        adapter=adapter,
        force=force,
        append=append,
        compact=compact,
        first_request=first_request,
        provenance=provenance or {},
        meta=meta or {},
    )
    recorder = Recorder(model, out, options)
    if out is not None and not quiet:
        print(recorder.sentence, file=sys.stderr)
    try:
        yield recorder
    except BaseException as error:
        recorder.close(clean=False)
        if type(error).__module__.startswith("torch._dynamo"):
            raise UserError(
                "The model was compiled (torch.compile) and called inside the recording, where hooks do not run; call it as it "
                "was before compilation."
            ) from error
        raise
    recorder.close(clean=True)
    if recorder.hooks.calls == 0:
        raise UserError(
            "No call of the model was seen, so there is nothing to record; decode inside the with-body, with this very model."
        )
    if out is not None and not quiet and recorder.unresolved:
        print(
            f"Whether {recorder.unresolved} masked tokens were accepted never became known; they count as not accepted.",
            file=sys.stderr,
        )
