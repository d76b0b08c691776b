"""One sequence being decoded: which of its positions hold which token, and whether a call still belongs to it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tracer.errors import UserError


@dataclass(slots=True)
class Sequence:
    """What is known of one request. ``tokens`` int64 by position, -1 unknown or masked; ``kept`` bool by position."""

    request_id: int
    explicit: bool = False
    prompt_tokens: int | None = None
    dataset: str | None = None
    prompt: str | None = None
    calls: int = 0
    denoised: bool = False
    block: int = -1
    tokens: np.ndarray = field(default_factory=lambda: np.full(256, -1, np.int64))
    kept: np.ndarray = field(default_factory=lambda: np.zeros(256, bool))
    furthest: int = -1
    first: int = -1  # position that the last call began at
    padded: int = 0  # rows of padding before the prompt, and the position after them
    first_position: int = 0
    _steps: dict[int, int] = field(default_factory=dict)

    def next_step(self, block: int) -> int:
        """Index of the denoise forward that now begins in ``block``."""
        self.block = block
        self._steps[block] = self._steps.get(block, -1) + 1
        return self._steps[block]

    def reaches(self, positions: np.ndarray) -> bool:
        """Whether a call goes beyond every position seen so far."""
        return int(positions.max(initial=-1)) > self.furthest

    def see(self, positions: np.ndarray, token_ids: np.ndarray, kind: str) -> None:
        """Note the tokens of a call, -1 where masked."""
        if self.calls == 0 and (positions >= 0).any():
            self.padded = int(np.argmax(positions >= 0))
            self.first_position = int(positions[self.padded]) if self.padded else 0
        self.calls += 1
        self.denoised |= kind in ("denoise", "decode")
        self.first = int(positions[positions >= 0].min(initial=2**31 - 1))
        self.furthest = max(self.furthest, self.learn(positions, token_ids))

    def learn(self, positions: np.ndarray, token_ids: np.ndarray) -> int:
        """Note tokens that were written after a call; returns the largest position, -1 if there is none."""
        if len(positions) == 0:
            return -1
        if positions.min() < 0:
            token_ids, positions = token_ids[positions >= 0], positions[positions >= 0]
        furthest = int(positions.max(initial=-1))
        self._reserve(furthest + 1)
        self.tokens[positions] = token_ids
        return furthest

    def _reserve(self, length: int) -> None:
        if length > len(self.tokens):
            more = max(length, 2 * len(self.tokens)) - len(self.tokens)
            self.tokens = np.concatenate((self.tokens, np.full(more, -1, np.int64)))
            self.kept = np.concatenate((self.kept, np.zeros(more, bool)))

    def not_kept(self, positions: np.ndarray) -> np.ndarray:
        """Bool [T]: positions whose token the sampler did not take in the step before."""
        self._reserve(int(positions.max(initial=-1)) + 1)
        return ~self.kept[np.maximum(positions, 0)]

    def keep(self, positions: np.ndarray, kept: np.ndarray) -> None:
        """Note which positions the sampler takes over into the next step."""
        self._reserve(int(positions.max(initial=-1)) + 1)
        self.kept[positions[positions >= 0]] = kept[positions >= 0]

    def whole(self, output: np.ndarray, outcome: tuple[np.ndarray, np.ndarray] | None = None) -> tuple[np.ndarray, int]:
        """The sequence by position, -1 unknown, and how many of its positions the output tells.

        Parameters
        ----------
        output : int64 [length]
            By column: prompt and padding before it in front, or only what was generated.
        outcome : (int64 [T], int64 [T]), optional
            Positions of the last call and what the loop wrote there after it. A loop that fills its block and cuts the output
            shows here what the output leaves out; where the two differ, the output alone counts.
        """
        prompt = self.prompt_tokens or 0
        known = self.tokens[:prompt]
        shown = np.concatenate((np.full(self.first_position, -1, np.int64), output[self.padded :]))
        if not (len(shown) >= prompt and (shown[:prompt] == known)[(known >= 0) & (shown[:prompt] >= 0)].all()):
            shown = np.concatenate((known, output))
        told = len(shown)
        if outcome is None:
            return shown, told
        positions, token_ids = outcome
        positions, token_ids = positions[positions >= 0], token_ids[positions >= 0]
        inside = positions < told
        if (token_ids[inside] != shown[positions[inside]])[shown[positions[inside]] >= 0].any():
            return shown, told
        longer = np.full(max(told, int(positions.max(initial=-1)) + 1), -1, np.int64)
        longer[:told] = shown
        longer[positions[~inside]] = token_ids[~inside]
        return longer, told

    def generated(self, told: int | None, eos_id: int | None) -> int:
        """Tokens decided after the prompt and before position ``told``, up to and with the end token."""
        written = self.tokens[self._prompt : told]
        end = np.flatnonzero(written == eos_id) if eos_id is not None else np.zeros(0, np.int64)
        return int(np.count_nonzero(written[: end[0] + 1 if len(end) else None] >= 0))

    @property
    def _prompt(self) -> int:
        return self.prompt_tokens if self.prompt_tokens is not None else self.furthest + 1

    def row(self, block_length: int | None, eos_id: int | None, generated: int | None, stop_reason: str | None) -> dict:
        """The request's row of the trace."""
        prompt = self._prompt
        count = self.generated(None, eos_id) if generated is None else generated
        written = self.tokens[prompt : prompt + count]
        if stop_reason is None:
            stop_reason = "eos" if eos_id is not None and bool((written == eos_id).any()) else "length"
        return {
            "request_id": self.request_id,
            "dataset": self.dataset,
            "prompt": self.prompt,
            "prompt_tokens": prompt,
            "generated_tokens": count,
            "first_block": prompt // block_length if block_length else -1,
            "stop_reason": stop_reason,
        }


