"""One model call while it runs: what the hooks keep on the device, and how it is packed for the host.

B sequences, T rows each, N = B * T, R rows of the current block, L layers, K experts a row, E experts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from tracer.adapters.gate import Gate, Root, Routing
from tracer.adapters.rules import scores_of
from tracer.errors import UserError
from tracer.recording.host_call import Branches


@dataclass(slots=True)
class BlockLogits:
    """Logits of the block rows of a call, kept until the next call shows what was written there."""

    logits: torch.Tensor  # [B, R, V], the model's dtype
    log_total: torch.Tensor  # float32 [B, R], logsumexp of the logits
    positions: torch.Tensor  # int64 [B, R]

    def written(self, token_ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens ``token_ids`` [B, T] has at these rows now, -1 where not held, and their probabilities here."""
        row = self.positions - positions[:, :1]
        clipped = row.clamp(0, token_ids.shape[1] - 1)
        held = (row == clipped) & (positions.gather(1, clipped) == self.positions)
        token = torch.where(held, token_ids.gather(1, clipped), -1)
        logit = self.logits.gather(-1, token.clamp(0, self.logits.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
        return token, (logit.float() - self.log_total).exp()


@dataclass(slots=True)
class DeviceCall:
    """A call from its first hook to its last."""

    root: Root
    token_ids: torch.Tensor  # int64 [B, T]
    positions: torch.Tensor  # int64 [B, T], -1 at padding
    kv_tokens: int
    gates: tuple[Gate, ...]
    announced: tuple[str, int, int] | None
    passed: torch.Tensor | None = (
        None  # what the loop passed as token_ids; it may write the outcome of the call into it
    )
    routings: dict[int, Routing] = field(default_factory=dict)  # by place in gates
    watched: list[torch.Tensor] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)  # of the watched tensors
    # places of the gates in each stack; layers of a model spread over several devices are stacked by device
    stacks: list[list[int]] = field(default_factory=list)
    predictions: dict[str, torch.Tensor] = field(default_factory=dict)
    written: tuple[torch.Tensor, torch.Tensor] | None = None
    settle: bool = False
    branches: Branches | None = None
    returned: bool = False
    begun: Any = None
    ended: Any = None

    def written_back(self) -> torch.Tensor | None:
        """The passed tensor [B, T] where the loop has written into it since the call, else None."""
        if self.passed is None or self.passed.shape != self.token_ids.shape:
            return None
        now = self.passed.detach()
        return None if torch.equal(now, self.token_ids) else now.clone()

    @property
    def num_rows(self) -> int:
        return self.token_ids.numel()

    def mark(self, name: str) -> None:
        """Note the time, "begun" or "ended"; an event on CUDA, where the host runs ahead of the device."""
        if self.token_ids.is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.token_ids.device))
            setattr(self, name, event)
        else:
            setattr(self, name, time.perf_counter_ns())

    def duration_ns(self) -> int | None:
        """Wall time of the call; on CUDA only after it has finished."""
        if self.begun is None or self.ended is None:
            return None
        if isinstance(self.begun, int):
            return self.ended - self.begun
        self.ended.synchronize()
        return int(self.begun.elapsed_time(self.ended) * 1e6)

    def keep(self, place: int, routing: Routing, whole: bool) -> None:
        """Keep a gate's routing by reference, with its tensors' versions, so that a later change in place is noticed."""
        if place in self.routings:
            raise UserError(
                f"The router {self.gates[place].name} fired twice in one call of {self.root.name or 'the model'}; a trace "
                "holds one decision a row and layer."
            )
        if not whole:
            routing = Routing(routing.expert_ids, routing.gate_weights, None)
        if torch.is_inference_mode_enabled() or routing.expert_ids.is_inference():
            # Tensors of inference mode have no version to tell by, so they are copied.
            routing = Routing(*(None if t is None else t.clone() for t in routing))  # type: ignore[arg-type]
        else:
            for tensor in routing:
                if tensor is not None:
                    self.watched.append(tensor)
                    self.versions.append(tensor._version)
        self.routings[place] = routing

    def check(self) -> None:
        """Raise when a gate did not fire, or when what it returned was changed afterwards."""
        if len(self.routings) < len(self.gates):
            gate = next(gate for place, gate in enumerate(self.gates) if place not in self.routings)
            raise UserError(
                f"The router {gate.name} never fired in a call of {self.root.name or 'the model'}; nothing can be recorded "
                "where a layer's router is skipped, fused or replaced."
            )
        now = [tensor._version for tensor in self.watched]
        if now != self.versions:
            changed = {id(t) for t, new, old in zip(self.watched, now, self.versions, strict=True) if new != old}
            place = next(p for p, routing in self.routings.items() if any(id(t) in changed for t in routing))
            raise UserError(
                f"What the router {self.gates[place].name} returned was changed in place afterwards; pass adapter=callable "
                "that returns copies of its ids and weights."
            )

    def tensors(self, with_scores: bool) -> dict[str, torch.Tensor]:
        """Everything to be copied, stacked by layer and owned by this call: ids, weights and scores, tokens, predictions.

        The routings are let go.
        """
        routings = [self.routings[place] for place in range(len(self.gates))]
        self.stacks = _by_device(routings)
        packed: dict[str, torch.Tensor] = {}
        for number, places in enumerate(self.stacks):
            chosen = [routings[p] for p in places]
            packed[f"ids{number}"] = torch.stack([r.expert_ids for r in chosen])
            weights = [r.gate_weights for r in chosen if r.gate_weights is not None]
            if len(weights) == len(chosen):
                packed[f"weights{number}"] = torch.stack(weights)
            if with_scores:
                packed[f"scores{number}"] = torch.stack([r.scores for r in chosen if r.scores is not None])
        packed["token_ids"], packed["positions"] = self.token_ids, self.positions
        packed.update(self.predictions)
        if self.written is not None:
            packed["written_ids"], packed["written_confidence"] = self.written
        self.routings, self.watched, self.versions = {}, [], []
        return packed

    def as_recorded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """One of :meth:`tensors` as the trace has it: ids [L, N, K], weights float16 [L, N, K], scores float32 [L, N, E]."""
        what = name.rstrip("0123456789")
        if what in ("token_ids", "positions"):
            return tensor.to(torch.int32)
        if what == "ids":
            return tensor.to(torch.uint8 if self.gates[0].num_experts <= 256 else torch.int32)
        if what == "weights":
            return tensor.to(torch.float16)
        if what == "scores":
            gate = self.gates[self.stacks[int(name.removeprefix(what))][0]]
            function = gate.router.score_function if gate.router else "softmax"
            return scores_of(tensor, function, gate.scores_are)
        return tensor


