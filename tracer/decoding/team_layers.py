"""TEAM inside a model's MoE layers: rows that keep their previous output, and cold rows held to what the others use.

Source: arXiv 2602.08404 and its released layer (github PKU-SEC-Lab/TEAM-MoE-dLLM @e9c502e): decoded rows run neither router
nor experts; if any computed row is cold, it takes its top-K among the union of what the others chose, weights by the router's
own rule. Hooks on a model as it is; they come off with :meth:`TeamLayers.close`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from tracer.adapters.find import find_gates
from tracer.adapters.gate import Gate, text_config
from tracer.adapters.rules import candidates, fit_rule, scores_of
from tracer.errors import UserError
from tracer.trace import RouterSpec


class TeamLayers:
    """Hooks on every MoE block and router of a model. R branches of B rows a call, H hidden size.

    ``step`` says what the next call computes; calls outside :meth:`step` and :meth:`keep` pass untouched.
    """

    def __init__(self, model: nn.Module, limit: bool) -> None:
        gates = find_gates(model)
        self._top_k, self._config = gates.top_k, text_config(model)
        self._kept: dict[int, torch.Tensor] = {}
        self._given: dict[int, torch.Tensor] = {}
        self._rules: dict[int, tuple[RouterSpec, str]] = {}
        self._running = False
        self._branches = 1
        self._computed: torch.Tensor | None = None
        self._cold: torch.Tensor | None = None
        self._handles: list[Any] = []
        for place, gate in enumerate(gates.gates):
            before, after = self._before(place), self._after(place)
            # First in line, so that a recorder's hooks see what the experts really run.
            self._handles.append(gate.block.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
            self._handles.append(gate.block.register_forward_hook(after, prepend=True))
            if limit:
                if gate.module is None:
                    raise _unlimited(gate, "has no router module of its own")
                self._handles.append(gate.module.register_forward_hook(self._on_gate(place, gate), prepend=True))

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._kept, self._given = {}, {}

    def step(self, branches: int, decoded: torch.Tensor | None, cold: torch.Tensor | None) -> None:
        """Prepare a denoise call.

        Parameters
        ----------
        branches : int
            R.
        decoded, cold : bool [B], optional
            Rows of every branch that keep their output, and rows that are restricted; None for none.
        """
        self._running, self._branches = True, branches
        self._computed = self._cold = None
        if decoded is not None and bool(decoded.any()):
            self._computed = ~decoded.repeat(branches)
        if cold is not None and bool(cold.any()):
            cold = cold.repeat(branches)
            self._cold = cold if self._computed is None else cold[self._computed]

    @property
    def routed(self) -> np.ndarray | None:
        """Bool [R * B]: rows that run in the call prepared; None where all do."""
        return None if self._computed is None else self._computed.cpu().numpy()

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

    def _on_gate(self, place: int, gate: Gate):
        def limited(module, args, output):
            if place not in self._rules:
                self._rules[place] = self._rule(gate, output)
            if not self._running or self._cold is None:
                return None
            logits, weights, ids = (output[at] for at in _places(output, gate, self._top_k))
            router, scores_are = self._rules[place]
            cold = self._cold.to(ids.device)
            allowed = torch.zeros(gate.num_experts, dtype=torch.bool, device=ids.device)
            allowed[ids[~cold].reshape(-1)] = True
            scores = scores_of(logits[cold], router.score_function, scores_are)
            own_ids, own_weights = choose_inside(router, scores, allowed)
            ids, weights = ids.clone(), weights.clone()
            ids[cold], weights[cold] = own_ids.to(ids.dtype), own_weights.to(weights.dtype)
            changed = list(output)
            _, weights_at, ids_at = _places(output, gate, self._top_k)
            changed[weights_at], changed[ids_at] = weights, ids
            return tuple(changed)

        return limited

    def _rule(self, gate: Gate, output: Any) -> tuple[RouterSpec, str]:
        """The rule of a router, from what it selected in its first call."""
        scores, weights, ids = (output[at] for at in _places(output, gate, self._top_k))
        rounding = max(torch.finfo(scores.dtype).eps, torch.finfo(weights.dtype).eps)
        found = fit_rule(
            candidates(gate, self._config, self._top_k, scores),
            scores,
            ids.cpu().numpy().astype(np.int64),
            weights.float().cpu().numpy(),
            rounding,
        )
        if found is None:
            raise _unlimited(gate, "follows no rule that is known")
        if found[0].n_group > found[0].topk_group:
            raise _unlimited(gate, "chooses among groups of experts")
        return found


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


def _places(output: Any, gate: Gate, top_k: int) -> tuple[int, int, int]:
    """Where a router's output holds scores [N, E], weights [N, K] and ids [N, K]."""
    found: dict[str, int] = {}
    for place, item in enumerate(output if isinstance(output, tuple | list) else ()):
        if isinstance(item, torch.Tensor) and item.dim() == 2:
            wide = item.is_floating_point() and item.shape[1] == gate.num_experts and "scores" not in found
            kind = "scores" if wide else "weights" if item.is_floating_point() else "ids"
            if wide or item.shape[1] == top_k:
                found.setdefault(kind, place)
    if len(found) < 3:
        raise _unlimited(gate, "does not return scores, weights and ids")
    return found["scores"], found["weights"], found["ids"]


def _unlimited(gate: Gate, why: str) -> UserError:
    return UserError(f"The router {gate.name} {why}, so its rows cannot be held to a set of experts; pass limit=False.")
