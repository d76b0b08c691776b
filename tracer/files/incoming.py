"""The ``forwards`` and ``requests`` rows a writer is given, held to the requirements of trace-format.md."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from tracer.errors import UserError
from tracer.faults import sentences
from tracer.files.columns import CHOICES
from tracer.files.forwards import ROW_RULES, WRONG_START, WRONG_STEP
from tracer.schema import DENOISE, KINDS, TABLES
from tracer.trace import TraceMeta

# smallest and largest value, where the type does not say it
LOWEST, HIGHEST = {"num_tokens": 1, "branches": 1, "block": -1, "step": -1, "first_block": -1}, {"chosen_branch": 254}
DEFAULTS: dict[str, Any] = {"num_edited": 0, "branches": 1, "chosen_branch": None, "duration_ns": None}


def _row_model(table: str) -> type[BaseModel]:
    """A row of a table as the writer is given it, without forward_id."""
    fields: dict[str, Any] = {}
    for column in TABLES[table]:
        name, kind, what = column.name, Any, None
        if name in CHOICES:
            kind, what = Literal[CHOICES[name]], f"one of {', '.join(CHOICES[name])}"  # type: ignore[assignment]
        elif column.type != "string":
            low, high = LOWEST.get(name, 0), HIGHEST.get(name, int(np.iinfo(column.type).max))
            kind, what = Annotated[int, Field(ge=low, le=high)], f"a whole number from {low} to {high}"  # type: ignore[assignment]
        default = DEFAULTS.get(name, ... if table == "forwards" or not column.optional else None)
        fields[name] = (kind | None if column.optional else kind, Field(default, description=what))
    fields.pop("forward_id", None)
    return create_model(table, __config__=ConfigDict(strict=True, extra="forbid"), **fields)


ROWS = {table: _row_model(table) for table in ("forwards", "requests")}


def checked_row(name: str, table: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A row with its defaults; a UserError names the first column that is missing, unknown or out of range."""
    model = ROWS[table]
    try:
        return model.model_validate(dict(given)).__dict__
    except ValidationError as error:
        numbers = {key: int(value) for key, value in given.items() if isinstance(value, np.integer)}
        if numbers:
            return checked_row(name, table, {**given, **numbers})
        fault = error.errors()[0]
        if fault["type"] == "extra_forbidden":
            raise UserError(f"{name}: {table} has no column {fault['loc'][0]}.") from None
        raise UserError(f"{name}: {sentences(error, model)[0]}.") from None


class CallRules:
    """Checks calls one by one; remembers the steps of open requests and the layers of each kind.

    Parameters
    ----------
    meta : TraceMeta
    held : collection of int
        Requests that an earlier writer of the trace recorded forwards of; they cannot go on.
    """

    def __init__(self, meta: TraceMeta, held: Collection[int]) -> None:
        self._meta = meta
        self._closed = set(held)
        self._steps: dict[int, dict[int, int]] = {}
        self._layers: dict[str, frozenset[int]] = {}

    def parts(
        self, forward_id: int, given: Sequence[Mapping[str, Any]], has_tokens: bool, layers: Collection[int]
    ) -> tuple[int, list[dict[str, Any]]]:
        """Rows of a call and its checked parts; a UserError names the first thing wrong with it."""
        name = f"call {forward_id}"
        rows = 0
        parts: list[dict[str, Any]] = []
        for values in given:
            parts.append(self._part(name, values, rows))
            rows += parts[-1]["num_tokens"]
        if not parts:
            raise UserError(f"{name}: parts must hold one entry a request.")
        kind = parts[0]["kind"]
        if any(part["kind"] != kind for part in parts):
            raise UserError(f"{name}: all requests of a call must share one kind.")
        if len(parts) > 1 and len({part["request_id"] for part in parts}) < len(parts):
            raise UserError(f"{name}: a request stands twice in it.")
        if has_tokens != ("tokens" in self._meta.tables):
            raise UserError(f"{name}: tokens must be given exactly when meta.tables lists them.")
        known = self._layers.get(kind)
        if known is None:
            known = frozenset(layers)
            strange = known - set(self._meta.model.moe_layers)
            if strange or not known:
                what = f"layer {min(strange)} is not among model.moe_layers" if strange else "it has no layer"
                raise UserError(f"{name}: {what}.")
        if known != set(layers):
            raise UserError(f"{name}: its layers are {sorted(layers)} and {kind} calls have {sorted(known)}.")
        return rows, parts

    def accept(self, parts: list[dict[str, Any]], layers: Collection[int]) -> None:
        """Count the steps of a call that was taken; its layers are those of its kind from now on."""
        self._layers.setdefault(parts[0]["kind"], frozenset(layers))
        for part in parts:
            if part["step"] >= 0 and part["block"] >= 0:
                self._steps.setdefault(part["request_id"], {})[part["block"]] = part["step"] + 1

    def request(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A checked ``requests`` row; forgets what was kept of the request."""
        row = checked_row("requests", "requests", given)
        request = row["request_id"]
        if request in self._closed:
            raise UserError(f"request {request} is already in the trace: give each request a request_id of its own.")
        self._closed.add(request)
        self._steps.pop(request, None)
        return row

    def _part(self, name: str, given: Mapping[str, Any], rows: int) -> dict[str, Any]:
        part = checked_row(name, "forwards", given)
        request, block = part["request_id"], part["block"]
        if request in self._closed:
            raise UserError(f"{name}: request {request} has ended, a new one needs a request_id of its own.")
        known = {key: -1 if value is None else value for key, value in part.items()} | {
            "kind": KINDS.index(part["kind"])
        }
        step = self._steps.get(request, {}).get(block, 0) if known["kind"] == DENOISE and block >= 0 else part["step"]
        for wrong, words in (
            (part["row_start"] != rows, WRONG_START.replace("{expected}", str(rows))),
            *((rule(known), words) for rule, words in ROW_RULES),
            (part["step"] != step, WRONG_STEP.replace("{expected}", str(step))),
        ):
            if wrong:
                raise UserError(f"{name}: {words.format(**part)}.")
        return part
