"""What happened around a router in its first call: which rows each expert got, and what the block gave back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tracer.adapters.experts_input import selected
from tracer.adapters.gate import Gate, Routing, rows


class FirstCall:
    """Listens to one block during its first call; ``close`` removes the hooks."""

    def __init__(self, gate: Gate, follows: Callable[[], bool] = lambda: True):
        self.gate = gate
        self._follows = follows
        self.args: tuple = ()
        self.output: Any = None
        self.experts_call: tuple[tuple, dict] | None = None
        self.calls: dict[int, list[tuple[torch.Tensor, Any]]] = {}
        self.block_output: Any = None
        if isinstance(gate.experts, nn.ModuleList | nn.ModuleDict):
            children = list(gate.experts.values() if isinstance(gate.experts, nn.ModuleDict) else gate.experts)
            self._hooks = [
                expert.register_forward_hook(self._expert_hook(number)) for number, expert in enumerate(children)
            ]
        else:
            self._hooks = [gate.experts.register_forward_pre_hook(self._keep_experts_call, with_kwargs=True)]

    def _expert_hook(self, number: int):
        def keep(module, args, output):
            if self._follows() and args and isinstance(args[0], torch.Tensor):
                self.calls.setdefault(number, []).append((rows(args[0]), output))

        return keep

    def _keep_experts_call(self, module, args, kwargs):
        if self._follows():
            self.experts_call = (args, kwargs)

    def close(self) -> None:
        """Remove the hooks and drop what they kept."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.calls, self.experts_call, self.block_output = [], {}, None, None

    def disagreement(self, routing: Routing, top_k: int) -> str | None:
        """Why ``routing`` is not what the experts ran, None when it is or when no expert could be watched."""
        if self.experts_call is not None:
            found = selected(*self.experts_call, top_k)
            if found is None:
                return None
            if found[0].shape != routing.expert_ids.shape or not bool((found[0] == routing.expert_ids).all()):
                return "its experts were called with other ids than it selected"
            return None
        if not self.calls:
            return None
        return self._disagreement_of_modules(routing.expert_ids)

    def _disagreement_of_modules(self, expert_ids: torch.Tensor) -> str | None:
        wanted = torch.bincount(expert_ids.reshape(-1), minlength=self.gate.num_experts).tolist()
        for expert, count in enumerate(wanted):
            got = sum(len(part) for part, _ in self.calls.get(expert, []))
            if got != count:
                return f"it selected expert {expert} for {count} rows, but that expert ran on {got}"
        keys = self._row_keys()
        if keys is None:
            return None
        for expert in range(self.gate.num_experts):
            chosen = (expert_ids == expert).any(dim=1).nonzero().flatten().tolist()
            given = Counter(key for part, _ in self.calls.get(expert, []) for key in _keys(part))
            if given != Counter(keys[row] for row in chosen):
                return f"expert {expert} ran on other rows than those it was selected for"
        return None

    def _row_keys(self) -> list[bytes] | None:
        """The gate's input rows as bytes, None when the experts get something else (another norm, say)."""
        if not self.args or not isinstance(self.args[0], torch.Tensor):
            return None
        keys = _keys(rows(self.args[0]))
        known = set(keys)
        seen = (key for parts in self.calls.values() for part, _ in parts for key in _keys(part))
        return keys if all(key in known for key in seen) else None

    def unexplained(self, routing: Routing) -> float | None:
        """Relative distance between the block's output and the experts' outputs combined with the weights.

        None when it cannot be told: a fused experts module, shared experts, or rows that cannot be matched. The ids must have
        been found to agree (:meth:`disagreement`).
        """
        block_output = self.block_output[0] if isinstance(self.block_output, tuple | list) else self.block_output
        keys = self._row_keys() if self.calls else None
        shared = any("shared" in name for name, _ in self.gate.block.named_children())
        if keys is None or shared or routing.gate_weights is None or not isinstance(block_output, torch.Tensor):
            return None
        target = rows(block_output).float()
        combined = torch.zeros_like(target)
        for expert, parts in self.calls.items():
            chosen = (routing.expert_ids == expert).any(dim=1).tolist()
            # Equal rows are interchangeable: any of those the expert was chosen for stands for the one it got.
            waiting: dict[bytes, list[int]] = {}
            for row, key in enumerate(keys):
                if chosen[row]:
                    waiting.setdefault(key, []).append(row)
            for given, out in parts:
                taken = [waiting[key].pop() for key in _keys(given)]
                place = torch.tensor(taken, dtype=torch.long, device=target.device)
                weight = (routing.gate_weights[place] * (routing.expert_ids[place] == expert)).sum(dim=1, keepdim=True)
                combined.index_add_(0, place, rows(out).float() * weight.float())
        return float((combined - target).norm() / (target.norm() + 1e-20))


def _keys(tensor: torch.Tensor) -> list[bytes]:
    if len(tensor) == 0:
        return []
    host = tensor.detach().contiguous().cpu()
    return [row.tobytes() for row in host.view(torch.uint8).numpy().reshape(len(host), -1)]
