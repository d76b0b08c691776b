"""The rule that every policy has a naive definition, as a function that runs it.

A test file ``tests/simulator/test_<axis>_*.py`` holds a table ``NAIVE``. Its keys are specs, the policy's name with the
parameters to run it with; its values are functions made of loops, lists and sets that answer as the policy should:

* routing: ``definition(case, policy)`` gives a row's {expert: float32 weight}, row by row;
* residency: ``definition(run, policy)`` gives of every cell (experts that hit, experts on the GPU, promotions, demotions,
  experts held);
* acceptance: ``definition(segment, geometry, policy)`` gives of every forward (step, tokens gained, branches, chosen branch,
  rows), a row being (recorded row, masked, branch, reused, cold).

``policy`` is there for its parameters; while a definition runs the policy itself answers nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from simulator.policy import Geometry
from simulator.registry import AXES, load_policy
from tests.made_up.routers import router
from tests.made_up.runs import block_run, random_calls
from tests.made_up.strategies import make_case
from tests.made_up.tables import forward_table, geometry, geometry_of, stream_of
from tests.simulator.naive_rows import selected_rows
from tracer.schema import MASKED

TESTS = Path(__file__).parent
POLICIES = TESTS.parent.parent / "simulator"
RUNS = 6  # made-up runs a definition is held against


@dataclass
class Run:
    """What a residency policy is asked about: rows of experts by cell, one cell a call, and the calls' parts."""

    cells: list
    calls: list
    geometry: Geometry


def asked(axis, seed):
    """What the policies of an axis are asked about, made up: the arguments of a definition before the policy."""
    rng = np.random.default_rng(seed)
    if axis == "routing":
        groups = {"n_group": 3, "topk_group": 2} if seed % 2 else {}
        spec = router(rng, score_function=("softmax", "sigmoid")[seed % 2], top_k=3, bias=seed % 2 == 1, **groups)
        case = make_case(seed, spec, mess=True, requests=2, kv_cache=seed % 3 > 0, ties=seed % 3 == 1)
        cold = rng.random(len(case.layer.count)) < 0.3
        return (replace(case, trajectory=replace(case.trajectory, cold=cold)),)
    if axis == "residency":
        calls = random_calls(rng, 30, 2, 4, True)
        cells = [[rng.permutation(8)[: rng.integers(0, 4)].tolist() for _ in range(3)] for _ in calls]
        return (Run(cells, calls, geometry(8, first_block={0: 0, 1: -1})),)
    segment, _ = block_run(rng, requests=2, block_length=5, prompt=7, kv_cache=seed % 2 == 0)
    return segment, geometry_of(segment, 5)


def answer(axis, policy, *question):
    """What a policy answers, in the words of its definition."""
    if axis == "routing":
        return selected_rows(question[0].ask(policy))
    if axis == "residency":
        run = question[0]
        stream, about = stream_of(run.cells), run.geometry
        state = policy.fit([stream], about, 0) if policy.passes == 2 else policy.start(about, 0)
        placement, _ = policy.place(stream, forward_table(run.calls), about, state)
        cells = []
        for c, first in enumerate(stream.offsets[:-1]):
            cell = slice(first, stream.offsets[c + 1])
            experts = stream.experts[cell]
            where = [set(experts[mask[cell]].tolist()) for mask in (placement.hit, placement.on_gpu)]
            moved = (placement.promotions, placement.demotions, placement.resident)
            cells.append((*where, *(int(column[c]) for column in moved)))
        return cells
    trajectory = policy.unroll(*question)
    forwards, none = trajectory.forwards, np.zeros(len(trajectory.position), int)
    source = np.arange(len(none)) if trajectory.source is None else trajectory.source
    states = [none if rows is None else rows for rows in (trajectory.branch, trajectory.reused, trajectory.cold)]
    rows = list(zip(*(a.tolist() for a in (source, trajectory.state == MASKED, *states)), strict=True))
    columns = (forwards.step, forwards.num_accepted, forwards.branches, forwards.chosen_branch)
    bounds = zip(forwards.row_offsets[:-1], forwards.row_offsets[1:], strict=True)
    return [(*map(int, numbers), rows[a:b]) for *numbers, (a, b) in zip(*columns, bounds, strict=True)]


def module_of(path):
    """A test file as a module; one outside the suite under a name of its own."""
    if path.parent == TESTS:
        return importlib.import_module(f"tests.simulator.{path.stem}")
    spec = importlib.util.spec_from_file_location(f"outside_{path.stem}_{abs(hash(path))}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def definitions(axis, name, tests=TESTS):
    """(spec, function) of every definition that the tests of an axis have of a policy."""
    tables = [getattr(module_of(path), "NAIVE", {}) for path in sorted(tests.glob(f"test_{axis}_*.py"))]
    return [(spec, naive) for table in tables for spec, naive in table.items() if spec.partition(":")[0] == name]


def fault(axis, path, tests=TESTS):
    """Why the policy of a file breaks the rule; None where it keeps it."""
    naive = definitions(axis, path.stem, tests)
    if not naive:
        return f"no NAIVE of test_{axis}_*.py has a definition of {axis}/{path.stem}"
    for spec, definition in naive:
        name, colon, parameters = spec.partition(":")
        policy = load_policy(axis, f"{name if path.parent.parent == POLICIES else path}{colon}{parameters}")
        for seed in range(RUNS):
            question = asked(axis, seed)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(policy), AXES[axis], None)
                try:
                    expected = definition(*question, policy)
                except TypeError as error:
                    return f"the definition of {spec} fails: {error}"
            if answer(axis, policy, *question) != expected:
                return f"{spec} differs from its definition"
    return None
