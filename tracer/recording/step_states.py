"""From the bare calls of a decoding loop to the rows of a trace: requests, kinds, blocks, steps, token states, acceptance.

What a loop says about a call is believed. For a loop that says nothing the default rules apply: a token is masked when its id
is the mask id; a call with masked rows is a denoise forward, one that reaches new positions a prefill, any other a commit; a
masked token was accepted when it is no longer masked in the next call that holds its position, or in the output. Works on NumPy
arrays; B sequences a call, T rows each, R rows of the current block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tracer.errors import UserError
from tracer.recording.host_call import HostCall, Part, as_rows
from tracer.recording.sequences import Sequence, refuse_rewriting, starts_another
from tracer.schema import DECODED, MASKED, NOISE, PADDING, PROMPT
from tracer.trace import CallRouting

# Calls kept back while a masked token's fate is open; beyond it the token counts as not accepted.
MOST_OPEN_CALLS = 64


@dataclass(slots=True)
class _Waiting:
    parts: list[Part]
    routing: CallRouting
    duration_ns: int | None


@dataclass(slots=True)
class StepStates:
    """Follows the calls of all requests and hands finished ones on in order.

    ``write_call(parts, tokens, routing)`` and ``write_request(row)`` take what :class:`tracer.parquet.TraceWriter` takes.
    ``unresolved`` counts masked tokens whose fate never became known.
    """

    mask_id: int | None
    eos_id: int | None
    block_length: int | None
    write_call: Callable[[list[dict], dict[str, np.ndarray], CallRouting], Any]
    write_request: Callable[[dict], Any]
    next_request: int = 0
    unresolved: int = 0
    sequences: list[Sequence] = field(default_factory=list)
    _waiting: deque[_Waiting] = field(default_factory=deque)
    _calls: int = 0

    def begin(
        self, prompt_tokens: int | None = None, dataset: str | None = None, prompt: str | None = None
    ) -> Sequence:
        """Open a request of one sequence; the next call is its first."""
        self.finish()
        sequence = self._new_sequence()
        sequence.explicit, sequence.prompt_tokens = True, prompt_tokens
        sequence.dataset, sequence.prompt = dataset, prompt
        self.sequences = [sequence]
        return sequence

    def _new_sequence(self) -> Sequence:
        self.next_request += 1
        return Sequence(self.next_request - 1)

    def add(self, call: HostCall) -> None:
        """Take the next call of the loop."""
        padding = call.positions < 0
        masked = np.zeros(padding.shape, bool) if self.mask_id is None else call.token_ids == self.mask_id
        masked &= ~padding
        if self.mask_id is None and call.kept is None and call.announced is None:
            for sequence, positions, token_ids in zip(self.sequences, call.positions, call.token_ids, strict=False):
                refuse_rewriting(sequence, positions, token_ids)
        self._follow(call, masked)
        if call.kept is not None:
            for b, sequence in enumerate(self.sequences):
                masked[b] = sequence.not_kept(call.positions[b]) & ~padding[b]
        kind = self._kind(call, masked)
        parts = []
        for b, sequence in enumerate(self.sequences):
            part = self._part(b, sequence, call, kind, masked[b], padding[b])
            written = None
            if call.written is not None and b < len(call.written[0]):
                written = (call.written[0][b], call.written[1][b])
            self._resolve(sequence, part.positions, part.token_ids, masked[b], (part.kind, part.block), written)
            self._judge(b, part, call, masked[b])
            now = np.where(masked[b], -1, part.token_ids)
            np.copyto(now, part.predicted_ids, where=part.accepted)
            sequence.see(part.positions, now, kind)
            parts.append(part)
        self._waiting.append(_Waiting(parts, call.routing, call.duration_ns))
        self._calls += 1
        self._flush()

    def _follow(self, call: HostCall, masked: np.ndarray) -> None:
        """Make sure ``sequences`` are those of this call, opening new requests where the loop has started over."""
        batch = len(call.token_ids)
        if self.sequences and self.sequences[0].explicit:
            if batch != len(self.sequences):
                raise UserError(
                    f"A request() holds one sequence but the call has {batch}; leave request() out, or record one at a time."
                )
            return
        same = len(self.sequences) == batch and not any(
            starts_another(s, call.token_ids[b], call.positions[b], call.kv_tokens, masked[b])
            for b, s in enumerate(self.sequences)
        )
        if not same:
            self.finish()
            self.sequences = [self._new_sequence() for _ in range(batch)]

    def _kind(self, call: HostCall, masked: np.ndarray) -> str:
        if call.announced is not None:
            return call.announced[0]
        if masked.any() or call.kept is not None:
            return "denoise"
        if self.mask_id is None and call.token_ids.shape[1] == 1 and call.kv_tokens > 0:
            return "decode"
        new = any(s.reaches(call.positions[b]) for b, s in enumerate(self.sequences))
        return "prefill" if new else "commit"

    def _part(
        self, b: int, sequence: Sequence, call: HostCall, kind: str, masked: np.ndarray, padding: np.ndarray
    ) -> Part:
        positions = call.positions[b]
        if sequence.prompt_tokens is None and kind in ("denoise", "decode"):
            sequence.prompt_tokens = int(positions[masked if masked.any() else ~padding].min(initial=2**31 - 1))
        block, step = -1, -1
        if kind in ("denoise", "commit"):
            block = self._block(sequence, positions, masked, padding, kind)
        if kind == "denoise":
            step = sequence.next_step(block)
        if call.announced is not None:
            _, block, step = call.announced
        if sequence.prompt_tokens is None:
            state = np.full(len(positions), PROMPT, np.uint8)
        else:
            state = np.where(positions < sequence.prompt_tokens, np.uint8(PROMPT), np.uint8(DECODED))
        state[masked] = MASKED if call.kept is None else NOISE
        state[padding] = PADDING
        rows = len(positions)
        # Two columns an array: making one costs more than filling it.
        ids, probability = np.full((2, rows), -1, np.int32), np.full((2, rows), np.nan, np.float32)
        flags = np.zeros((2, rows), bool)
        return Part(
            sequence=sequence,
            kind=kind,
            block=block,
            step=step,
            kv_tokens=call.kv_tokens,
            positions=positions,
            token_ids=call.token_ids[b],
            state=state,
            predicted_ids=ids[0],
            confidence=probability[0],
            argmax_ids=ids[1],
            argmax_confidence=probability[1],
            accepted=flags[0],
            open=flags[1],
            branches=call.branches,
            number=self._calls,
        )

    def _block(self, sequence: Sequence, positions, masked, padding, kind: str) -> int:
        if self.block_length is None:
            if kind == "commit":
                return -1
            raise UserError("The loop denoises but the block length is not known; pass record(..., block_length=...).")
        of_masked = positions[masked]
        if len(of_masked):
            return int(of_masked.min()) // self.block_length
        if sequence.block >= 0:
            return sequence.block
        return int(positions[~padding].max(initial=0)) // self.block_length

    def _judge(self, b: int, part: Part, call: HostCall, masked: np.ndarray) -> None:
        """Fill predictions, and what the loop said it accepted."""
        noted = call.accepted is not None or call.kept is not None
        best = call.argmax_ids if call.argmax_ids is not None else call.predicted_ids
        if best is not None and part.kind in ("denoise", "commit"):
            first = len(part.state) - best.shape[1] if call.first_row is None else int(call.first_row[b])
            rows = slice(first, first + best.shape[1])
            inside = part.state[rows] != PADDING
            if not noted and self.block_length is not None:
                inside &= part.positions[rows] // self.block_length == part.block
            part.first_row = first
            best_probability = call.argmax_confidence if call.argmax_confidence is not None else call.confidence
            written = call.predicted_ids if call.predicted_ids is not None else best
            probability = call.confidence if call.confidence is not None else best_probability
            for target, given in (
                (part.predicted_ids, written),
                (part.confidence, probability),
                (part.argmax_ids, best),
                (part.argmax_confidence, best_probability),
            ):
                if given is not None:
                    np.copyto(target[rows], given[b], where=inside, casting="unsafe")
            if call.accepted is not None:
                part.accepted[rows] = call.accepted[b] & masked[rows]
            if call.kept is not None:
                part.accepted[rows] = call.kept[b] & masked[rows]
                part.sequence.keep(part.positions[rows], call.kept[b])
                part.settle = call.settle
        if part.kind == "denoise" and not noted:
            part.open = masked.copy()

    def _resolve(self, sequence: Sequence, positions, token_ids, masked, now: tuple[str, int], written) -> None:
        """Decide what earlier calls of a sequence accepted, from what its positions hold now."""
        waiting = [p for w in self._waiting for p in w.parts if p.sequence is sequence]
        held_rows = None
        for part in waiting:
            if part.settle:
                if now != (part.kind, part.block):
                    part.settle_rest()
                part.settle = False
            if not part.open.any():
                continue
            if held_rows is None:
                held_rows = np.full(int(max(positions.max(initial=0), 0)) + 1, -1, np.int64)
                held_rows[positions[positions >= 0]] = np.flatnonzero(positions >= 0)
            reachable = part.open & (part.positions < len(held_rows))
            row = np.where(reachable, held_rows[np.where(reachable, part.positions, 0)], -1)
            held = row >= 0
            taken = held & ~masked[row]
            token = np.where(taken, token_ids[row], -1)
            probability = np.where(token == part.argmax_ids, part.argmax_confidence, np.float32(np.nan))
            if written is not None and part.number == self._calls - 1:
                span = slice(part.first_row, part.first_row + len(written[0]))
                known = taken[span] & (written[0] == token[span])
                np.copyto(probability[span], written[1], where=known)
            part.accept(taken, token, probability)
            sequence.learn(part.positions[taken], token[taken])
            part.open &= ~held

    def finish(
        self,
        token_ids: np.ndarray | None = None,
        *,
        written: tuple[np.ndarray, np.ndarray] | None = None,
        outcome: tuple[np.ndarray, np.ndarray] | None = None,
        generated: int | None = None,
        stop_reason: str | None = None,
    ) -> None:
        """End the open requests.

        ``token_ids`` int64 [B, length]: the whole sequences, or only what was generated. Without them, masked tokens of the
        last call stay unaccepted; a request with such tokens and no ``stop_reason`` gets no row ("interrupted"). ``outcome``:
        positions and tokens [B, T] of the last call as the loop left them.
        """
        ended = []
        for b, sequence in enumerate(self.sequences):
            interrupted, count = False, generated
            if token_ids is not None:
                after = None if outcome is None else (outcome[0][b], outcome[1][b])
                whole, told = sequence.whole(token_ids[b], after)
                places = np.flatnonzero(whole >= 0)
                masked = np.zeros(len(places), bool) if self.mask_id is None else whole[places] == self.mask_id
                given = None if written is None else (written[0][b], written[1][b])
                self._resolve(sequence, places, whole[places], masked, ("", -1), given)
                sequence.learn(places[~masked], whole[places][~masked])
            for part in (p for w in self._waiting for p in w.parts if p.sequence is sequence):
                if part.settle:
                    part.settle_rest()
                left = int(part.open.sum())
                self.unresolved += left
                interrupted |= left > 0 and token_ids is None
                part.open[:] = False
            if token_ids is not None and count is None:
                count = sequence.generated(told, self.eos_id)
            if sequence.calls and not (interrupted and stop_reason is None):
                ended.append(sequence.row(self.block_length, self.eos_id, count, stop_reason))
        # A call may hold rows of several requests, so no row of a request is written before all their calls are.
        self._flush()
        for row in ended:
            self.write_request(row)
        self.sequences = []

    def _flush(self) -> None:
        while self._waiting:
            first = self._waiting[0]
            undecided = any(part.settle or part.open.any() for part in first.parts)
            if undecided and len(self._waiting) <= MOST_OPEN_CALLS:
                return
            for part in first.parts if undecided else ():
                self.unresolved += int(part.open.sum())
                part.open[:] = False
            self._waiting.popleft()
            self.write_call(*as_rows(first.parts, first.duration_ns), first.routing)

    def abandon(self) -> None:
        """Hand on the calls that are complete; the requests under way never ended and get no row."""
        for waiting in self._waiting:
            for part in waiting.parts:
                part.settle = False
                self.unresolved += int(part.open.sum())
                part.open[:] = False
        self._flush()
        self.sequences = []
