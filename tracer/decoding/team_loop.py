"""TEAM's block-diffusion decoding: decoded rows keep their experts' outputs, cold rows use what the others use, four branches.

Source: arXiv 2602.08404 and its released loop (github PKU-SEC-Lab/TEAM-MoE-dLLM @e9c502e). A block's first forward is vanilla.
Later forwards run the block as it is, with each of its two surest masked tokens filled in, and with both; branches do not see
each other. What a branch with fewer guesses accepts decides which guesses hold. The commit forward computes everything again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import nn

from tracer.decoding.block_loop import Before, BlockLoop, DecodeResult, Step
from tracer.decoding.checks import DecodeOptions
from tracer.decoding.team_layers import TeamLayers
from tracer.decoding.team_rules import BRANCHES, TeamRules, mark_cold
from tracer.errors import UserError


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
    recorder : tracer.recording.recorder.Recorder, optional
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


class TeamLoop(BlockLoop):
    """One decoding; a :class:`BlockLoop` whose blocks are denoised TEAM's way."""

    rules: TeamRules
    layers: TeamLayers

    def decode(self, rules: TeamRules) -> DecodeResult:
        """Run to the end; hooks come off however it ends."""
        self.rules, self.layers = rules, TeamLayers(self.model, rules.limit)
        self.branches = BRANCHES if rules.speculate else 1
        try:
            return self.run(kv_cache=True, early_stop=False)
        finally:
            self.layers.close()

    def _prepare(
        self, states: np.ndarray, known: np.ndarray, guesses: np.ndarray, before: Before | None
    ) -> np.ndarray | None:
        decoded = cold = None
        if before is not None:
            decoded, marks = (known > before.accepted) & self.rules.reuse, np.empty_like(known)
            mark_cold(states[-1], np.ones_like(known), before.confidence, guesses, self.rules.hot, marks)
            cold = marks.view(bool)
        self.layers.step(len(states), decoded, cold)
        return self.layers.routed

    def _keep(self, chosen: int) -> None:
        self.layers.keep(chosen)
