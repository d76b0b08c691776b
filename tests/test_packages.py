"""Names at package level: found without an import of their modules, and still functions once every module is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tracer.errors import unknown

ROOT = Path(__file__).parent.parent
PACKAGES = ("tracer", "simulator", "analysis")

EACH = """
import importlib, inspect, pkgutil, sys
package = importlib.import_module(sys.argv[1])
heavy = {"torch", "numba", "polars", "pyarrow", "altair"} & set(sys.modules)
assert not heavy, heavy

def look():
    for name in package.__all__:
        names = {}
        exec(f"from {package.__name__} import {name}", names)
        thing = names[name]
        assert callable(thing) and not inspect.ismodule(thing) and inspect.getdoc(thing), name
        assert name in package.__doc__ or inspect.isclass(thing), name

look()
for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
    importlib.import_module(module.name)
look()
try:
    package.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError
"""


@pytest.mark.parametrize("package", PACKAGES)
def test_names_are_functions_before_and_after_every_module_is_imported(package):
    done = subprocess.run([sys.executable, "-c", EACH, package], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_names_asked_for_first_are_found_in_a_fresh_interpreter():
    code = "from analysis import consistency, diff, report; from tracer import check, open_trace; print(check.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "check", done.stderr


def test_the_nearest_name_is_told():
    assert str(unknown("verb", "inof", ["info", "check"])) == (
        "There is no verb 'inof' (did you mean info?); there are info, check."
    )
    assert str(unknown("verb", "xyz", ["info"], ", or a file")) == "There is no verb 'xyz'; there are info, or a file."
    assert str(unknown("verb", "xyz", [])) == "There is no verb 'xyz'; there are none."