def starts_another(
    sequence: Sequence, token_ids: np.ndarray, positions: np.ndarray, kv_tokens: int, masked: np.ndarray
) -> bool:
    """Whether a call without a cached prefix begins another request than ``sequence``.

    It does when it starts at position 0 and holds another prompt, holds only prompt positions after denoising has begun, or has
    every generated position masked although tokens had been decoded there.
    """
    real = positions >= 0
    positions, token_ids, masked = positions[real], token_ids[real], masked[real]
    if kv_tokens > 0 or sequence.calls == 0 or len(positions) == 0 or positions.min() > 0:
        return False
    if not sequence.denoised or sequence.prompt_tokens is None:
        return True
    if positions.max() >= len(sequence.tokens):
        sequence._reserve(int(positions.max()) + 1)
    before = sequence.tokens[positions]
    prompt = positions < sequence.prompt_tokens
    if (prompt & (before >= 0) & (before != token_ids)).any():
        return True
    if prompt.all():
        return True
    return bool(masked[~prompt].all() and (before[~prompt] >= 0).any())


def refuse_rewriting(sequence: Sequence, positions: np.ndarray, token_ids: np.ndarray) -> None:
    """Raise where a call of a model whose mask token is not known repeats the one before with other tokens in it.

    It does when it begins where that call began and now holds, where it held one token several times (the unknown mask),
    another in some of those places and the same in all others. A new prompt differs elsewhere too, and an autoregressive loop
    that goes back over rejected guesses begins further on.
    """
    real = positions >= 0
    positions, token_ids = positions[real], token_ids[real]
    if not len(positions) or positions[0] != sequence.first or positions[-1] > sequence.furthest:
        return
    before = sequence.tokens[positions]
    changed = before != token_ids
    if changed.any():
        fill = before[changed][0]
        if fill >= 0 and (before[changed] == fill).all() and np.count_nonzero(before == fill) > 1:
            raise UserError(
                "The loop writes over token ids it passed before, so it denoises, but no mask token is known; pass mask_id=."
            )
