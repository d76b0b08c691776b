"""Two traces or two replays side by side, the differences that matter first.

The difference of two numbers is relative, |a - b| over the larger magnitude; two texts that differ, and a value that only one
side has, count as 1. Settings and figures are ranked by it, then counts, sizes and the parts of figures, then provenance, then
what is equal. Where both figures have an interval, ``apart`` says whether the two have nothing in common.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.aggregate import RECORDED, TIMES, hardware_of, labels, policy_of
from analysis.findings_consistency import agreement_sentences
from analysis.metrics import ConsistencyResult, Settings, consistency
from analysis.metrics.shared.seeds import across
from analysis.summary import ReplaySummary, read_replay
from tracer.errors import UserError

SIZES, PROVENANCE = frozenset({"counts", "bytes", "bytes per decision"}), frozenset({"trace", "provenance"})
REPLICATES = 200
"""Bootstrap resamples of a trace's figures."""


@dataclass(frozen=True, slots=True)
class DiffResult:
    """What differs between two things of one kind.

    ``kind`` is "trace" or "replay"; ``a`` and ``b`` name the two. ``rows``, ranked: ``part``, ``figure``, ``a``, ``b``,
    ``difference`` (0 to 2, see the module), ``low_a``, ``high_a``, ``low_b``, ``high_b`` and ``apart`` (None without
    intervals). ``notes``: what could not be compared, and how to read the rows.
    """

    kind: str
    a: str
    b: str
    rows: list[dict[str, Any]]
    notes: list[str]

    @property
    def differing(self) -> list[dict[str, Any]]:
        """The rows that differ."""
        return [row for row in self.rows if row["difference"] > 0]

    def sentence(self) -> str:
        """How much differs, in one sentence."""
        found = self.differing
        if not self.rows or all(row["part"] == "replayed trace" for row in self.rows):
            return f"{self.a} and {self.b} have nothing in common to compare."
        if not found:
            return f"{self.a} and {self.b} agree in all {len(self.rows)} values compared."
        first = found[0]
        return (
            f"{self.a} and {self.b} differ in {len(found)} of {len(self.rows)} values, first in {first['part']}: "
            f"{first['figure']} ({_plain(first['a'])} against {_plain(first['b'])})."
        )

    def to_json(self) -> dict[str, Any]:
        """The result as plain values."""
        return {name: getattr(self, name) for name in self.__slots__}


def diff(a: Any, b: Any) -> DiffResult:
    """Compare two traces, or two replays.

    Parameters
    ----------
    a, b
        Folders of traces or of replays, open traces, or replays (``ReplayResult``, :class:`ReplaySummary`).

    Raises
    ------
    UserError
        One is a trace and the other a replay, or a folder is neither.
    """
    (kind, one, name), (other_kind, other, other_name) = _opened(a), _opened(b)
    if kind != other_kind:
        raise UserError(
            f"{name} is a {kind} and {other_name} is a {other_kind}; name two traces, or two folders that "
            "moetrace replay --out wrote."
        )
    if name == other_name:
        name, other_name = f"{name} (first)", f"{other_name} (second)"
    rows, notes = (_traces if kind == "trace" else _replays)(one, other, name, other_name)
    return DiffResult(kind, name, other_name, sorted(rows, key=_rank), notes)


def _opened(thing: Any) -> tuple[str, Any, str]:
    """Kind, the thing itself and its name."""
    if isinstance(thing, str | Path):
        path = Path(thing)
        name = path.name or str(path)
        if (path / "replay.json").is_file():
            return "replay", read_replay(path).document, name
        if not (path / "meta.json").is_file():
            raise UserError(
                f"{path} holds neither a trace (meta.json) nor a replay (replay.json); name a folder of either."
            )
        from tracer.parquet import open_trace

        return "trace", open_trace(path), name
    if isinstance(thing, ReplaySummary):
        return "replay", thing.document, "replay"
    if hasattr(thing, "runs") and hasattr(thing, "to_json"):
        return "replay", thing.to_json(), "replay"
    return "trace", thing, Path(thing.path).name


def _traces(one: Any, other: Any, name: str, other_name: str) -> tuple[list[dict[str, Any]], list[str]]:
    from tracer.summary import describe

    rows = []
    described = [describe(trace) for trace in (one, other)]
    told = [note for facts in described for note in facts.pop("notes")]
    facts = [{(p, f): v for p, f, v in _flat(one) if (p, f) != ("trace", "path")} for one in described]
    for part, figure in dict.fromkeys([*facts[0], *facts[1]]):
        values = (facts[0].get((part, figure)), facts[1].get((part, figure)))
        if values != (None, None):
            rows.append(_row(part.replace("_", " "), figure, *values))
    settings = Settings(replicates=REPLICATES)
    results = [consistency(trace, settings=settings) for trace in (one, other)]
    headlines = [{row["figure"].strip(): row for row in result.headline()} for result in results]
    for figure in dict.fromkeys([*headlines[0], *headlines[1]]):
        left, right = (headline.get(figure, {}) for headline in headlines)
        ends = {f"{end}_{side}": row.get(end) for side, row in (("a", left), ("b", right)) for end in ("low", "high")}
        rows.append(_row("consistency", figure, left.get("value"), right.get("value"), **ends))
    notes = [
        f"{who}: {frame}: {why}"
        for who, result in ((name, results[0]), (other_name, results[1]))
        for frame, why in result.reasons.items()
    ]
    notes = [*told, "Overlap depends on how many tokens a step accepts; compare that figure first.", *notes]
    return rows, [*_popularity({name: results[0], other_name: results[1]}, settings), *notes]


