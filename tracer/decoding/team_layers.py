"""TEAM inside a model's MoE layers: rows that keep their previous output, and cold rows held to what the others use.

Source: arXiv 2602.08404 and its released layer (github PKU-SEC-Lab/TEAM-MoE-dLLM @e9c502e): decoded rows run neither router
nor experts; if any computed row is cold, it takes its top-K among the union of what the others chose, weights by the router's
own rule. Hooks on a model as it is; they come off with :meth:`TeamLayers.close`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from tracer.adapters.find import find_gates
from tracer.adapters.gate import Gate, Routing, text_config
from tracer.adapters.resolve import find_rule
from tracer.adapters.router_tuple import places
from tracer.adapters.rules import scores_of
from tracer.errors import UserError
from tracer.trace import RouterSpec


class TeamLayers:
    """Hooks on every MoE block and router of a model. R branches of B rows a call, H hidden size.

    ``step`` says what the next call computes; calls outside :meth:`step` and :meth:`keep` pass untouched.
    """

    def __init__(self, model: nn.Module, limit: bool) -> None:
        found = find_gates(model)
        self.gates, self._top_k, self._config = found.gates, found.top_k, text_config(model)
        self._kept: dict[int, torch.Tensor] = {}
        self._given: dict[int, torch.Tensor] = {}
        self._running = False
        self._branches = 1
        # Bool [R * B]: rows that run in the call prepared; None where all do.
        self.routed: np.ndarray | None = None
        self._computed: torch.Tensor | None = None
        self._cold: torch.Tensor | None = None
        self._handles: list[Any] = []
        for gate in self.gates if limit else ():
            if gate.module is None:
                raise _unlimited(gate, "has no router module of its own")
        for place, gate in enumerate(self.gates):
            before, after = self._before(place), self._after(place)
            # First in line, so that a recorder's hooks see what the experts really run.
            self._handles.append(gate.block.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
            self._handles.append(gate.block.register_forward_hook(after, prepend=True))
            if limit and gate.module is not None:
                self._handles.append(gate.module.register_forward_hook(self._on_gate(gate), prepend=True))

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._kept, self._given = {}, {}

    def step(self, branches: int, decoded: np.ndarray | None, cold: np.ndarray | None) -> None:
        """Prepare a denoise call.

        Parameters
        ----------
        branches : int
            R.
        decoded, cold : bool [B], optional
            Rows of every branch that keep their output, and rows that are restricted; None for none.
        """
        self._running, self._branches = True, branches
        self.routed = self._computed = self._cold = None
        if decoded is not None and decoded.any():
            self.routed = np.tile(~decoded, branches)
            self._computed = torch.from_numpy(self.routed)
        if cold is not None and cold.any():
            rows = np.tile(cold, branches)
            self._cold = torch.from_numpy(rows if self.routed is None else rows[self.routed])

    def keep(self, branch: int) -> None:
        """After the call: its outputs in this branch are what decoded rows keep next."""
        self._running = False
        for place, output in self._given.items():
            self._kept[place] = output.unflatten(0, (self._branches, -1))[branch].clone()
        self._given = {}

    def _before(self, place: int):
        def take(module, args, kwargs):
            if not self._running or self._computed is None:
                return None
            if args:
                return (args[0][:, self._computed.to(args[0].device)], *args[1:]), kwargs
            hidden = kwargs["hidden_states"]
            return args, {**kwargs, "hidden_states": hidden[:, self._computed.to(hidden.device)]}

        return take

    def _after(self, place: int):
        def give(module, args, output):
            if not self._running:
                return None
            ran = output[0] if isinstance(output, tuple) else output
            whole = ran
            if self._computed is not None:
                computed = self._computed.to(ran.device)
                whole = self._kept[place].repeat(self._branches, 1).unsqueeze(0)
                whole[:, computed] = ran
            self._given[place] = whole[0].detach()
            return (whole, *output[1:]) if isinstance(output, tuple) else whole

        return give

    def _on_gate(self, gate: Gate):
        def limited(module, args, output):
            ids_at, weights_at, scores_at = places(output, gate.num_experts, self._top_k)
            if ids_at is None or weights_at is None or scores_at is None:
                raise _unlimited(gate, "does not return scores, weights and ids")
            ids, weights, scores = output[ids_at], output[weights_at], output[scores_at]
            router = gate.router or self._rule(gate, Routing(ids, weights, scores))
            if not self._running or self._cold is None:
                return None
            cold = self._cold.to(ids.device)
            allowed = torch.zeros(gate.num_experts, dtype=torch.bool, device=ids.device)
            allowed[ids[~cold].reshape(-1)] = True
            held = scores_of(scores[cold], router.score_function, gate.scores_are)
            ids, weights = ids.clone(), weights.clone()
            again, weighed = choose_inside(router, held, allowed)
            ids[cold], weights[cold] = again.to(ids.dtype), weighed.to(weights.dtype)
            changed = list(output)
            changed[weights_at], changed[ids_at] = weights, ids
            return tuple(changed)

        return limited

    def _rule(self, gate: Gate, routing: Routing) -> RouterSpec:
        """The rule of a router, from what it selected in its first call."""
        find_rule(gate, routing, self._config, self._top_k)
        if gate.router is None:
            raise _unlimited(gate, "follows no rule that is known")
        if gate.router.n_group > gate.router.topk_group:
            raise _unlimited(gate, "chooses among groups of experts")
        return gate.router


@torch.no_grad()
def check_limited(model: nn.Module, token_ids: Sequence[int]) -> None:
    """Run one call, to see before a capture that every router can be held to a set of experts.

    Raises
    ------
    UserError
        Naming the first that cannot.
    """
    layers = TeamLayers(model, limit=True)
    try:
        model(input_ids=torch.tensor([token_ids], device=next(model.parameters()).device), use_cache=False)
    finally:
        layers.close()
    for gate in layers.gates:
        if gate.router is None:
            raise _unlimited(gate, "never fired")


def choose_inside(router: RouterSpec, scores: torch.Tensor, allowed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-K inside a set, for a router without groups; ties go to the lowest expert.

    Parameters
    ----------
    router : RouterSpec
    scores : float32 [N, E]
        After the score function, before bias.
    allowed : bool [E]
        At least K of them.

    Returns
    -------
    tuple of (int64 [N, K], float32 [N, K])
        Experts and their weights.
    """
    selection = scores
    if router.expert_bias is not None:
        selection = scores + torch.from_numpy(router.expert_bias).to(scores.device)
    inside = selection.masked_fill(~allowed, -torch.inf)
    ids = inside.argsort(dim=-1, descending=True, stable=True)[:, : router.top_k]
    weights = (selection if router.bias_in_weights else scores).gather(-1, ids)
    if router.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    weights = weights * router.routed_scaling_factor
    if router.expert_scale is not None:
        weights = weights * torch.from_numpy(router.expert_scale).to(scores.device)[ids]
    return ids, weights


def _unlimited(gate: Gate, why: str) -> UserError:
    return UserError(
        f"The router {gate.name} {why}, so its rows cannot be held to a set of experts; pass limit=False, or capture with "
        "--loop sdar."
    )
