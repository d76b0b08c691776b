"""``check``: hold a trace against every requirement of trace-format.md and collect the first faults.

Readers stop at the first fault they meet; this goes on as far as the faults leave sense in what follows, and also looks at
what readers take on trust: counts that repeat other columns, and the experts whose scores capture level "active" kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from tracer.errors import TraceError
from tracer.files.forwards import StoredForwards, read_forwards, rule_faults, structure_faults
from tracer.files.loads import read_loads
from tracer.files.reader import Trace
from tracer.files.rows import Rows
from tracer.files.tidy import INTERRUPTED, not_finished, requests_frame
from tracer.files.tokens import token_fault, token_faults
from tracer.meta import MetaError, read_meta
from tracer.schema import DENOISE, undecided
from tracer.trace import LayerTrace, TraceMeta

MOST_FAULTS = 20


def check(path: str | Path, most: int = MOST_FAULTS) -> list[str]:
    """Faults of a trace, one sentence each, in the order they are met; empty when every requirement holds.

    That a trace was not finished is a fault too, and the last one.

    Parameters
    ----------
    path : str or Path
        The trace's folder.
    most : int
        How many faults to collect at most.
    """
    faults: list[str] = []
    for fault in _all_faults(Path(path)):
        if fault not in faults:
            faults.append(fault)
        if len(faults) >= most:
            break
    return faults


def _all_faults(path: Path) -> Iterator[str]:
    try:
        meta = read_meta(path)
    except MetaError as error:
        yield from (f"{error.name}: {fault}." for fault in error.faults)
        return
    except TraceError as error:
        yield str(error)
        return
    try:
        if "loads" in meta.tables:
            read_loads(path, meta)
            if not meta.complete:
                yield f"{path}: this trace was not finished."
            return
        stored = read_forwards(path, meta)
    except TraceError as error:
        yield str(error)
        return
    broken = False
    for fault in structure_faults(stored):
        broken = True
        yield fault
    if broken:
        return
    yield from rule_faults(stored)
    yield from _request_faults(stored, meta)
    trace = Trace(path, meta)
    # what rule_faults found leaves rows where they are
    trace.forwards = stored
    for first, last in itertools.pairwise(trace.bounds):
        if "tokens" in meta.tables:
            yield from _token_faults(trace, first, last)
        yield from _routing_faults(trace, first, last)
    if not trace.num_forwards:
        yield from _empty_faults(trace)
    if not meta.complete:
        yield _unfinished(stored)


def first_fault(trace: Trace) -> str | None:
    """The first fault of a trace's requests, forwards and tokens, which is little beside routing; None where there is none."""
    faults = [_request_faults(trace.forwards, trace.meta)]
    if "tokens" in trace.meta.tables:
        faults += [_token_faults(trace, first, last) for first, last in itertools.pairwise(trace.bounds)]
    return next(itertools.chain.from_iterable(faults), None)


def _unfinished(stored: StoredForwards) -> str:
    try:
        return not_finished(stored.path, requests_frame(stored))
    except TraceError:
        return f"{stored.path}: this trace was not finished."


def _empty_faults(trace: Trace) -> Iterator[str]:
    """Rows in a trace without calls."""
    try:
        for table in {"tokens", "routing"} & set(trace.meta.tables):
            trace.rows(table)
    except TraceError as error:
        yield str(error)


def _request_faults(stored: StoredForwards, meta: TraceMeta) -> Iterator[str]:
    try:
        requests = requests_frame(stored)
    except TraceError as error:
        yield str(error)
        return
    length = meta.block_length
    ended = requests.filter((pl.col("stop_reason") != INTERRUPTED) & pl.col("prompt_tokens").is_not_null())
    expected = pl.col("prompt_tokens").cast(pl.Int64) // length if length else pl.lit(-1, pl.Int64)
    for request, found, wanted in (
        ended.select("request_id", "first_block", expected.alias("wanted"))
        .filter(pl.col("first_block") != pl.col("wanted"))
        .head(1)
        .iter_rows()
    ):
        yield f"{stored.path}: requests: first_block of request {request} is {found} and must be {wanted}."


def _token_faults(trace: Trace, first: int, last: int) -> Iterator[str]:
    try:
        rows, columns = trace.token_rows(first, last)
    except TraceError as error:
        yield str(error)
        return
    broken = False
    for fault in token_faults(rows, columns):
        broken = True
        yield fault
    if not broken:
        yield from _value_faults(rows, columns)
        yield from _count_faults(trace.forwards, first, last, columns)


