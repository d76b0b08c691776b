"""TIDE's refresh interval: by the paper's program with drift and misses measured on the trace, and by replaying every interval.

Source: arXiv 2605.20179 (TIDE), the program for the interval, in seconds a block and layer:

    minimise over tau in 1 .. T - 1:  C_io B (T / tau) (1 - (1 - d)^tau) + C_cpu T B f(tau)

T steps a block, B budget, C_io what moving an expert costs, C_cpu what a miss costs more than a hit. The paper leaves d and f
to be measured. Here both come from denoise forwards outside the first block of a request, as TIDE refreshes at every step of
that block whatever the interval, and both are shares of the budget, so that B d and B f are experts:

* d: of the B experts of most tokens in a step, how many the step before did not want; mean over steps and layers.
* f(tau): misses of the replay at tau less those of the replay at 1; mean over (forward, layer).
* memoryless f(tau) = 1 - g(tau) / d with g(tau) = (1 - (1 - d)^tau) / tau, where nothing but d is measured. The objective is
  then monotone, and its best interval an end of the range.
* C_cpu: mean over all misses of those replays, each with its own number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.break_even import expert_seconds
from simulator.cost import CostModel
from simulator.experiment import make_experiments
from simulator.interval_cells import IntervalCells
from simulator.policy import Geometry
from simulator.residency.tide import Tide
from simulator.walk import Walk
from tracer.errors import UserError
from tracer.schema import DENOISE

if TYPE_CHECKING:
    import polars as pl

CAVEAT = "The program counts every miss and every move alike and takes the drift as constant; the replays do not."


@dataclass(frozen=True, slots=True)
class IntervalResult:
    """The program, the replays and the gap between them.

    ``program``, ``memoryless`` and ``best`` are intervals: of the program with measured f, with memoryless f, and of the
    fastest replay, ties to the smallest. ``regret`` and ``memoryless_regret`` are how much slower the replays at the first two
    are than the best, T(program) / T(best) - 1. ``columns`` has an entry per interval, see :attr:`frame`.
    """

    budget: int
    hardware: str
    copy_back: bool
    steps: int  # T, of the longest block
    drift: float  # d, per step, share of the budget
    move_s: float  # C_io, seconds an expert, mean over layers
    miss_s: float  # C_cpu, seconds an expert
    surplus_share: float  # of the measured (forward, layer) with fewer active experts than the budget
    program: int
    memoryless: int
    best: int
    regret: float
    memoryless_regret: float
    notes: tuple[str, ...]
    columns: dict[str, np.ndarray] = field(repr=False)

    @property
    def frame(self) -> pl.DataFrame:
        """One row an interval.

        ``refresh_interval``; ``objective`` and ``objective_memoryless``, seconds a block and layer; ``extra_misses`` f and
        ``extra_misses_memoryless``, shares of the budget; ``latency_s`` of the replayed trace; ``slowdown`` against the best;
        ``hit_rate``, ``expert_hit_rate``, ``promotions``, ``bytes_to_gpu``, ``bytes_to_host`` over the whole trace.
        """
        import polars as pl

        return pl.DataFrame(self.columns)

    def to_json(self) -> dict[str, Any]:
        """The result as plain values, the rows of :attr:`frame` under "intervals"."""
        named = {name: getattr(self, name) for name in self.__slots__ if name not in ("columns", "notes")}
        names, values = list(self.columns), [column.tolist() for column in self.columns.values()]
        rows = [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]
        return {**named, "notes": list(self.notes), "intervals": rows}


def find_interval(
    trace: Any,
    budget: int,
    hardware: str,
    copy_back: bool = True,
    intervals: Sequence[int] | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> IntervalResult:
    """The refresh interval TIDE's program chooses, and the one that replaying a trace's recorded experts finds fastest.

    Parameters
    ----------
    trace
        An opened trace of block-diffusion decoding.
    budget : int
        B, experts per layer, 1 to E.
    hardware : str
        Preset name or TOML path, with ``:overlap=true`` where CPU and GPU experts run side by side.
    copy_back : bool
        Whether a demoted expert crosses the bus again, as in the released code.
    intervals : sequence of int, optional
        To choose from; by default 1 to T - 1 (1 where T is 1).
    progress : callable, optional
        ``progress(done, total)`` after every segment, in model calls; ``total`` is None where the trace does not know it.

    Raises
    ------
    UserError
        A budget or interval out of range, a trace without blocks beyond the first, or one that does not say its model's sizes.
    """
    if not 1 <= budget <= trace.meta.model.num_experts:
        raise UserError(f"budget={budget} is out of range; give 1 to {trace.meta.model.num_experts} experts per layer.")
    geometry, (experiment,) = make_experiments(trace, ["vanilla"], [Tide(budget=budget)], hardware)
    machine = experiment.machine
    if machine.cost is None:
        raise UserError(machine.note or f"No latency on {hardware}.")
    steps = longest_block(trace)
    wanted = tuple(range(1, max(2, steps))) if intervals is None else tuple(int(one) for one in intervals)
    if not wanted or min(wanted) < 1 or len(set(wanted)) < len(wanted):
        raise UserError(f"intervals={list(wanted)} are no refresh intervals; give distinct numbers of 1 or more.")
    walk = Walk(trace, geometry, weights=False)
    cells = walk.watch(IntervalCells(geometry, machine.cost, budget, copy_back, wanted))
    walk.run(progress)
    notes = (CAVEAT, *getattr(trace, "notes", ()), *((machine.note,) if machine.note else ()))
    return _solve(cells, geometry, machine.cost, hardware, steps, notes)


def longest_block(trace: Any) -> int:
    """T: denoise steps of the longest block.

    Raises
    ------
    UserError
        The trace has no denoise forwards.
    """
    steps = 0
    for segment in trace.segments():
        of_block = segment.forwards.step[segment.forwards.kind == DENOISE]
        steps = max(steps, int(of_block.max(initial=-1)) + 1)
    if not steps:
        raise UserError(
            "The interval is one of denoise steps and this trace has none; give a trace of diffusion decoding."
        )
    return steps


def program_objective(
    intervals: np.ndarray, steps: int, budget: int, drift: float, misses: np.ndarray, move_s: float, miss_s: float
) -> np.ndarray:
    """The paper's objective, float64 [I], seconds a block and layer.

    Parameters
    ----------
    intervals, misses : np.ndarray
        tau and f(tau), [I].
    steps, budget : int
        T and B.
    drift, move_s, miss_s : float
        d, C_io and C_cpu.
    """
    moved = budget * (steps / intervals) * (1 - (1 - drift) ** intervals)
    return move_s * moved + miss_s * steps * budget * misses


def memoryless_misses(intervals: np.ndarray, drift: float) -> np.ndarray:
    """f(tau) = 1 - (1 - (1 - d)^tau) / (tau d) of wanted experts that change without memory, float64 [I]; 0 at d = 0."""
    if drift == 0:
        return np.zeros(len(intervals))
    # Rounding alone takes it below 0, at tau = 1.
    return np.maximum(0.0, 1 - (1 - (1 - drift) ** intervals) / (intervals * drift))


def _solve(
    cells: IntervalCells, geometry: Geometry, cost: CostModel, hardware: str, steps: int, notes: tuple[str, ...]
) -> IntervalResult:
    budget, taus = cells.budget, np.array(cells.intervals, np.float64)
    measured = int(cells.measured.sum())
    if not measured:
        raise UserError(
            "Every denoise forward of this trace is in its request's first block, where TIDE refreshes at every step whatever "
            "the interval; give a trace of longer answers."
        )
    pairs, changed = cells.pairs.sum(), cells.changed.sum()
    drift = float(changed / (pairs * budget)) if pairs else 0.0
    sizes = [geometry.expert_bytes[layer] for layer in geometry.layers]
    move_s = math.fsum(cells.move_seconds(size) for size in sizes) / len(sizes)
    misses = (cells.misses[:, 1:].sum(axis=0) - cells.misses[:, 0].sum()) / (measured * budget)
    without = memoryless_misses(taus, drift)
    miss_s = _miss_seconds(cells, cost, sizes)
    objective = program_objective(taus, steps, budget, drift, misses, move_s, miss_s)
    objective_without = program_objective(taus, steps, budget, drift, without, move_s, miss_s)
    latency = np.array([math.fsum(seconds) for seconds in cells.seconds])
    chosen, chosen_without, best = (_smallest(values, taus) for values in (objective, objective_without, latency))
    promotions = cells.promotions.sum(axis=0)
    to_gpu = np.array(sizes, np.int64) @ cells.promotions
    columns = {
        "refresh_interval": np.array(cells.intervals, np.int64),
        "objective": objective,
        "objective_memoryless": objective_without,
        "extra_misses": misses,
        "extra_misses_memoryless": without,
        "latency_s": latency,
        "slowdown": latency / latency[best] - 1,
        "hit_rate": cells.hit_tokens.sum(axis=0) / cells.tokens.sum(),
        "expert_hit_rate": cells.hit_experts.sum(axis=0) / cells.lookups.sum(),
        "promotions": promotions,
        "bytes_to_gpu": to_gpu,
        "bytes_to_host": to_gpu if cells.copy_back else np.zeros_like(to_gpu),
    }
    return IntervalResult(
        budget=budget,
        hardware=hardware,
        copy_back=cells.copy_back,
        steps=steps,
        drift=drift,
        move_s=move_s,
        miss_s=miss_s,
        surplus_share=float(cells.surplus.sum() / measured),
        program=cells.intervals[chosen],
        memoryless=cells.intervals[chosen_without],
        best=cells.intervals[best],
        regret=float(columns["slowdown"][chosen]),
        memoryless_regret=float(columns["slowdown"][chosen_without]),
        notes=notes,
        columns=columns,
    )


def _smallest(values: np.ndarray, taus: np.ndarray) -> int:
    """Where the least value stands, ties to the smallest interval."""
    return int(np.lexsort((taus, values))[0])


def _miss_seconds(cells: IntervalCells, cost: CostModel, sizes: list[int]) -> float:
    """C_cpu: what a missed expert takes on the CPU beyond the GPU, mean over misses; of one token where nothing missed."""
    extra, missed = [], 0
    for size, of_tokens in zip(sizes, cells.missed_tokens, strict=True):
        tokens = np.flatnonzero(of_tokens)
        on_cpu, on_gpu, _ = expert_seconds(cost, size, tokens)
        extra += (of_tokens[tokens] * (on_cpu - on_gpu)).tolist()
        missed += int(of_tokens.sum())
    if missed:
        return math.fsum(extra) / missed
    on_cpu, on_gpu, _ = expert_seconds(cost, sizes[0], np.ones(1, np.int64))
    return float(on_cpu[0] - on_gpu[0])
