"""The kernels' disk cache: any edited kernel source starts a new folder, an unwritable place is passed over."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numba
import pytest

from tracer import jit

KERNEL = "from tracer.jit import njit\n\n\n@njit\ndef {name}(x):\n    return {value}\n"


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "package"
    (folder / "deep").mkdir(parents=True)
    (folder / "one.py").write_text(KERNEL.format(name="one", value="x + 1"))
    (folder / "deep" / "two.py").write_text(KERNEL.format(name="two", value="x + 2"))
    (folder / "plain.py").write_text("VALUE = 1\n")
    return folder


def test_every_kernel_source_counts(package):
    before = jit.kernel_key([package])
    assert jit.kernel_key([package]) == before
    (package / "deep" / "two.py").write_text(KERNEL.format(name="two", value="x + 3"))
    edited = jit.kernel_key([package])
    assert edited != before
    (package / "plain.py").write_text("VALUE = 2\n")
    assert jit.kernel_key([package]) == edited
    (package / "one.py").rename(package / "three.py")
    assert jit.kernel_key([package]) not in (before, edited)


def test_the_version_counts(package, monkeypatch):
    before = jit.kernel_key([package])
    monkeypatch.setattr(jit, "version", lambda name: "99.0")
    assert jit.kernel_key([package]).startswith("99.0-") and jit.kernel_key([package]) != before


def test_the_folder_that_was_asked_for_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "asked"))
    assert jit.cache_folder("key") == tmp_path / "asked" / "key"
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setattr(jit, "user_cache", lambda: tmp_path / "user")
    assert jit.cache_folder("key") == tmp_path / "user" / "moetrace" / "key"


def test_an_unwritable_folder_falls_back_to_a_temporary_one(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setattr(jit, "user_cache", lambda: tmp_path / "file")
    monkeypatch.setattr(jit.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    found = jit.cache_folder("key")
    assert found is not None and found.is_relative_to(tmp_path / "temporary") and found.name == "key"
    monkeypatch.setattr(jit.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    assert jit.cache_folder("key") is None


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="folder modes are POSIX")
def test_a_folder_others_may_write_to_is_not_trusted(tmp_path):
    tmp_path.chmod(0o777)
    assert not jit.writable(tmp_path)
    tmp_path.chmod(0o700)
    assert jit.writable(tmp_path)


def run(root: Path, cache: Path) -> str:
    """Import ``package`` in a fresh process, call its outer kernel, and say what it returned and whether it was cached."""
    code = (
        "import package.outer as outer\n"
        "value = outer.outer(1)\n"
        "print(value, sum(outer.outer.stats.cache_hits.values()))\n"
    )
    paths = os.pathsep.join((str(root), str(Path(__file__).parents[2])))
    env = {**os.environ, "PYTHONPATH": paths, "NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_an_edited_callee_in_another_file_is_noticed(tmp_path):
    """Numba alone would serve the old machine code: the caller's own file did not change."""
    root, cache = tmp_path / "root", tmp_path / "cache"
    package = root / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "from pathlib import Path\nfrom tracer import jit\njit.folders = lambda: [Path(__file__).parent]\n"
    )
    (package / "inner.py").write_text(KERNEL.format(name="inner", value="x + 1"))
    outer = (
        "from package.inner import inner\nfrom tracer.jit import njit\n\n\n@njit\ndef outer(x):\n    return inner(x)\n"
    )
    (package / "outer.py").write_text(outer)
    assert run(root, cache) == "2 0"
    assert run(root, cache) == "2 1"
    (package / "inner.py").write_text(KERNEL.format(name="inner", value="x + 5"))
    assert run(root, cache) == "6 0"


def test_decorating_leaves_numbas_own_setting_alone():
    before = numba.config.CACHE_DIR
    compiled = jit.njit(lambda x: x)
    assert before == numba.config.CACHE_DIR
    assert compiled.targetoptions["nogil"]
    assert not compiled.targetoptions.get("fastmath")
