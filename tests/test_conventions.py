"""Rules of the code base that a machine can hold."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [*sorted(p for d in ("tracer", "simulator", "analysis") for p in (ROOT / d).rglob("*.py")), ROOT / "cli.py"]
POLICIES = sorted(
    p for axis in ("routing", "residency", "acceptance") for p in (ROOT / "simulator" / axis).glob("[!_]*.py")
)


def policy_classes(path):
    """The dataclasses of a policy file that answer one of the three questions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        and any(isinstance(f, ast.FunctionDef) and f.name in ("select", "place", "unroll") for f in node.body)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_stay_small(path):
    budget = 120 if path.name == "cli.py" else 320
    assert len(path.read_text(encoding="utf-8").splitlines()) <= budget


@pytest.mark.parametrize("path", [p for p in POLICIES if policy_classes(p)], ids=lambda p: p.stem)
def test_every_policy_has_a_naive_definition_and_a_source(path):
    axis = path.parent.name
    tests = [p for p in (ROOT / "tests" / "simulator").rglob("test_*.py") if path.stem in p.read_text(encoding="utf-8")]
    naive = [p for p in tests if "def naive" in p.read_text(encoding="utf-8")]
    assert naive, f"no test under tests/simulator defines {axis}/{path.stem} naively"
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert "Source" in docstring or "arXiv" in docstring, "the docstring names no source"


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
