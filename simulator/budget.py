"""How much fast memory a residency policy may fill: experts per layer, bytes over all layers, or what fits a device.

Source: arXiv 2605.20179 (TIDE) and its released code for the device formula: of a device's memory the weights that are not
routed experts and a reserve of max(1.5 GiB, 10%) come off, the rest is shared by the MoE layers. There every layer gets the
same share; the automatic split by recorded load is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, Self

import numpy as np

from simulator.amounts import Percent, Size
from simulator.policy import Geometry
from tracer.errors import UserError

GIB = 1 << 30


@dataclass(frozen=True)
class Budgeted:
    """The parameters every residency policy takes; where several are given the smallest budget holds.

    Parameters
    ----------
    budget : int or Percent, optional
        Experts per MoE layer, 0 to E, or a share of E (``25%``), rounded down.
    budget_bytes : int, optional
        Bytes of expert weights over all MoE layers; in a spec with a unit, as ``512MB``.
    vram : int, optional
        Memory of the device in bytes, likewise (``24GB``); what TIDE's formula leaves of it is the budget in bytes. Policies
        whose missing experts pass through a staging slot have the largest expert taken off first.
    vram_gib : float, optional
        The same in GiB.
    split : str, optional
        "auto": the bytes of all layers together go to the experts with the most recorded tokens a byte, whichever layer they
        are of, so that a layer of few hot experts gets less than one whose load is spread. Without, every layer gets the same.
    """

    budget: int | Percent | None = None
    budget_bytes: Size | None = None
    vram: Size | None = None
    vram_gib: float | None = None
    split: Literal["auto"] | None = None

    def __post_init__(self) -> None:
        for name in ("budget", "budget_bytes", "vram", "vram_gib"):
            value = getattr(self, name)
            if value is not None and not (0 <= getattr(value, "value", value) < math.inf):
                raise UserError(f"{name}={value} is no amount of memory; give {name} a number of 0 or more.")

    @property
    def limited(self) -> bool:
        """Whether any budget is given."""
        return any(v is not None for v in (self.budget, self.budget_bytes, self.device_bytes))

    @property
    def device_bytes(self) -> int | None:
        """Memory of the device; None where neither ``vram`` nor ``vram_gib`` is given."""
        given = (self.vram, None if self.vram_gib is None else int(self.vram_gib * GIB))
        return min((size for size in given if size is not None), default=None)

    @property
    def staged(self) -> bool:
        """Whether missing experts pass through a staging slot outside the budget."""
        return False

    def settled(self, geometry: Geometry) -> Self:
        """This policy with ``budget`` as a number of experts.

        Raises
        ------
        UserError
            It is more than a layer has.
        """
        return self if self.budget is None else replace(self, budget=self._most(geometry))

    def _most(self, geometry: Geometry) -> int:
        """Experts a layer may hold by ``budget`` alone."""
        if self.budget is None:
            return geometry.num_experts
        most = self.budget.of(geometry.num_experts) if isinstance(self.budget, Percent) else int(self.budget)
        if most > geometry.num_experts:
            raise UserError(
                f"budget={self.budget} is out of range; give 0 to {geometry.num_experts} experts per layer."
            )
        return most

    def _bytes(self, geometry: Geometry) -> int | None:
        """Bytes over all layers that ``budget_bytes`` and the device allow; None where neither is given."""
        allowed = [] if self.budget_bytes is None else [int(self.budget_bytes)]
        total = self.device_bytes
        if total is not None:
            if geometry.dense_bytes is None:
                raise UserError(
                    "vram needs the bytes of the model's other weights, and the trace's meta.json has no dense_bytes; "
                    "give budget or budget_bytes instead."
                )
            staging = max(geometry.expert_bytes[layer] for layer in geometry.layers) if self.staged else 0
            reserve = max(int(1.5 * GIB), int(0.1 * total))
            allowed.append(max(0, total - staging - geometry.dense_bytes - reserve))
        return min(allowed, default=None)

    def _check(self) -> None:
        if not self.limited:
            raise UserError(
                f"{type(self).__module__.rsplit('.', 1)[-1]} needs a budget; "
                "give it budget=EXPERTS_PER_LAYER, budget_bytes=BYTES or vram=24GB."
            )

    def experts_by_layer(self, geometry: Geometry) -> tuple[int, ...]:
        """Experts each layer may hold, between 0 and E, in the order of ``geometry.layers``.

        Bytes are shared out equally: a layer gets floor(bytes / number of MoE layers), and of that whole experts. With
        ``split="auto"`` they are shared out by :func:`share_out`.

        Parameters
        ----------
        geometry : Geometry
            Of the traced model.

        Raises
        ------
        UserError
            No budget is given, or more than a layer has, or ``vram`` is and the trace does not know ``dense_bytes``, or the
            budget is to be split by loads that ``geometry`` does not hold.
        """
        self._check()
        if self.split == "auto":
            if geometry.loads is None:
                raise UserError("split=auto shares a budget out by the loads of a trace; replay one with this policy.")
            sizes = tuple(geometry.expert_bytes[one] for one in geometry.layers)
            return share_out(self._total(geometry), sizes, geometry.loads)
        most = self._most(geometry)
        allowed = self._bytes(geometry)
        if allowed is None:
            return (most,) * len(geometry.layers)
        share = allowed // len(geometry.layers)
        return tuple(min(most, share // geometry.expert_bytes[layer]) for layer in geometry.layers)

    def experts_per_layer(self, geometry: Geometry, layer: int) -> int:
        """As :meth:`experts_by_layer` for one layer, an index into ``geometry.layers``."""
        return self.experts_by_layer(geometry)[layer]

    def total_bytes(self, geometry: Geometry) -> int:
        """Bytes a cache over all layers may hold; ``budget`` counts as that many experts of every layer.

        Raises
        ------
        UserError
            As :meth:`experts_by_layer`, and where one cache over all layers is to be split.
        """
        self._check()
        if self.split is not None:
            raise UserError(
                "split=auto shares a budget out between layers, and scope=global has no layers; leave one out."
            )
        return self._total(geometry)

    def _total(self, geometry: Geometry) -> int:
        allowed = [self._most(geometry) * sum(geometry.expert_bytes[layer] for layer in geometry.layers)]
        in_bytes = self._bytes(geometry)
        if in_bytes is not None:
            allowed.append(in_bytes)
        return min(allowed)


@lru_cache(maxsize=64)
def share_out(total_bytes: int, expert_bytes: tuple[int, ...], loads: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """How many experts each layer may hold where the most loaded ones of all layers come first.

    Experts go by falling tokens a byte, ties to the lowest layer, and are taken as long as they fit; one that does not is left
    out. Where all experts have the same bytes no other split lets a placement that never changes serve more of these tokens.

    Parameters
    ----------
    total_bytes : int
        Of all layers together.
    expert_bytes : tuple of int
        Of an expert of each layer, L.
    loads : tuple of tuple of int
        Tokens of each layer's experts, L times E.

    Returns
    -------
    tuple of int
        Experts of each layer, L.
    """
    tokens = np.array(loads, np.int64)
    layers, experts = tokens.shape
    layer = np.repeat(np.arange(layers), experts)
    size = np.array(expert_bytes, np.int64)[layer]
    order = np.lexsort((layer, -tokens.reshape(-1) / size))
    taken, left = np.zeros(layers, np.int64), int(total_bytes)
    for at in order.tolist():
        if size[at] <= left:
            taken[layer[at]] += 1
            left -= int(size[at])
    return tuple(taken.tolist())
