"""From finished model calls to the writer: copies awaited, states worked out, score columns chosen, the trace opened."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tracer.adapters.gate import GateSet
from tracer.interrupts import undisturbed
from tracer.recording.device_call import DeviceCall
from tracer.recording.host_call import HostCall
from tracer.recording.step_states import StepStates
from tracer.recording.transfer import HostCopy
from tracer.trace import CallRouting

# Working out several calls in a row takes a third of the time that it takes between two forwards, which push everything the
# recorder needs out of the processor's caches. This is how many calls may wait, and their routing in bytes.
MOST_WAITING, MOST_WAITING_BYTES = 16, 4 << 20
PREDICTIONS = ("first_row", "argmax_ids", "argmax_confidence", "predicted_ids", "confidence", "accepted", "kept")


class Sink:
    """Takes calls from the hooks and hands them to a writer, which ``open_writer`` makes when all routers are known."""

    def __init__(
        self, gates: GateSet, level: str, decoding: dict[str, Any], first_request: int, open_writer: Callable[[], Any]
    ):
        self.gates, self.level, self._open_writer = gates, level, open_writer
        self.writer: Any = None
        self.num_forwards = self.num_requests = 0
        self._held: deque[tuple[str, tuple]] = deque()
        self._pending: deque[tuple[DeviceCall, HostCopy]] = deque()
        self._pending_bytes = 0
        # int64 ids and float32 weights of a row, and float32 scores
        self._row_bytes = 12 * gates.top_k + (0 if level == "ids" else 4 * gates.num_experts)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self.states = StepStates(
            mask_id=decoding["mask_id"],
            eos_id=decoding["eos_id"],
            block_length=decoding["block_length"],
            write_call=self._write_call,
            write_request=self._write_request,
            next_request=first_request,
        )

    @torch.no_grad()
    def take(self, call: DeviceCall) -> None:
        """Start copying a finished call, which is worked out later; on CUDA not before the next call has ended too."""
        copy = HostCopy(call.tensors(self.level != "ids"), call.as_recorded, self._streams)
        self._pending.append((call, copy))
        self._pending_bytes += call.num_rows * len(call.gates) * self._row_bytes
        # Until the trace is open nothing waits, so that what is wrong with a loop or a path is said at its first calls.
        many = len(self._pending) >= MOST_WAITING or self._pending_bytes >= MOST_WAITING_BYTES
        if many or self.writer is None:
            self.absorb(keep=1 if call.token_ids.is_cuda else 0)

    def absorb(self, keep: int = 0) -> None:
        """Work out all calls but the last ``keep``; an interrupt is raised after them, as none may be lost between others."""
        with undisturbed():
            while len(self._pending) > keep:
                call, copy = self._pending.popleft()
                self._pending_bytes -= call.num_rows * len(call.gates) * self._row_bytes
                self.states.add(self._host_call(call, copy.arrays()))

    def close(self, complete: bool) -> None:
        """Write what is held back and close the writer."""
        if self.writer is None and self._held:
            self.writer = self._open_writer()
        self._release()
        # What could not be worked out must not be tried again by whoever looks at the recorder afterwards.
        self._pending.clear()
        if self.writer is not None:
            self.writer.close(complete=complete)

    def _host_call(self, call: DeviceCall, arrays: dict[str, np.ndarray]) -> HostCall:
        routing = stacked(call, arrays)
        return HostCall(
            token_ids=arrays["token_ids"],
            positions=arrays["positions"],
            kv_tokens=call.kv_tokens,
            routing=routing if call.branches is None else call.branches.spread(routing),
            duration_ns=call.duration_ns(),
            announced=call.announced,
            settle=call.settle,
            branches=call.branches,
            written=(arrays["written_ids"], arrays["written_confidence"]) if "written_ids" in arrays else None,
            **{name: arrays[name] for name in PREDICTIONS if name in arrays},
        )

    def _write_call(self, parts: list[dict], tokens: dict[str, np.ndarray], routing: CallRouting) -> None:
        self.num_forwards += 1
        self._write("add_call", parts, tokens, routing)

    def _write_request(self, row: dict) -> None:
        self.num_requests += 1
        self._write("add_request", row)

    def _write(self, method: str, *arguments: Any) -> None:
        self._held.append((method, arguments))
        # meta.json states the routers' rule, so it waits until every router has seen a call.
        if self.writer is None and all(gate.read is not None or gate.source == "experts" for gate in self.gates.gates):
            self.writer = self._open_writer()
        self._release()

    def _release(self) -> None:
        while self.writer is not None and self._held:
            method, arguments = self._held.popleft()
            getattr(self.writer, method)(*arguments)


def stacked(call: DeviceCall, arrays: dict[str, np.ndarray]) -> CallRouting:
    """A call's routing with layers ascending; ``arrays`` hold one stack [L, N, ...] a device.

    Weights of a device whose routers gave none are NaN where others have some.
    """
    places = [place for chosen in call.stacks for place in chosen]
    layers = [call.gates[place].layer for place in places]
    order = sorted(range(len(layers)), key=layers.__getitem__)
    numbers = range(len(call.stacks))
    ids = [arrays[f"ids{n}"] for n in numbers]
    weights = [arrays.get(f"weights{n}") for n in numbers]
    if any(own is not None for own in weights):
        weights = [
            np.full(given.shape, np.nan, np.float16) if own is None else own
            for own, given in zip(weights, ids, strict=True)
        ]
    scores = [arrays.get(f"scores{n}") for n in numbers]

    def join(stacks: list[Any]) -> np.ndarray | None:
        if stacks[0] is None:
            return None
        whole = stacks[0] if len(stacks) == 1 else np.concatenate(stacks)
        return whole if order == list(range(len(order))) else whole[order]

    expert_ids = join(ids)
    assert expert_ids is not None
    if expert_ids.dtype != np.uint8:
        expert_ids = expert_ids.astype(np.uint16)
    return CallRouting(tuple(layers[n] for n in order), expert_ids, join(weights), join(scores))
