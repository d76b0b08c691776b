"""TEAM's block-diffusion decoding: decoded rows keep their experts' outputs, cold rows use what the others use, four branches.

Source: arXiv 2602.08404 and its released loop (github PKU-SEC-Lab/TEAM-MoE-dLLM @e9c502e). A block's first forward is vanilla.
Later forwards run the block as it is, with each of its two surest masked tokens filled in, and with both; branches do not see
each other. What a branch with fewer guesses accepts decides which guesses hold. The commit forward computes everything again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from tracer.decoding.accept import accept, predict
from tracer.decoding.block_loop import BlockLoop, DecodeResult, Step
from tracer.decoding.speculative import Branches, SpeculativeCalls, tell_decoding
from tracer.decoding.team_layers import TeamLayers
from tracer.errors import UserError

# Speculated positions are two: branches hold none, the first, the second, both.
GUESSES = ((False, False), (True, False), (False, True), (True, True))


@dataclass(frozen=True, slots=True)
class TeamRules:
    """TEAM's switches and numbers; see :func:`decode_team`."""

    hot_probability: float = 0.7
    hot_distance: int = 4
    reuse: bool = True
    limit: bool = True
    speculate: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.hot_probability <= 1:
            raise UserError(f"hot_probability is a probability between 0 and 1, not {self.hot_probability!r}.")
        distance = self.hot_distance
        if isinstance(distance, bool) or not isinstance(distance, int) or distance < 1:
            raise UserError(f"hot_distance must be a whole number of at least 1, not {distance!r}.")


def decode_team(
    model: nn.Module,
    input_ids: Any,
    *,
    gen_length: int,
    mask_id: int,
    eos_id: int | None = None,
    block_length: int = 32,
    steps: int = 32,
    threshold: float = 0.95,
    hot_probability: float = 0.7,
    hot_distance: int = 4,
    reuse: bool = True,
    limit: bool = True,
    speculate: bool = True,
    on_step: Callable[[Step], None] | None = None,
    recorder: Any = None,
) -> DecodeResult:
    """Decode one prompt the way TEAM does, on a model of SDAR's kind. Writes the most probable tokens.

    With everything switched off this is :func:`tracer.decode.decode_sdar`.

    Parameters
    ----------
    model, input_ids, gen_length, mask_id, eos_id, block_length, steps, threshold, on_step
        As in :func:`tracer.decode.decode_sdar`.
    hot_probability : float
        A row at least this sure of its token is never cold: 0.7 in the release, 0.6 best in the paper.
    hot_distance : int
        Positions from the nearest known token at which a row may be cold.
    reuse, limit, speculate : bool
        The paper's delayed caching, limited activation and speculative exploration.
    recorder : tracer.recording.recorder.Recorder, optional
        Is told everything trace-format.md asks of speculative calls, and writes TEAM's parameters into ``meta.decoding``.

    Raises
    ------
    UserError
        An option out of range, a prompt that does not fit, a model without MoE layers, or routers that cannot be limited.
    """
    rules = TeamRules(hot_probability, hot_distance, reuse, limit, speculate)
    loop = TeamLoop(
        model,
        input_ids,
        gen_length,
        mask_id,
        eos_id,
        block_length,
        steps,
        threshold,
        0.0,
        None,
        on_step,
        recorder,
    )
    section = {
        "loop": "team",
        "block_length": block_length,
        "steps": steps,
        "threshold": threshold,
        "temperature": 0.0,
        "mask_id": mask_id,
        "kv_cache": True,
        **asdict(rules),
    }
    return loop.decode(rules, section)


@dataclass(slots=True)
class _Known:
    """What the forward before left of its chosen branch, [B] each: ``accepted`` by it, ``token`` and ``probability``."""

    accepted: torch.Tensor
    token: torch.Tensor
    probability: torch.Tensor