def _value_faults(rows: Rows, columns: dict[str, np.ndarray]) -> Iterator[str]:
    open_rows = undecided(columns["state"])
    predicted, confidence = columns["predicted_id"], columns["confidence"]
    rules = (
        (columns["accepted"] & ~open_rows, "accepted is set where the token was decided"),
        (columns["edited"] & open_rows, "edited is set where the token was not decided"),
        (columns["token_id"] < -1, "token_id must be -1 or more"),
        (predicted < -1, "predicted_id must be -1 or more"),
        ((predicted < 0) != np.isnan(confidence), "confidence must be NaN exactly where predicted_id is -1"),
        ((confidence < 0) | (confidence > 1.001), "confidence must lie in 0..1"),
    )
    for wrong, message in rules:
        yield from token_fault(rows, columns, wrong, message)


def _count_faults(stored: StoredForwards, first: int, last: int, columns: dict[str, np.ndarray]) -> Iterator[str]:
    """num_masked = undecided rows; num_accepted = accepted rows of denoise calls; num_edited = edited rows.

    Of a speculative call, those of the chosen branch count, and the positions it knows that the first branch has masked.
    """
    masked = np.concatenate(([0], np.cumsum(undecided(columns["state"]))))
    accepted = np.concatenate(([0], np.cumsum(columns["accepted"])))
    edited = np.concatenate(([0], np.cumsum(columns["edited"])))
    rows = np.arange(stored.call_parts[first], stored.call_parts[last])
    table = {name: values[rows].astype(np.int64) for name, values in stored.columns.items()}
    begins = np.cumsum(table["num_tokens"]) - table["num_tokens"]
    ends = begins + table["num_tokens"]
    found = masked[ends] - masked[begins]
    wrong = (table["num_masked"] >= 0) & (found != table["num_masked"])
    for i in np.flatnonzero(wrong)[:1]:
        yield f"{stored.name(int(rows[i]))}: num_masked is {table['num_masked'][i]} where tokens has {found[i]} masked rows."
    speculative = table["branches"] > 1
    unchosen = speculative & (table["chosen_branch"] < 0)
    for i in np.flatnonzero(unchosen)[:1]:
        yield f"{stored.name(int(rows[i]))}: chosen_branch is null in a call with {table['branches'][i]} branches."
    own = table["num_tokens"] // np.maximum(table["branches"], 1)
    chosen_begin = begins + np.maximum(table["chosen_branch"], 0) * own
    gained = accepted[chosen_begin + own] - accepted[chosen_begin]
    gained += (masked[begins + own] - masked[begins]) - (masked[chosen_begin + own] - masked[chosen_begin])
    counted = (table["kind"] == DENOISE) & (table["num_accepted"] >= 0) & ~unchosen
    for i in np.flatnonzero((gained != table["num_accepted"]) & counted)[:1]:
        yield f"{stored.name(int(rows[i]))}: num_accepted is {table['num_accepted'][i]} where tokens gains {gained[i]}."
    changed = edited[chosen_begin + own] - edited[chosen_begin]
    for i in np.flatnonzero(changed != table["num_edited"])[:1]:
        yield f"{stored.name(int(rows[i]))}: num_edited is {table['num_edited'][i]} where tokens has {changed[i]} edited rows."


def _routing_faults(trace: Trace, first: int, last: int) -> Iterator[str]:
    level = trace.meta.capture_level
    try:
        for table in ("routing", "scores") if level == "active" else ("routing",):
            trace.rows(table)
    except TraceError as error:
        yield str(error)
        return
    for part in trace.parts("routing") if level != "scores" else ():
        if "router_scores" in part.present:
            yield str(part.fault(None, f"it holds router_scores although capture_level is {level}."))
    for layer in trace.meta.model.moe_layers:
        try:
            routing = trace.layer(layer, first, last, True, True)
        except TraceError as error:
            yield str(error)
            continue
        missing = first_without_scores(routing) if level == "active" else -1
        if missing >= 0:
            stored = trace.forwards
            offsets = stored.row_offsets[first : last + 1] - stored.row_offsets[first]
            call = int(np.searchsorted(offsets, missing, "right")) - 1
            ids = routing.expert_ids[missing, : routing.count[missing]].tolist()
            cell = int(routing.present[:call].sum())
            what = f"experts lacks some of the ids {ids} of token row {missing - offsets[call]}"
            yield str(trace.rows("scores").read(layer, first, last, []).fault(cell, what))


def first_without_scores(layer: LayerTrace) -> int:
    """First routed row with scores that lacks the score of an expert it recorded, -1 if none or if there are no scores."""
    if layer.router_scores is None:
        return -1
    own = np.take_along_axis(layer.router_scores, layer.expert_ids.astype(np.int64), axis=1)
    real = np.arange(own.shape[1]) < layer.count[:, None]
    lacking = (np.isnan(own) & real).any(axis=1) & ~np.isnan(layer.router_scores).all(axis=1)
    return int(np.argmax(lacking)) if lacking.any() else -1
