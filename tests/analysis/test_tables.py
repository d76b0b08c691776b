"""Tables in terminals of any width: no figure is cut, no text lost, and what is left out is named."""

from __future__ import annotations

from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from analysis.figures import shown_in
from analysis.tables import Column, Sheet, available, fold, laid_out
from analysis.terminal import INTERVAL_ORDER, frame_table

SPEC = "tide:budget=16,refresh_interval=4,copy_back=true"


def drawn(sheet, width):
    """Lines of the table at a width, without trailing blanks, and the lines below it."""
    table, wide, below = laid_out(sheet, width)
    console = Console(width=max(wide, width or 1), record=True, file=StringIO(), highlight=False)
    console.print(table)
    return [line.rstrip() for line in console.export_text().splitlines()], below


@pytest.fixture
def sheet():
    """Two runs of one machine with figures of all lengths."""
    columns = [Column("trace", folds=19), Column("residency", folds=19)]
    columns += [Column(name, right=True) for name in ("bytes_to_gpu", "latency_s", "hit_rate", "same")]
    rows = [
        ("demo:llada2", SPEC, "16,121,856", "0.07727", "98.4%", "1.00"),
        ("demo:llada2", "lru:budget=8", "3,145,728", "0.03971", "100.0%", "1.00"),
    ]
    order = ("residency", "latency_s", "hit_rate", "bytes_to_gpu", "same", "trace")
    return Sheet(columns, rows, ("trace", "residency"), order)


def test_without_a_limit_every_row_is_one_line(sheet):
    lines, below = drawn(sheet, None)
    assert len(lines) == 3 and below == []
    assert lines[1].split() == list(sheet.rows[0])


def test_heads_and_specs_fold_before_a_column_goes(sheet):
    lines, below = drawn(sheet, 75)
    assert below == [] and max(map(len, lines)) <= 75
    assert all(figure in "\n".join(lines) for row in sheet.rows for figure in row[2:])
    assert lines[0].split() == ["bytes_to_", "latency_", "hit_"]
    assert lines[1].split() == ["trace", "residency", "gpu", "s", "rate", "same"]
    assert "refresh_interval=4," in "\n".join(lines)


def test_columns_go_in_order_and_are_named(sheet):
    lines, below = drawn(sheet, 45)
    assert max(map(len, lines)) <= 45
    assert below == [
        "In every row: same 1.00, trace demo:llada2.",
        "Left out of 45 columns: bytes_to_gpu; --json has it.",
    ]
    text = "\n".join(lines)
    assert "0.07727" in text and "98.4%" in text and "16,121,856" not in text
    assert drawn(sheet, 32)[1][1] == "Left out of 32 columns: hit_rate, bytes_to_gpu; --json has them."


def test_what_tells_rows_apart_stays_where_nothing_fits(sheet):
    lines, below = drawn(sheet, 8)
    assert "refresh_interval=4," in "\n".join(lines) and "latency_s, hit_rate" in below[1]


@given(
    width=st.integers(1, 200),
    rows=st.lists(
        st.tuples(st.sampled_from([SPEC, "lru", "a b  c"]), st.integers(0, 10**12), st.floats(0, 1e9)), min_size=1
    ),
)
def test_figures_are_whole_at_every_width(width, rows):
    sheet = frame_table(("spec", "tokens_to_gpu", "latency"), rows, ("spec",), ("spec", "latency", "tokens_to_gpu"))
    lines, below = drawn(sheet, width)
    text, shown = "\n".join(lines), [name for name in ("latency", "tokens_to_gpu") if name not in "\n".join(below)]
    assert "…" not in text
    for row in sheet.rows:
        assert all(row[("spec", "tokens_to_gpu", "latency").index(name)] in text for name in shown)
    if shown:
        assert max(map(len, lines)) <= width


@given(st.text(alphabet="ab, _:=/.日", max_size=60), st.integers(2, 30))
def test_folding_keeps_every_letter(text, width):
    lines = fold(text, width)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(cell_len(line) <= width for line in lines)


def test_folding_breaks_where_readers_expect_it():
    assert fold(SPEC, 19) == ["tide:budget=16,", "refresh_interval=4,", "copy_back=true"]
    assert fold("  accepted in between", 12) == ["  accepted", "  in between"]
    assert fold("tokens_per_forward", 8) == ["tokens_", "per_", "forward"]
    assert fold("Qwen3MoeForCausalLM", 10) == ["Qwen3MoeFo", "rCausalLM"]


def test_the_width_of_a_pipe_is_what_columns_says(monkeypatch):
    for told, width in (("72", 72), ("", None), ("wide", None), ("0", None)):
        monkeypatch.setenv("COLUMNS", told)
        assert available() == width


def test_orders_name_every_column():
    from simulator.interval import IntervalResult

    assert all(figure.rank < 99 for table in ("terminal", "sweep") for figure in shown_in(table))
    assert all(name in (IntervalResult.frame.__doc__ or "") for name in INTERVAL_ORDER)
