"""Rules of the code base that a machine can hold."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from simulator.registry import AXES, policy_names
from tests.simulator.definitions import fault

ROOT = Path(__file__).parent.parent
SOURCES = [*sorted(p for d in ("tracer", "simulator", "analysis") for p in (ROOT / d).rglob("*.py")), ROOT / "cli.py"]
POLICIES = [ROOT / "simulator" / axis / f"{name}.py" for axis in AXES for name in policy_names(axis)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_stay_small(path):
    budget = 120 if path.name == "cli.py" else 320
    assert len(path.read_text(encoding="utf-8").splitlines()) <= budget


@pytest.mark.parametrize("path", POLICIES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_policy_equals_its_naive_definition_and_names_a_source(path):
    assert fault(path.parent.name, path) is None
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert "Source" in docstring or "arXiv" in docstring, "the docstring names no source"


FIRST = """
from dataclasses import dataclass, replace

@dataclass(frozen=True)
class First:
    requires = frozenset()

    def select(self, layer, trajectory, geometry):
        return replace(layer, count=layer.count.clip(max=1))
"""
ALONE = """
def naive_first(case, policy):
    ids, weights = case.layer.expert_ids[:, 0].tolist(), case.layer.gate_weights[:, 0].astype("float32")
    return [{e: w} if n else {} for e, w, n in zip(ids, weights, case.layer.count)]
"""


@pytest.mark.parametrize(
    ("definition", "found"),
    [
        ("", "has a definition of routing/first"),
        ("def naive_first(case, policy):\n    return []", "first differs from its definition"),
        ("def naive_first(case, policy):\n    return case.ask(policy)", "the definition of first fails"),
        (ALONE, None),
    ],
)
def test_a_policy_without_a_definition_that_is_run_and_equal_is_told(definition, found, tmp_path):
    (tmp_path / "first.py").write_text(FIRST)
    table = "NAIVE = {'first': naive_first}" if definition else ""
    (tmp_path / "test_routing_other.py").write_text(f"{definition}\n{table}\n")
    told = fault("routing", tmp_path / "first.py", tests=tmp_path)
    assert told is None if found is None else found in told


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    missing = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert missing == []


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['moetrace', '--help']\n"
        "try:\n    import cli; cli.app()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numba', 'altair', 'polars', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_readme_schema_table_is_generated_from_the_code():
    from tracer.schema import schema_markdown

    assert schema_markdown().strip() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_nothing_unpickles_foreign_files():
    for path in SOURCES:
        if path.name == "train.py":
            continue
        text = path.read_text(encoding="utf-8")
        assert "import pickle" not in text and "torch.load(" not in text, path