class TeamLoop(BlockLoop):
    """One decoding; a :class:`BlockLoop` whose blocks are denoised TEAM's way."""

    rules: TeamRules
    layers: TeamLayers
    calls: SpeculativeCalls | None

    def decode(self, rules: TeamRules, section: dict[str, Any]) -> DecodeResult:
        """Run to the end; hooks come off however it ends."""
        self.rules, self.calls, clean = rules, None, False
        self.layers = TeamLayers(self.model, rules.limit)
        try:
            if self.recorder is not None:
                tell_decoding(self.recorder, section)
                self.recorder.begin(self.prompt_tokens)
                self.calls = SpeculativeCalls(self.recorder)
            result = self.run(kv_cache=True, early_stop=False)
            clean = True
            return result
        finally:
            self.layers.close()
            if self.calls is not None:
                self.calls.close(clean)

    def _call(self, kind: str, block: int, step: int, low: int, high: int, cache) -> torch.Tensor:
        if kind != "denoise" and self.calls is not None:
            self.calls.expect(None)
        return super()._call(kind, block, step, low, high, cache)

    def _denoise(self, block: int, cache, early_stop: bool) -> bool:
        low, high = self._bounds(block)
        before, step = None, 0
        while bool((self.ids[0, low:high] == self.mask_id).any()):
            if before is None:
                before, gained = self._first(block, low, high, cache)
            else:
                before, gained = self._guess(block, step, low, high, cache, before)
            self._tell("denoise", block, step, range(low, high), gained)
            step += 1
        return False

    def _first(self, block: int, low: int, high: int, cache) -> tuple[_Known, int]:
        """A block's first forward: vanilla."""
        state = self.ids[0, low:high].clone()
        self.layers.step(1, None, None)
        logits = self._call("denoise", block, 0, low, high, cache)
        token, probability, _, _ = predict(logits, self.mask_id, 0.0, None)
        taken = accept(probability, state == self.mask_id, self.threshold, self.quotas[0])
        return self._take(low, high, 0, state[None], (token[None], probability[None], taken[None]), 0)

    def _guess(self, block: int, step: int, low: int, high: int, cache, before: _Known) -> tuple[_Known, int]:
        """A later forward: states prepared, run, and judged."""
        rules, state = self.rules, self.ids[0, low:high].clone()
        masked = state == self.mask_id
        sure = before.probability.masked_fill(~masked, -torch.inf)
        surest = sure.argsort(descending=True, stable=True)[: min(2, int(masked.sum()))]
        states = self._states(state, surest, before.token)
        decoded = ~masked & ~before.accepted if rules.reuse else None
        cold = self._cold(states[-1] != self.mask_id, surest, before.probability) if rules.limit else None
        self.layers.step(len(states), decoded, cold)
        if len(states) == 1:
            logits = self._call("denoise", block, step, low, high, cache)
        else:
            logits = self._call_branches(block, step, low, states, cache)
        token, probability, _, _ = predict(logits, self.mask_id, 0.0, None)
        token, probability = token.view(states.shape), probability.view(states.shape)
        taken = torch.stack(
            [
                accept(own, given == self.mask_id, self.threshold, self.quotas[step])
                for own, given in zip(probability, states, strict=True)
            ]
        )
        chosen = 0
        if len(states) > 1:
            chosen = chosen_branch(surest.tolist(), before.token, token, taken)
        guessed = sum(guess for guess, _ in zip(GUESSES[chosen], surest, strict=False))
        return self._take(low, high, chosen, states, (token, probability, taken), guessed)

    def _states(self, state: torch.Tensor, surest: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """The block as each branch sees it, int64 [R, B]."""
        if not self.rules.speculate:
            return state[None]
        states = state.repeat(len(GUESSES), 1)
        for branch, guesses in enumerate(GUESSES):
            for guess, position in zip(guesses, surest.tolist(), strict=False):
                if guess:
                    states[branch, position] = token[position]
        return states

    def _cold(self, known: torch.Tensor, surest: torch.Tensor, probability: torch.Tensor) -> torch.Tensor:
        """Rows far from everything known and unsure, bool [B]; the guessed positions are exempt."""
        place = torch.arange(self.block_length, device=self.device)
        distance = (place[:, None] - place[known][None, :]).abs().amin(dim=1)
        cold = (distance >= self.rules.hot_distance) & (probability < self.rules.hot_probability)
        cold[surest] = False
        return cold

    def _call_branches(self, block: int, step: int, low: int, states: torch.Tensor, cache) -> torch.Tensor:
        """Run every branch in one call; a row sees the cached prefix and its own branch. Returns logits [R * B, V]."""
        if self.recorder is not None:
            self.recorder.announce("denoise", block, step)
        count, length = states.shape
        branch = torch.arange(count, device=self.device).repeat_interleave(length)
        own = branch[:, None] == branch[None, :]
        seen = torch.cat((own.new_ones(count * length, low), own), dim=1)
        output = self.model(
            input_ids=states.view(1, -1),
            attention_mask=self._mask(seen[None, None]),
            position_ids=torch.arange(low, low + length, device=self.device).repeat(count)[None],
            past_key_values=cache,
            use_cache=True,
            **({"store_kv": False} if self.is_sdar else {}),
        )
        self._keep_cached(cache, low)
        self.forwards += 1
        return output.logits[0]

    def _take(
        self,
        low: int,
        high: int,
        chosen: int,
        states: torch.Tensor,
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        guessed: int,
    ) -> tuple[_Known, int]:
        """Go on from the chosen branch; tell the recorder."""
        token, probability, taken = found
        gained = guessed + int(taken[chosen].sum())
        self.ids[0, low:high] = torch.where(taken[chosen], token[chosen], states[chosen])
        if self.recorder is not None and self.calls is not None:
            branches = len(states)
            kept = chosen if branches > 1 else None
            self.calls.expect(Branches(branches, kept, gained, self.layers.routed))
            self.recorder.note(predicted_ids=token, confidence=probability, accepted=taken)
        self.layers.keep(chosen)
        return _Known(taken[chosen], token[chosen], probability[chosen]), gained


def chosen_branch(surest: list[int], guess: torch.Tensor, token: torch.Tensor, taken: torch.Tensor) -> int:
    """Which branch holds: the one whose guesses are what branches with fewer guesses accept.

    Parameters
    ----------
    surest : list of int
        The guessed positions, one or two of them.
    guess : int64 [B]
        What was guessed.
    token, taken : int64 and bool [4, B]
        What each branch predicts and accepts.
    """

    def right(branch: int, position: int) -> bool:
        return bool(taken[branch, position]) and bool(token[branch, position] == guess[position])

    first = right(0, surest[0])
    if len(surest) == 1:
        return 1 if first else 0
    second = right(0, surest[1])
    second_after, first_after = right(1, surest[1]), second and right(2, surest[0])
    if (first and (second or second_after)) or (second and first_after):
        return 3
    return 1 if first else 2 if second else 0
