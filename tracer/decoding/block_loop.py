"""The block-diffusion loop behind :mod:`tracer.decode`: prefill, denoise a block at a time, commit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tracer.adapters.gate import text_config
from tracer.decoding.accepting import accept, accept_rule, quotas
from tracer.decoding.checks import DecodeOptions, check_prompt
from tracer.decoding.team_rules import GUESSES, chosen_branch, fill_in, gained, surest
from tracer.errors import UserError
from tracer.recording.host_call import Branches


def as_set(rows: torch.Tensor) -> np.ndarray:
    """A bool tensor as the set that :mod:`tracer.decoding.accepting` takes, uint8 on the host."""
    return rows.cpu().numpy().view(np.uint8)


@dataclass(frozen=True, slots=True)
class Step:
    """What a loop tells ``on_step`` after a model call. ``generated`` counts tokens decided so far."""

    kind: str
    block: int
    step: int
    positions: range
    accepted: int
    generated: int


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """``ids`` int64: prompt and what was generated, up to and with the end token; ``generated`` counts the latter."""

    ids: torch.Tensor
    stop_reason: str
    forwards: int
    generated: int


@dataclass(slots=True)
class Before:
    """What the forward before left of its chosen branch, on the host, [B] each."""

    accepted: np.ndarray  # uint8
    token: np.ndarray  # int64
    confidence: np.ndarray  # float32


class BlockLoop:
    """One decoding. ``ids`` holds the whole window of blocks, masked where nothing is decided."""

    # Of a block in a denoise call after its first.
    branches = 1

    def __init__(self, model, input_ids, options: DecodeOptions, on_step, recorder):
        prompt = check_prompt(model, input_ids, options.gen_length, options.block_length)
        self.model, self.options, self.recorder, self.on_step = model, options, recorder, on_step
        self.is_sdar = type(model).__name__.startswith("SDAR")
        self.mask_id, self.eos_id, self.block_length = options.mask_id, options.eos_id, options.block_length
        self.rule = accept_rule(options.threshold, quotas(options.block_length, options.steps))
        self.prompt_tokens, self.limit = prompt.shape[1], prompt.shape[1] + options.gen_length
        self.device = prompt.device
        self.blocks = -(-self.limit // self.block_length)
        self.ids = torch.full((1, self.blocks * self.block_length), self.mask_id, dtype=torch.long, device=self.device)
        self.ids[:, : self.prompt_tokens] = prompt
        self.forwards = self.decided = 0
        self.generator = None
        if options.temperature > 0:
            self.generator = torch.Generator(self.device)
            if options.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(options.seed)

    @torch.no_grad()
    def run(self, kv_cache: bool, early_stop: bool) -> DecodeResult:
        """Decode to the end; ``kv_cache`` and ``early_stop`` as in :func:`tracer.decode.decode_llada2`."""
        if self.recorder is not None:
            self.recorder.begin(self.prompt_tokens)
        first = self.prompt_tokens // self.block_length
        cache = self._new_cache() if kv_cache else None
        if cache is not None and first:
            self._call("prefill", -1, -1, 0, first * self.block_length, cache)
            self._tell("prefill", -1, -1, range(first * self.block_length), 0)
        for block in range(first, self.blocks):
            stopped = self._denoise(block, cache, early_stop)
            if stopped:
                break
            if cache is not None:
                self._call("commit", block, -1, *self._bounds(block), cache)
                self._tell("commit", block, -1, range(*self._bounds(block)), 0)
            if self._end() is not None:
                break
        return self._result()

    def _bounds(self, block: int) -> tuple[int, int]:
        return block * self.block_length, (block + 1) * self.block_length

    def _denoise(self, block: int, cache, early_stop: bool) -> bool:
        """Denoise a block until nothing in it is masked; True when decoding stopped inside it."""
        low, high = self._bounds(block)
        before, step = None, 0
        while bool(self.ids[0, low:high].eq(self.mask_id).any()):
            before = self._forward(block, step, cache, before)
            step += 1
            if early_stop and self._end() is not None and self.eos_id in before.token[before.accepted == 1]:
                before_end = self.ids[0, self.prompt_tokens : self._end()]
                if not bool(before_end.eq(self.mask_id).any()):
                    return True
        return False

    def _forward(self, block: int, step: int, cache, before: Before | None) -> Before:
        """Run a step of a block, all branches in one call, and go on from the one whose guesses hold; a first step has none."""
        low, high = self._bounds(block)
        now = self.ids[0, low:high]
        known, guesses, guess = as_set(now != self.mask_id), np.full(GUESSES, -1), np.zeros(high - low, np.int64)
        if before is not None:
            guess = before.token
            surest(known, before.confidence, guesses)
        states = np.empty((1 if before is None else self.branches, high - low), np.uint8)
        fill_in(known, guesses, states)
        guessed, filled = (torch.from_numpy(array).to(self.device) for array in (states > known, guess))
        given = torch.where(guessed, filled, now)
        routed = self._prepare(states, known, guesses, before)
        logits = self._call_branches(block, step, given, cache)[-given.numel() :]
        token, probability, best, best_probability = predict(
            logits, self.mask_id, self.options.temperature, self.generator
        )
        tokens, confidence = (each.cpu().numpy().reshape(states.shape) for each in (token, probability))
        taken = np.empty_like(states)
        for branch in range(len(states)):
            accept(self.rule, step, states[branch], confidence[branch], taken[branch])
        chosen = chosen_branch(guesses, guess, tokens, taken)
        count = gained(known, states[chosen], taken[chosen])
        accepted = torch.from_numpy(taken.view(bool)).to(self.device)
        self.ids[0, low:high] = torch.where(accepted[chosen], token.view(given.shape)[chosen], given[chosen])
        if self.recorder is not None:
            self.recorder.note(
                predicted_ids=token,
                confidence=probability,
                accepted=accepted,
                argmax_ids=best,
                argmax_confidence=best_probability,
                branches=Branches(len(states), chosen if len(states) > 1 else None, count, routed),
            )
        self._tell("denoise", block, step, range(low, high), count)
        self._keep(chosen)
        return Before(taken[chosen], tokens[chosen], confidence[chosen])

    def _prepare(
        self, states: np.ndarray, known: np.ndarray, guesses: np.ndarray, before: Before | None
    ) -> np.ndarray | None:
        """Before a call of branches that know ``states`` [R, B]: which rows MoE layers get, bool [R * B], None for all."""
        return None

    def _keep(self, chosen: int) -> None:
        """After it: the branch that decoding goes on with."""

    def _call(self, kind: str, block: int, step: int, low: int, high: int, cache) -> torch.Tensor:
        """Run the model on positions low..high-1 and return their logits [rows, V]."""
        positions = torch.arange(high, device=self.device)
        seen = positions[None, :] // self.block_length <= positions[low:high, None] // self.block_length
        return self._run((kind, block, step), self.ids[:, low:high], positions[None, low:high], seen, cache)

    def _call_branches(self, block: int, step: int, given: torch.Tensor, cache) -> torch.Tensor:
        """Run every branch in one call, ``given`` int64 [R, B]; a row sees what is before the block, and its own branch.

        Returns logits [rows, V], those of the branches last: a single branch without a cache runs with all before it.
        """
        low, high = self._bounds(block)
        if len(given) == 1:
            return self._call("denoise", block, step, low if cache is not None else 0, high, cache)
        branch = torch.arange(len(given), device=self.device).repeat_interleave(high - low)
        own = branch[:, None] == branch[None, :]
        seen = torch.cat((own.new_ones(len(branch), low), own), dim=1)
        positions = torch.arange(low, high, device=self.device).repeat(len(given))[None]
        return self._run(("denoise", block, step), given.view(1, -1), positions, seen, cache)

    def _run(self, call: tuple[str, int, int], ids, positions, seen: torch.Tensor, cache) -> torch.Tensor:
        """One model call; only what is not denoising stays in the cache. ``seen`` bool [rows, keys]."""
        if self.recorder is not None:
            self.recorder.announce(*call)
        stored = call[0] != "denoise"
        output = self.model(
            input_ids=ids,
            attention_mask=self._mask(seen[None, None]),
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            # SDAR's own modeling file stores keys and values only when told so.
            **({"store_kv": stored} if self.is_sdar else {}),
        )
        if cache is not None:
            self._keep_cached(cache, seen.shape[1] - (0 if stored else ids.shape[1]))
        self.forwards += 1
        return output.logits[0]

    def _keep_cached(self, cache, wanted: int) -> None:
        """Cut the cache back to ``wanted`` positions: a denoise call leaves nothing in it."""
        surplus = int(cache.get_seq_length()) - wanted
        if surplus < 0:
            raise UserError(
                f"{type(self.model).__name__} did not store its keys and values in the cache it was given; decode without one."
            )
        if surplus > 0:
            cache.crop(-surplus)

    def _mask(self, seen: torch.Tensor) -> torch.Tensor:
        """The mask as the attention wants it: boolean, or added to the scores in the model's own dtype."""
        config = text_config(self.model)
        if self.is_sdar or getattr(config, "_attn_implementation", "sdpa") != "eager":
            return seen
        dtype = next(self.model.parameters()).dtype
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)

    def _new_cache(self):
        from transformers import DynamicCache

        return DynamicCache()

    def _end(self) -> int | None:
        """Position of the first end token after the prompt, None if there is none."""
        if self.eos_id is None:
            return None
        found = (self.ids[0, self.prompt_tokens : self.limit] == self.eos_id).nonzero()
        return self.prompt_tokens + int(found[0]) if len(found) else None

    def _tell(self, kind: str, block: int, step: int, positions: range, accepted: int) -> None:
        self.decided += accepted
        if self.on_step is not None:
            self.on_step(Step(kind, block, step, positions, accepted, self.decided))

    def _result(self) -> DecodeResult:
        end = self._end()
        stop = self.limit if end is None else end + 1
        reason = "length" if end is None else "eos"
        generated = stop - self.prompt_tokens
        if self.recorder is not None:
            self.recorder.finish(generated=generated, stop_reason=reason)
        return DecodeResult(self.ids[0, :stop].clone(), reason, self.forwards, generated)


def predict(
    logits: torch.Tensor, mask_id: int, temperature: float, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The token to write at each row, its probability, the most probable token and its probability.

    Parameters
    ----------
    logits : float [R, V]
    mask_id : int
        Never chosen, so that every accepted row leaves the mask; probabilities are of the whole vocabulary all the same.
    temperature : float
        0 takes the most probable token of softmax(logits); above 0 a token is drawn from softmax(logits / temperature), which
        then is the distribution of both probabilities.
    generator : torch.Generator, optional
        Of the draw, on the device of ``logits``.

    Returns
    -------
    tuple of (int64 [R], float32 [R], int64 [R], float32 [R])
    """
    scaled = logits.float() / temperature if temperature > 0 else logits.float()
    distribution = scaled.softmax(dim=-1)
    choosable = distribution.clone()
    choosable[:, mask_id] = 0.0
    best_probability, best = choosable.max(dim=-1)
    if temperature == 0:
        return best, best_probability, best, best_probability
    drawn = torch.multinomial(choosable, 1, generator=generator)
    return drawn.squeeze(-1), distribution.gather(-1, drawn).squeeze(-1), best, best_probability
