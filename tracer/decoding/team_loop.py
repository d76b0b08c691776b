"""TEAM's block-diffusion decoding: decoded rows keep their experts' outputs, cold rows use what the others use, four branches.

Source: arXiv 2602.08404 and its released loop (github PKU-SEC-Lab/TEAM-MoE-dLLM @e9c502e). A block's first forward is vanilla.
Later forwards run the block as it is, with each of its two surest masked tokens filled in, and with both; branches do not see
each other. What a branch with fewer guesses accepts decides which guesses hold. The commit forward computes everything again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from tracer.decoding.block_loop import BlockLoop, DecodeResult, Step, as_set, predict
from tracer.decoding.checks import DecodeOptions
from tracer.decoding.team_layers import TeamLayers
from tracer.decoding.team_rules import BRANCHES, GUESSES, TeamRules, chosen_branch, fill_in, gained, mark_cold, surest
from tracer.errors import UserError
from tracer.recording.host_call import Branches


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
    hot_probability, hot_distance, reuse, limit, speculate
        As in :class:`tracer.decoding.team_rules.TeamRules`.
    recorder : tracer.record.Recorder, optional
        Is told everything trace-format.md asks of speculative calls, and writes TEAM's parameters into ``meta.decoding``.

    Raises
    ------
    UserError
        An option out of range, a prompt that does not fit, a model without MoE layers, or routers that cannot be limited.
    """
    options = DecodeOptions(gen_length, mask_id, eos_id, block_length, steps, threshold)
    rules = TeamRules(reuse, limit, speculate, threshold, None, hot_probability, hot_distance)
    loop = TeamLoop(model, input_ids, options, on_step, recorder)
    if recorder is not None:
        section = {name: value for name, value in asdict(rules).items() if name != "quota"}
        section |= {"loop": "team", "block_length": block_length, "steps": steps, "mask_id": mask_id}
        _tell_decoding(recorder, section | {"temperature": 0.0, "kv_cache": True})
    return loop.decode(rules)


def _tell_decoding(recorder: Any, section: dict[str, Any]) -> None:
    """Put a loop's parameters into the section ``decoding`` of meta.json.

    Raises
    ------
    UserError
        The trace is open already and says something else.
    """
    if recorder.sink.writer is None:
        recorder.decoding.update(section)
    for name, value in section.items():
        if recorder.decoding.get(name) != value:
            raise UserError(
                f"This trace was begun with {name}={recorder.decoding.get(name)}, not {value}; record runs of other "
                "parameters into a trace of their own."
            )


@dataclass(slots=True)
class _Before:
    """What the forward before left of its chosen branch, on the host, [B] each."""

    accepted: np.ndarray  # uint8
    token: np.ndarray  # int64
    confidence: np.ndarray  # float32


class TeamLoop(BlockLoop):
    """One decoding; a :class:`BlockLoop` whose blocks are denoised TEAM's way."""

    rules: TeamRules
    layers: TeamLayers

    def decode(self, rules: TeamRules) -> DecodeResult:
        """Run to the end; hooks come off however it ends."""
        self.rules, self.layers = rules, TeamLayers(self.model, rules.limit)
        try:
            return self.run(kv_cache=True, early_stop=False)
        finally:
            self.layers.close()

    def _denoise(self, block: int, cache, early_stop: bool) -> bool:
        low, high = self._bounds(block)
        before, step = None, 0
        while bool((self.ids[0, low:high] == self.mask_id).any()):
            before, tokens = self._forward(block, step, cache, before)
            self._tell("denoise", block, step, range(low, high), tokens)
            step += 1
        return False

    def _forward(self, block: int, step: int, cache, before: _Before | None) -> tuple[_Before, int]:
        """Run a block's branches and go on from the chosen one; the first forward is vanilla. Returns the tokens gained too."""
        (low, high), rules = self._bounds(block), self.rules
        now = self.ids[0, low:high]
        known, guesses = as_set(now != self.mask_id), np.full(GUESSES, -1)
        states = np.empty((BRANCHES if before is not None and rules.speculate else 1, len(known)), np.uint8)
        decoded, cold, given = None, np.zeros_like(known), now[None]
        if before is not None:
            surest(known, before.confidence, guesses)
            decoded = torch.from_numpy((known > before.accepted) & rules.reuse)
        fill_in(known, guesses, states)
        if before is not None:
            if rules.limit:
                mark_cold(states[-1], np.ones_like(known), before.confidence, guesses, rules.hot, cold)
            guessed = torch.from_numpy(states > known).to(self.device)
            given = torch.where(guessed, torch.from_numpy(before.token).to(self.device), now)
        self.layers.step(len(states), decoded, torch.from_numpy(cold.view(bool)))
        logits = self._call_branches(block, step, low, given, cache)
        token, probability, _, _ = predict(logits, self.mask_id, 0.0, None)
        token, probability = token.view(given.shape), probability.view(given.shape)
        accepted = self._accept(step, states, probability)
        taken, tokens = as_set(accepted), token.cpu().numpy()
        chosen = 0 if before is None else chosen_branch(guesses, before.token, tokens, taken)
        self.ids[0, low:high] = torch.where(accepted[chosen], token[chosen], given[chosen])
        count = gained(known, states[chosen], taken[chosen])
        if self.recorder is not None:
            branches = Branches(len(states), chosen if len(states) > 1 else None, count, self.layers.routed)
            self.recorder.note(predicted_ids=token, confidence=probability, accepted=accepted, branches=branches)
        self.layers.keep(chosen)
        return _Before(taken[chosen], tokens[chosen], probability[chosen].cpu().numpy()), count

    def _call_branches(self, block: int, step: int, low: int, states: torch.Tensor, cache) -> torch.Tensor:
        """Run every branch in one call; a row sees the cached prefix and its own branch. Returns logits [R * B, V]."""
        count, length = states.shape
        if count == 1:
            return self._call("denoise", block, step, low, low + length, cache)
        if self.recorder is not None:
            self.recorder.announce("denoise", block, step)
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