def _popularity(results: Mapping[str, ConsistencyResult], settings: Settings) -> list[str]:
    """Whether the experts' popularity agrees, in sentences; none where the two are not of one model."""
    held = [result.popularity for result in results.values()]
    if None in held or len({(one.model, one.layers, one.load.shape[2], one.scope) for one in held if one}) > 1:
        return []
    frame = across(dict(zip(results, [one for one in held if one], strict=True)), settings)
    return agreement_sentences(frame)


def _replays(
    one: Mapping[str, Any], other: Mapping[str, Any], name: str, other_name: str
) -> tuple[list[dict[str, Any]], list[str]]:
    told = [dict((document.get("trace") or {}).items()) for document in (one, other)]
    keys = [key for key in dict.fromkeys([*told[0], *told[1]]) if key != "path"]
    rows = [_row("replayed trace", key, told[0].get(key), told[1].get(key)) for key in keys]
    runs = [{_label(run): run for run in document.get("runs") or []} for document in (one, other)]
    pairs = [(label, label) for label in runs[0] if label in runs[1]]
    alone = [[label for label in side if label not in against] for side, against in (runs, runs[::-1])]
    notes = []
    if len(alone[0]) == len(alone[1]) == 1:
        # One run each that is not the other's: their policies are what the two differ in.
        pairs.append((alone[0][0], alone[1][0]))
    else:
        for who, only in zip((name, other_name), alone, strict=True):
            notes += [f"Only {who} has the run {label}." for label in only]
    if not pairs:
        notes.insert(0, "The two replays share no run: none has the same policies, parameters and hardware in both.")
    short = _short([(label, run) for side in runs for label, run in side.items()])
    for left, right in pairs:
        part = short[left] if left == right else f"{short[left]} against {short[right]}"
        rows += _run_rows(part, runs[0][left], runs[1][right])
    if any(run.get("estimate") for side in runs for run in side.values()):
        notes.append("Some runs are open-loop estimates; see their own notes.")
    return rows, notes


def _run_rows(part: str, left: Mapping[str, Any], right: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    summaries = [run.get("summary") or {} for run in (left, right)]
    flat = [{f: v for _, f, v in _flat({"": s}) if not f.endswith("_ci95")} for s in summaries]
    for figure in dict.fromkeys([*flat[0], *flat[1]]):
        ends: dict[str, float | None] = {}
        for side, summary in zip("ab", summaries, strict=True):
            low, high = summary.get(f"{figure}_ci95") or (None, None)
            ends |= {f"low_{side}": low, f"high_{side}": high}
        values = flat[0].get(figure), flat[1].get(figure)
        if values != (None, None):
            yield _row(part, figure, *values, **ends)


def _label(run: Mapping[str, Any]) -> str:
    """Policies with every parameter, and the hardware."""
    parts = []
    for axis in ("acceptance", "routing", "residency"):
        name, parameters = policy_of(run, axis)
        told = ",".join(f"{key}={value}" for key, value in sorted(parameters.items()))
        # The recorded acceptance is what a run has unless it says otherwise.
        if (axis, name) != ("acceptance", RECORDED):
            parts.append(f"{name}:{told}" if told else name)
    return TIMES.join([*parts, *filter(None, [hardware_of(run)])])


def _short(runs: list[tuple[str, Mapping[str, Any]]]) -> dict[str, str]:
    """A short name of each run by its label: of the parameters, only those that tell runs of both replays apart."""
    names = [labels([policy_of(run, axis) for _, run in runs]) for axis in ("acceptance", "routing", "residency")]
    machines = [hardware_of(run) for _, run in runs]
    found = {}
    for (label, run), acceptance, routing, residency, machine in zip(runs, *names, machines, strict=True):
        brought = policy_of(run, "acceptance")[0] in (RECORDED, policy_of(run, "routing")[0])
        hardware = [machine] if machine and len(set(machines)) > 1 else []
        found[label] = TIMES.join([*([] if brought else [acceptance]), routing, residency, *hardware])
    return found


def _flat(document: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(part, name, value) of a document of parts; mappings inside a part are written with a dot."""
    for part, values in document.items():
        stack = [(str(key), value) for key, value in values.items()][::-1]
        while stack:
            key, value = stack.pop()
            if isinstance(value, Mapping):
                stack += [(f"{key}.{inner}", deeper) for inner, deeper in value.items()][::-1]
            else:
                yield part, key, value


def _row(part: str, figure: str, a: Any, b: Any, **ends: float | None) -> dict[str, Any]:
    bounds = {name: ends.get(name) for name in ("low_a", "high_a", "low_b", "high_b")}
    known = [end for end in bounds.values() if end is not None]
    apart = bool(known[1] < known[2] or known[3] < known[0]) if len(known) == 4 else None
    return {"part": part, "figure": figure, "a": a, "b": b, "difference": difference(a, b), **bounds, "apart": apart}


def difference(a: Any, b: Any) -> float:
    """Relative difference of two numbers, 0 to 2; of anything else 0 where they are equal and 1 where they are not."""
    if a == b:
        return 0.0
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in (a, b))
    return abs(a - b) / max(abs(a), abs(b)) if numbers else 1.0


def _rank(row: Mapping[str, Any]) -> tuple[Any, ...]:
    # A figure's parts, such as those of the latency, say less than the figure.
    detail = row["part"] in SIZES or "." in row["figure"]
    tier = 2 if row["part"] in PROVENANCE else 1 if detail else 0
    # Figures whose intervals overlap may be equal for all one knows: they come after those that certainly differ.
    return row["difference"] == 0, tier, row["apart"] is False, -row["difference"]


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "nothing" if value is None else str(value)
