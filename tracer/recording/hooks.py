"""The hooks on a model: they follow its calls, keep what routers decide, and hand finished calls on.

Nothing here synchronises with the device between the first hook of a call and its last, but for the first call of each router,
in which it is settled how to read it and checked that it says what the experts really ran.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tracer.adapters import experts_input
from tracer.adapters.first_call import FirstCall
from tracer.adapters.gate import Gate, GateSet, Root, refuse, text_config
from tracer.adapters.resolve import resolve
from tracer.errors import UserError
from tracer.recording.device_call import BlockLogits, DeviceCall, block_predictions
from tracer.recording.host_call import Branches


class Hooks:
    """Hooks on the routers, the base model(s) and the vocabulary head of a model.

    ``on_call`` receives every finished :class:`DeviceCall`, in order. ``close`` removes everything, always.
    """

    def __init__(
        self,
        model: nn.Module,
        gates: GateSet,
        *,
        with_scores: bool,
        adapter: Callable | None,
        mask_id: int | None,
        block_length: int | None,
        on_call: Callable[[DeviceCall], None],
    ):
        self.gates, self.mask_id, self.block_length = gates, mask_id, block_length
        self.with_scores, self._adapter, self._on_call = with_scores, adapter, on_call
        self.noted_roles: set[str] = set()
        self.announced: tuple[str, int, int] | None = None
        self.block_logits: BlockLogits | None = None
        self.calls = 0
        self.last_call: DeviceCall | None = None
        self._call: DeviceCall | None = None
        self._first: dict[int, FirstCall] = {}
        self._outputs: dict[int, Any] = {}
        self._settling: dict[int, Any] = {}
        self._config = text_config(model)
        self._rule: Gate | None = None
        self._gates_of = {root.role: gates.of_role(root.role) for root in gates.roots}
        self._parameters = {root.role: list(inspect.signature(root.module.forward).parameters) for root in gates.roots}
        self._first_thread = self._thread = threading.current_thread()
        self._other_threads = {each for each in threading.enumerate() if each is not self._first_thread}
        self._handles: list[Any] = []
        try:
            self._attach()
        except BaseException:
            self.close()
            raise

    def _attach(self) -> None:
        for root in self.gates.roots:
            self._handles.append(root.module.register_forward_pre_hook(self._before(root), with_kwargs=True))
            self._handles.append(root.module.register_forward_hook(self._after(root)))
            for place, gate in enumerate(self._gates_of[root.role]):
                if gate.module is not None:
                    hook = self._on_gate(root.role, place, gate)
                    self._handles.append(gate.module.register_forward_hook(hook))
                if gate.read is None and gate.source == "gate":
                    self._first[id(gate)] = FirstCall(gate, self.follows)
                    settle = self._after_block(root.role, place, gate)
                    self._settling[id(gate)] = gate.block.register_forward_hook(settle)
        if self.gates.head is not None:
            self._handles.append(self.gates.head.register_forward_hook(self._on_head))

    def close(self) -> None:
        """Remove all hooks."""
        for handle in (*self._handles, *self._settling.values()):
            handle.remove()
        for first in self._first.values():
            first.close()
        self._handles, self._first, self._outputs, self._settling = [], {}, {}, {}
        self._call = self.last_call = self.block_logits = None

    def follows(self) -> bool:
        """Whether this thread's calls are recorded.

        The thread that began the recording, or one that was started since as long as that one calls nothing (a server or a
        streamer that runs generate in a thread); one thread at a time. Calls of others run as if nobody recorded.
        """
        thread = threading.current_thread()
        if thread is self._thread or torch.compiler.is_compiling():
            return True
        begun_here = thread is self._first_thread
        may_follow = thread not in self._other_threads and (self.calls == 0 or self._thread is not self._first_thread)
        if begun_here or (may_follow and not (self._thread.is_alive() and self._thread is not self._first_thread)):
            self._thread, self._call = thread, None
            return True
        return False

    def _before(self, root: Root):
        def start(module, args, kwargs):
            if not self.follows():
                return
            if torch.compiler.is_compiling():
                raise UserError(
                    "The model was compiled while it is recorded, where hooks do not run; leave torch.compile out."
                )
            self.end_call()
            call = self._new_call(root, args, kwargs)
            if self.block_logits is not None and len(self.block_logits.positions) == len(call.token_ids):
                device = self.block_logits.positions.device
                call.written = self.block_logits.written(call.token_ids.to(device), call.positions.to(device))
            self.block_logits = None
            self._call = call
            call.mark("begun")

        return start

    def _argument(self, root: Root, name: str, args: tuple, kwargs: dict) -> Any:
        if name in kwargs:
            return kwargs[name]
        names = self._parameters[root.role]
        place = names.index(name) if name in names else len(args)
        return args[place] if place < len(args) else None

    def _new_call(self, root: Root, args: tuple, kwargs: dict) -> DeviceCall:
        token_ids = self._argument(root, root.ids_argument, args, kwargs)
        if not isinstance(token_ids, torch.Tensor):
            raise UserError(
                f"{root.name or 'The model'} was called without {root.ids_argument}; a trace needs token ids, not embeddings."
            )
        # The loop may write into the tensor it passed while the call is still being recorded.
        passed = token_ids if token_ids.dim() == 2 else token_ids.reshape(1, -1)
        token_ids = passed.clone()
        batch, length = token_ids.shape
        cache = self._argument(root, "past_key_values", args, kwargs)
        cached = _cached_tokens(cache)
        positions = self._argument(root, root.position_argument, args, kwargs)
        if (
            isinstance(positions, torch.Tensor)
            and positions.shape == token_ids.shape
            and positions.dtype == torch.int64
        ):
            positions = positions.clone()
        elif isinstance(positions, torch.Tensor):
            positions = positions.reshape(-1, *positions.shape[-2:])[0] if positions.dim() > 2 else positions
            positions = positions.reshape(-1, length).to(torch.int64).expand(batch, length).clone()
        else:
            positions = torch.arange(cached, cached + length, device=token_ids.device).expand(batch, length)
        mask = self._argument(root, "attention_mask", args, kwargs)
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[0] == batch and mask.shape[1] >= length:
            positions = positions.masked_fill(mask[:, -length:].to(positions.device) == 0, -1)
        announced, self.announced = self.announced, None
        return DeviceCall(root, token_ids, positions, cached, self._gates_of[root.role], announced, passed)

    def _on_gate(self, role: str, place: int, gate: Gate):
        def fired(module, args, output):
            call = self._call if self.follows() else None
            if call is None or call.returned or call.root.role != role:
                return
            if gate.read is not None:
                call.keep(place, gate.read(module, args, output), self.with_scores)
            elif id(gate) in self._first:
                first = self._first[id(gate)]
                first.args, first.output = args, output
            else:
                self._outputs[id(gate)] = output

        return fired

    def _after_block(self, role: str, place: int, gate: Gate):
        def settle(module, args, output):
            call, first = self._call if self.follows() else None, self._first.get(id(gate))
            if call is None or first is None or call.root.role != role:
                return
            if first.output is None and gate.module is not None:
                return
            first.block_output = output
            self._settle(call, place, gate, first)

        return settle

    def _settle(self, call: DeviceCall, place: int, gate: Gate, first: FirstCall) -> None:
        routing = resolve(gate, first, self._config, self.gates.top_k, call.num_rows, self._adapter, self._rule)
        first.close()
        del self._first[id(gate)]
        self._settling.pop(id(gate)).remove()
        if self.with_scores and routing.scores is None:
            raise refuse(gate, "it gives no scores, which capture levels active and scores need (level ids works)")
        if self.with_scores and not gate.verified:
            raise refuse(
                gate,
                "no known rule leads from its scores to its choice, as levels active and scores need (level ids works)",
            )
        if self._rule is None and gate.verified:
            self._rule = gate
        call.keep(place, routing, self.with_scores)
        if gate.source == "experts":
            hook = self._on_experts(call.root.role, place, gate)
            self._handles.append(gate.experts.register_forward_pre_hook(hook, with_kwargs=True))

    def _on_experts(self, role: str, place: int, gate: Gate):
        def fired(module, args, kwargs):
            call = self._call if self.follows() else None
            if call is None or call.returned or call.root.role != role:
                return
            output = self._outputs.pop(id(gate), None)
            routing = experts_input.read(args, kwargs, output, gate.num_experts, self.gates.top_k)
            if routing is not None:
                call.keep(place, routing, self.with_scores)

        return fired

    def _after(self, root: Root):
        def returned(module, args, output):
            call = self._call if self.follows() else None
            if call is None or call.root is not root:
                return
            call.mark("ended")
            call.check()
            call.returned = True

        return returned

    def _on_head(self, module, args, output):
        call = self._call if self.follows() else None
        if call is None or not call.returned or not isinstance(output, torch.Tensor) or self._waits_for_note(call):
            return
        call.mark("ended")
        if call.announced is not None and call.announced[0] == "prefill":
            self.end_call()
            return
        found = block_predictions(call, output, self.mask_id, self.block_length or call.token_ids.shape[1])
        if found is not None:
            call.predictions, self.block_logits = found
        if call.announced is not None:
            self.block_logits = None
        self.end_call()

    def _waits_for_note(self, call: DeviceCall) -> bool:
        return call.root.role in self.noted_roles or (call.announced is not None and call.announced[0] == "denoise")

    def current_call(self) -> DeviceCall:
        """The call that has returned and waits to be described."""
        if self._call is None or not self._call.returned:
            raise UserError("note() describes the model call before it, but there was none.")
        return self._call

    def note(self, predictions: dict[str, torch.Tensor], settle: bool, branches: Branches | None) -> None:
        """Complete the call that has just returned with what the loop decided."""
        call = self.current_call()
        call.predictions, call.settle, call.branches = predictions, settle, branches
        self._finish(call)

    def end_call(self) -> None:
        """Close the call under way, if it got to its end."""
        call = self._call
        if call is None:
            return
        if call.returned and self._waits_for_note(call):
            self._call = None
            raise UserError("A denoise call was announced to the recorder but never described with note().")
        if call.returned:
            self._finish(call)
        self._call = None

    def abandon_call(self) -> None:
        """Forget a call that an exception cut short; one that is only waiting to be described is lost too."""
        if self._call is not None and (not self._call.returned or self._waits_for_note(self._call)):
            self._call = None

    def _finish(self, call: DeviceCall) -> None:
        self._call = None
        self.calls += 1
        self.last_call = call
        self._on_call(call)


def _cached_tokens(cache: Any) -> int:
    """Tokens in a prefix cache: a transformers Cache, a tuple of (key, value), or nothing."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    if isinstance(cache, tuple | list) and cache and cache[0] is not None:
        return int(cache[0][0].shape[-2])
    return 0
