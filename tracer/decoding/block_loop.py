"""The block-diffusion loop behind :mod:`tracer.decode`: prefill, denoise a block at a time, commit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tracer.adapters.gate import text_config
from tracer.decoding.accepting import accept, accept_rule, quotas
from tracer.decoding.checks import DecodeOptions, check_prompt
from tracer.errors import UserError


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


class BlockLoop:
    """One decoding. ``ids`` holds the whole window of blocks, masked where nothing is decided."""

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
        step = 0
        masked = self.ids[0, low:high].eq(self.mask_id)
        while bool(masked.any()):
            logits = self._call("denoise", block, step, low if cache is not None else 0, high, cache)[
                -self.block_length :
            ]
            token, probability, best, best_probability = predict(
                logits, self.mask_id, self.options.temperature, self.generator
            )
            accepted = self._accept(step, as_set(~masked)[None], probability[None])[0]
            self.ids[0, low:high] = torch.where(accepted, token, self.ids[0, low:high])
            if self.recorder is not None:
                self.recorder.note(
                    predicted_ids=token,
                    confidence=probability,
                    accepted=accepted,
                    argmax_ids=best,
                    argmax_confidence=best_probability,
                )
            masked = self.ids[0, low:high].eq(self.mask_id)
            count = int(accepted.sum())
            self._tell("denoise", block, step, range(low, high), count)
            step += 1
            if early_stop and self._end() is not None and self.eos_id in token[accepted].tolist():
                before_end = self.ids[0, self.prompt_tokens : self._end()]
                if not bool(before_end.eq(self.mask_id).any()):
                    return True
        return False

    def _accept(self, step: int, known: np.ndarray, probability: torch.Tensor) -> torch.Tensor:
        """What each of R branches accepts, bool [R, B]; ``known`` uint8 and ``probability`` float32 [R, B]."""
        accepted, confidence = np.empty_like(known), probability.cpu().numpy()
        for branch in range(len(known)):
            accept(self.rule, step, known[branch], confidence[branch], accepted[branch])
        return torch.from_numpy(accepted.view(bool)).to(probability.device)

    def _call(self, kind: str, block: int, step: int, low: int, high: int, cache) -> torch.Tensor:
        """Run the model on positions low..high-1 and return their logits [rows, V]."""
        if self.recorder is not None:
            self.recorder.announce(kind, block, step)
        positions = torch.arange(high, device=self.device)
        seen = positions[None, :] // self.block_length <= positions[low:high, None] // self.block_length
        stored = kind != "denoise"
        output = self.model(
            input_ids=self.ids[:, low:high],
            attention_mask=self._mask(seen[None, None]),
            position_ids=positions[None, low:high],
            past_key_values=cache,
            use_cache=cache is not None,
            # SDAR's own modeling file stores keys and values only when told so.
            **({"store_kv": stored} if self.is_sdar else {}),
        )
        if cache is not None:
            self._keep_cached(cache, high if stored else low)
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
