"""Where verbs write: a place that cannot be written to is refused before the work, folders on the way are made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.main import get_command

from analysis.destinations import make_parents
from cli import app
from tests.test_cli import refused, run
from tracer.errors import UserError

# Nothing these name is there: a verb that gets as far as its work says so instead.
WRITERS = {
    "capture": ("demo:nothing", "--prompt", "x"),
    "replay": ("nothing.trace",),
    "consistency": ("nothing.trace",),
    "report": ("nothing.trace",),
    "interval": ("nothing.trace", "--budget", 8),
    "sweep": ("nothing.trace",),
    "profile": ("--gpu", "nothing"),
    "import": ("nothing", "nothing.csv"),
    "synth": ("--level", "nothing"),
}


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """A short recording."""
    path = tmp_path_factory.mktemp("outputs") / "short.trace"
    options = ("--gen-length", 64, "--threshold", 0.3, "--level", "scores", "--quiet")
    result = run("capture", "demo:llada2", "--out", path, "--prompt", "def main(", *options)
    assert result.exit_code == 0, (result.output, result.exception)
    return path


def test_every_verb_that_writes_is_held_to_it():
    commands = get_command(app).commands
    writes = {name for name, command in commands.items() if any(option.name == "out" for option in command.params)}
    # demo makes a folder of its own.
    assert writes - {"demo"} == set(WRITERS)


@pytest.mark.parametrize("verb", WRITERS)
def test_what_is_there_is_refused_before_the_work(verb, tmp_path, trace):
    if verb in ("capture", "import", "synth"):
        taken = trace
    elif verb == "replay":
        taken = tmp_path / "result"
        taken.mkdir()
        (taken / "replay.json").write_text("kept")
    else:
        taken = tmp_path / "there.toml"
        taken.write_text("kept")
    sentence = refused(verb, *WRITERS[verb], "--out", taken)
    assert str(taken) in sentence and "--force" in sentence and "force it" not in sentence and "append" not in sentence
    assert ("--resume" in sentence) == (verb == "capture")
    if verb not in ("capture", "import", "synth"):
        assert (taken / "replay.json" if taken.is_dir() else taken).read_text() == "kept"
    # With --force it is the work that fails.
    assert "nothing" in refused(verb, *WRITERS[verb], "--out", taken, "--force")


@pytest.mark.parametrize("verb", [*WRITERS, "demo"])
def test_a_file_in_the_way_is_refused_before_the_work(verb, tmp_path):
    blocked = tmp_path / "blocked"
    blocked.write_text("in the way")
    for out in (blocked / "out.toml", blocked / "deeper" / "out.toml"):
        assert str(blocked) in refused(verb, *WRITERS.get(verb, ()), "--out", out)
    assert "cannot be" in refused(verb, *WRITERS.get(verb, ()), "--out", tmp_path / ("long" * 100))
    assert os.listdir(tmp_path) == ["blocked"] and blocked.read_text() == "in the way"


@pytest.mark.parametrize("verb", WRITERS)
def test_a_locked_folder_is_refused_before_the_work(verb, tmp_path, monkeypatch):
    # Not by its mode: root may write anywhere.
    monkeypatch.setattr("os.access", lambda path, mode: tmp_path not in (Path(path), *Path(path).parents))
    assert str(tmp_path) in refused(verb, *WRITERS[verb], "--out", tmp_path / "locked" / "out.toml")


@pytest.mark.parametrize("verb", WRITERS)
def test_the_wrong_kind_of_place_is_refused(verb, tmp_path, trace):
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "mine.txt").write_text("kept")
    file.write_text("kept")
    force = ("--force",)
    if verb in ("capture", "import", "synth", "replay"):
        assert "is a file" in refused(verb, *WRITERS[verb], "--out", file, *force)
    else:
        assert "is a folder" in refused(verb, *WRITERS[verb], "--out", folder, *force)
    if verb in ("capture", "import", "synth"):
        assert "not a trace" in refused(verb, *WRITERS[verb], "--out", folder, *force)
    if verb == "replay":
        assert "is a trace" in refused(verb, *WRITERS[verb], "--out", trace, *force)
    assert (folder / "mine.txt").read_text() == file.read_text() == "kept"


def test_a_meta_file_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "meta.json").write_text('{"of": "another tool"}')
    assert "left alone" in refused("import", "nothing", "nothing.csv", "--out", tmp_path, "--force")


def test_a_sweep_goes_on_only_with_a_sweep(tmp_path, trace):
    mine = tmp_path / "mine.parquet"
    mine.write_bytes(next(trace.glob("routing/*.parquet")).read_bytes())
    assert "no sweep's result" in refused("sweep", "nothing.trace", "--out", mine)


def test_folders_on_the_way_are_made(tmp_path, trace, monkeypatch):
    def measured(path, **_):
        assert path.parent.is_dir()
        return {"values": {}, "notes": []}

    monkeypatch.setattr("simulator.profile.write_profile", measured)
    for verb, arguments in {
        "replay": (trace,),
        "consistency": (trace,),
        "report": (trace,),
        "interval": (trace, "--budget", 8),
        "sweep": (trace,),
        "profile": (),
    }.items():
        out = tmp_path / verb / "deep" / "out.toml"
        result = run(verb, *arguments, "--out", out, "--quiet")
        assert result.exit_code == 0, (verb, result.output, result.exception)
        assert verb == "profile" or out.exists()


def test_a_verb_that_fails_makes_no_folder(tmp_path, trace):
    for verb in ("replay", "consistency", "report", "interval", "sweep", "capture", "import", "synth"):
        refused(verb, *WRITERS[verb], "--out", tmp_path / verb / "out")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made_any_more_is_a_sentence(tmp_path):
    blocked = tmp_path / "blocked"
    blocked.write_text("since then")
    with pytest.raises(UserError, match="cannot be made"):
        make_parents(blocked / "deep" / "page.html")
