"""The most used experts stay on the GPU; a missing one runs on the CPU, or is copied in for the one call where that is faster.

Source: Fiddler (arXiv 2402.07033) and its released code (github efeslab/fiddler @00e70f0, src/fiddler/mixtral.py): placement by
popularity, and for every missing expert the cheaper of the CPU and of a copy into one placeholder on the GPU, ties to the copy;
the placement itself never changes and nothing is copied back. Where we differ: the released code ranks all layers' experts in
one list counted on a calibration set, here every layer gets its own budget, filled by the popularity of the replayed run; and
its latencies are two constants, here the break-even number of tokens is a parameter, or follows from the machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from simulator.break_even import break_even_tokens
from simulator.budget import Budgeted
from simulator.cost import CostModel
from simulator.policy import ExpertStream, Geometry, Placement
from simulator.residency.static import Static
from tracer.errors import UserError
from tracer.trace import ForwardTable


@dataclass(frozen=True)
class Fiddler(Budgeted):
    """Popular experts live on the GPU, missing ones run where it is faster (two passes over the trace).

    Parameters
    ----------
    cpu_tokens_max : int, optional
        A missing expert of at most this many tokens runs on the CPU, one of more is copied in. 0 copies every one in. Without,
        it is the break-even of the machine the replay is priced on (:meth:`priced`), and where there is none every miss runs
        on the CPU: Fiddler as TIDE's paper (arXiv 2605.20179) compares with it.
    """

    cpu_tokens_max: int | None = None

    requires: ClassVar[frozenset[str]] = frozenset()
    passes: ClassVar[int] = 2
    scope: ClassVar[str] = "layer"
    ordered: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cpu_tokens_max is not None and self.cpu_tokens_max < 0:
            raise UserError(f"cpu_tokens_max={self.cpu_tokens_max} is no number of tokens; give 0 or more.")

    @property
    def notes(self) -> tuple[str, ...]:
        """What its figures rest on, and what it holds beside its budget."""
        known = "fiddler knows the popularity of the replayed run itself: its best case."
        if self.cpu_tokens_max is None:
            return (
                known,
                "No machine says from how many tokens on fiddler copies an expert in, so every miss runs on the CPU, as under "
                "static; give hardware or cpu_tokens_max.",
            )
        return (
            known,
            "A layer that copies experts in holds one of them at a time beside its budget; the released code has one such "
            "place for all layers.",
        )

    def priced(self, cost: CostModel, geometry: Geometry) -> Fiddler:
        """This policy with the machine's break-even for ``cpu_tokens_max``, or itself where that is given.

        Raises
        ------
        UserError
            Layers have experts of unequal bytes and break even at different numbers.
        """
        if self.cpu_tokens_max is not None:
            return self
        sizes = {geometry.expert_bytes[layer] for layer in geometry.layers}
        found = {break_even_tokens(cost, size) for size in sizes}
        if len(found) > 1:
            raise UserError(
                f"fiddler breaks even at {min(found)} to {max(found)} tokens, as layers have experts of unequal bytes; "
                "give it cpu_tokens_max=TOKENS."
            )
        return replace(self, cpu_tokens_max=found.pop())

    def start(self, geometry: Geometry, layer: int | None) -> np.ndarray:
        """bool [E]: the first experts by index, where nothing is known of the run."""
        return self._static().start(geometry, layer)

    def fit(self, streams: Iterable[ExpertStream], geometry: Geometry, layer: int | None) -> np.ndarray:
        """bool [E]: the B experts of most tokens over all streams, ties to the lowest id."""
        return self._static().fit(streams, geometry, layer)

    def place(
        self, stream: ExpertStream, forwards: ForwardTable, geometry: Geometry, state: Any
    ) -> tuple[Placement, Any]:
        """Residents hit; of the others those of many tokens pass through a place beside them on the GPU, one by one."""
        hit = state[stream.experts]
        most = np.iinfo(np.int64).max if self.cpu_tokens_max is None else self.cpu_tokens_max
        copied = ~hit & (stream.tokens > most)
        ends = np.concatenate(([0], np.cumsum(copied, dtype=np.int64)))
        moved = np.diff(ends[stream.offsets])
        held = int(state.sum()) + (moved > 0)
        return Placement(hit, hit | copied, moved, moved, np.zeros_like(moved), held), state

    def _static(self) -> Static:
        return Static(self.budget, self.budget_bytes, self.vram, self.vram_gib, self.split)