def _by_device(routings: list[Routing]) -> list[list[int]]:
    groups: dict[torch.device, list[int]] = {}
    for place, routing in enumerate(routings):
        groups.setdefault(routing.expert_ids.device, []).append(place)
    return list(groups.values())


def block_predictions(
    call: DeviceCall, logits: torch.Tensor, mask_id: int | None, block_length: int
) -> tuple[dict[str, torch.Tensor], BlockLogits] | None:
    """Argmax and its probability for the rows of the current block, without asking the device for anything.

    The current block is that of the first masked position, or the last rows where nothing is masked. ``logits`` [B, T', V] may
    hold the last T' rows only. Returns None when the logits are of another shape.
    """
    batch, length = call.token_ids.shape
    if logits.dim() == 2 and logits.shape[0] % batch == 0:
        logits = logits.view(batch, -1, logits.shape[-1])
    if logits.dim() != 3 or logits.shape[0] != batch or logits.shape[1] > length:
        return None
    absent = length - logits.shape[1]
    count = min(block_length, logits.shape[1])
    first = torch.full((batch,), length - count, device=logits.device)
    positions = call.positions.to(logits.device)
    if mask_id is not None:
        masked = (call.token_ids.to(logits.device) == mask_id) & (positions >= 0)
        far = torch.iinfo(torch.int64).max
        start = torch.where(masked, positions, far).amin(dim=1) // block_length * block_length
        in_block = (positions >= start.unsqueeze(1)).to(torch.int8).argmax(dim=1)
        first = torch.where(masked.any(dim=1), in_block, first)
    first = first.clamp(absent, length - count)
    row = first.unsqueeze(1) + torch.arange(count, device=logits.device)
    # Indexing copies, so that a loop that edits its logits in place changes nothing here.
    block = logits.detach()[torch.arange(batch, device=logits.device).unsqueeze(1), row - absent]
    largest, best = block.max(dim=-1)
    log_total = block.float().logsumexp(dim=-1)
    predictions = {
        "first_row": first.to(torch.int32),
        "argmax_ids": best.to(torch.int32),
        "argmax_confidence": (largest.float() - log_total).exp(),
    }
    return predictions, BlockLogits(block, log_total, positions.gather(1, row))
