"""The recorder of a run: its requests, a loop's notes, and what meta.json says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tracer.adapters.find import find_gates
from tracer.adapters.gemma import follow_sampler
from tracer.errors import UserError
from tracer.levels import USUAL_ROWS, level_sentence, row_bytes
from tracer.memory import MemoryWriter
from tracer.recording.describe import describe_model, describe_run
from tracer.recording.follow_generate import follow_generate
from tracer.recording.hooks import Hooks
from tracer.recording.host_call import Branches
from tracer.recording.options import RecordOptions, decoding_of, first_request_of
from tracer.recording.sink import Sink
from tracer.schema import KINDS, SCHEMA_VERSION, STOP_REASONS, tables_of


class Recorder:
    """What ``with record(...) as recorder`` gives: tells requests apart, takes a loop's notes, knows what was written."""

    def __init__(self, model: nn.Module, out: Any, options: RecordOptions):
        self._model, self._out, self._options = model, out, options
        self.gates = find_gates(model)
        self.decoding = decoding_of(model, options.decoding)
        first_request = first_request_of(out, options)
        self.sink = Sink(self.gates, options.level, self.decoding, first_request, self._open_writer)
        self.states = self.sink.states
        self.hooks = Hooks(
            model,
            self.gates,
            with_scores=options.level != "ids",
            adapter=options.adapter,
            mask_id=self.decoding["mask_id"],
            block_length=self.decoding["block_length"],
            on_call=self.sink.take,
        )
        listen = lambda: self.hooks.noted_roles.add("decoder")  # noqa: E731
        self._restore = [follow_sampler(model, listen, self.note), follow_generate(model, self)]

    # What a decoding loop says.

    def begin(self, prompt_tokens: int | None = None, dataset: str | None = None, prompt: str | None = None) -> None:
        """Open a request of one sequence. One just opened by :meth:`request` and not used yet is taken over."""
        self.catch_up()
        fresh = self.states.sequences
        if len(fresh) == 1 and fresh[0].explicit and fresh[0].calls == 0:
            if fresh[0].prompt_tokens is None:
                fresh[0].prompt_tokens = prompt_tokens
            return
        self.states.begin(prompt_tokens, dataset, prompt)

    @contextmanager
    def request(
        self, dataset: str | None = None, prompt_tokens: int | None = None, prompt: str | None = None
    ) -> Iterator[Recorder]:
        """The model calls inside are one request. ``prompt`` is stored as given; leave it out to keep no text."""
        self.catch_up()
        self.states.begin(prompt_tokens, dataset, prompt)
        opened = self.states.sequences[0]
        try:
            yield self
        except Exception:
            self.hooks.abandon_call()
            self.catch_up()
            if opened in self.states.sequences:
                self.states.finish(stop_reason="error")
            raise
        self.catch_up()
        if opened in self.states.sequences:
            self.states.finish()

    def finish(
        self,
        output_ids: torch.Tensor | np.ndarray | list | None = None,
        *,
        generated: int | None = None,
        stop_reason: str | None = None,
    ) -> None:
        """End the request under way.

        Parameters
        ----------
        output_ids : int [length] or [B, length], optional
            The loop's result, with or without the prompt in front; settles what the last call accepted.
        generated : int, optional
            Tokens generated; by default counted.
        stop_reason : str, optional
            "eos", "length" or "error"; by default "eos" when the end token was generated.
        """
        if stop_reason is not None and stop_reason not in STOP_REASONS:
            raise UserError(f"stop_reason must be one of {', '.join(STOP_REASONS)}, not '{stop_reason}'.")
        self.catch_up()
        if output_ids is None:
            self.states.finish(generated=generated, stop_reason=stop_reason)
            return
        if not self.states.sequences:
            # The model's own generate has ended the request already.
            return
        output = np.atleast_2d(torch.as_tensor(output_ids).detach().cpu().numpy().astype(np.int64))
        if len(output) != len(self.states.sequences):
            raise UserError(f"finish() got {len(output)} outputs for {len(self.states.sequences)} sequences under way.")
        outcome = self._outcome()
        written = self._written(output, outcome)
        self.states.finish(output, written=written, outcome=outcome, generated=generated, stop_reason=stop_reason)

    def announce(self, kind: str, block: int = -1, step: int = -1) -> None:
        """Say what the next model call is; a "denoise" call must be followed by :meth:`note`."""
        if kind not in KINDS:
            raise UserError(f"A call is one of {', '.join(KINDS)}, not '{kind}'.")
        self.hooks.announced = (kind, block, step)

    def note(
        self,
        *,
        predicted_ids: torch.Tensor,
        confidence: torch.Tensor,
        accepted: torch.Tensor | None = None,
        kept: torch.Tensor | None = None,
        argmax_ids: torch.Tensor | None = None,
        argmax_confidence: torch.Tensor | None = None,
        settle: bool = False,
        branches: Branches | None = None,
    ) -> None:
        """Say what came of the model call before: all [B, R], for its last R rows, the current block.

        Parameters
        ----------
        predicted_ids, confidence : int, float
            The token the loop would write at each row and its probability.
        accepted : bool
            Masked before and kept after this call.
        kept : bool
            For loops without a mask token: rows whose token goes on; the others count as masked in the next call.
        argmax_ids, argmax_confidence : optional
            The most probable token and its probability, where it may be another.
        settle : bool
            Everything still masked is kept as the argmax when the block is left.
        branches : Branches, optional
            Of a speculative loop: the branches of the call, the one it goes on with, and the rows that ran no router.
        """
        batch = len(self.hooks.current_call().token_ids)
        given = {"predicted_ids": predicted_ids, "confidence": confidence, "accepted": accepted, "kept": kept}
        if argmax_ids is not None and argmax_ids is not predicted_ids:
            given |= {"argmax_ids": argmax_ids, "argmax_confidence": argmax_confidence}
        # The loop may go on writing into what it passed.
        own = {k: v.detach().reshape(batch, -1).clone() for k, v in given.items() if v is not None}
        self.hooks.note(own, settle, branches)

    def follow_options(self, said: dict[str, Any], defaults: dict[str, Any]) -> None:
        """Take over what a call of the model's own generate says of its decoding; its defaults count where nobody spoke.

        Raises
        ------
        UserError
            Another value than that of calls recorded before: a trace holds one.
        """
        self.catch_up()
        told = {name for name, value in self._options.decoding.items() if value is not None}
        used = {**{name: value for name, value in defaults.items() if name not in told}, **said}
        for name, value in used.items():
            if self.hooks.calls and self.decoding.get(name) not in (None, value):
                raise UserError(
                    f"generate runs with {name}={value}, after calls with {self.decoding[name]}; a trace holds one value, so "
                    "record them apart."
                )
        if not self.hooks.calls:
            self.decoding.update(used)
        self.hooks.mask_id = self.states.mask_id = self.decoding["mask_id"]
        self.hooks.block_length = self.states.block_length = self.decoding["block_length"]
        self.states.eos_id = self.decoding["eos_id"]

    # What is known.

    @property
    def calls(self) -> list:
        """The calls of a recording kept in memory."""
        self.sink.absorb()
        return self.sink.writer.calls if isinstance(self.sink.writer, MemoryWriter) else []

    @property
    def requests(self) -> list[dict]:
        """The finished requests of a recording kept in memory."""
        self.sink.absorb()
        return self.sink.writer.requests if isinstance(self.sink.writer, MemoryWriter) else []

    @property
    def num_forwards(self) -> int:
        """Model calls handed to the writer."""
        self.sink.absorb()
        return self.sink.num_forwards

    @property
    def num_requests(self) -> int:
        """Requests that have ended."""
        self.sink.absorb()
        return self.sink.num_requests

    @property
    def bytes_written(self) -> int:
        """Bytes on disk so far."""
        return int(getattr(self.sink.writer, "bytes_written", 0))

    @property
    def unresolved(self) -> int:
        """Masked tokens whose fate never became known, because the loop ended without telling its output."""
        self.sink.absorb()
        return self.states.unresolved

    @property
    def sentence(self) -> str:
        """How large a forward gets, a block's or one of the usual length, and what the level rules out."""
        level, rows = self._options.level, self.decoding["block_length"] or USUAL_ROWS
        gates = self.gates
        return level_sentence(level, rows * row_bytes(level, len(gates.layers), gates.num_experts, gates.top_k), rows)

    @property
    def meta(self) -> dict[str, Any]:
        """meta.json; exact once every router has seen a call."""
        options = self._options
        return {
            "schema_version": SCHEMA_VERSION,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "complete": False,
            "capture_level": options.level,
            **describe_model(self._model, self.gates, model_id=options.model_id, revision=options.revision),
            "tables": tables_of(options.level),
            "decoding": self.decoding,
            "provenance": {**describe_run(self._model), **options.provenance},
            **options.meta,
        }

    def _outcome(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Positions and tokens [B, T] of the last call as the loop left them in the tensor it passed, None if it did not."""
        call = self.hooks.last_call
        tokens = None if call is None else call.written_back()
        if call is None or tokens is None or len(tokens) != len(self.states.sequences):
            return None
        return call.positions.cpu().numpy(), tokens.cpu().numpy()

    def _written(
        self, output: np.ndarray, outcome: tuple[np.ndarray, np.ndarray] | None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """What the last call's block rows hold in the output, and the probabilities that call gave it."""
        logits = self.hooks.block_logits
        if logits is None or len(logits.positions) != len(output):
            return None
        rows = zip(*outcome, strict=True) if outcome is not None else [None] * len(output)
        whole = [s.whole(row, at)[0] for s, row, at in zip(self.states.sequences, output, rows, strict=True)]
        tokens = np.full((len(whole), max(len(row) for row in whole)), -1, np.int64)
        for b, row in enumerate(whole):
            tokens[b, : len(row)] = row
        places = torch.arange(tokens.shape[1], device=logits.positions.device).expand(tokens.shape)
        token, probability = logits.written(torch.from_numpy(tokens).to(places.device), places)
        self.hooks.block_logits = None
        return token.cpu().numpy(), probability.cpu().numpy()

    def _open_writer(self) -> Any:
        if hasattr(self._out, "add_call"):
            return self._out
        if self._out is None:
            return MemoryWriter(self.meta)
        from tracer.parquet import TraceWriter

        options = self._options
        return TraceWriter(
            Path(self._out), self.meta, force=options.force, append=options.append, compact=options.compact
        )

    def catch_up(self) -> None:
        """Close the call under way and work out all calls so far."""
        self.hooks.end_call()
        self.sink.absorb()

    def close(self, clean: bool) -> None:
        """Take the hooks off and close the trace; ``clean`` False keeps what is complete and marks the rest interrupted."""
        complete = False
        try:
            if not clean:
                self.hooks.abandon_call()
            self.catch_up()
            if clean:
                self.states.finish()
            else:
                self.states.abandon()
            complete = clean
        finally:
            self.hooks.close()
            for restore in self._restore:
                restore()
            self.sink.close(complete)
