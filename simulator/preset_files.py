"""Presets as TOML files: tables of ``value`` and ``source``, read whole, all faults told at once."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from tracer.errors import UserError
from tracer.faults import sentences

MOST_FAULTS = 5
"""Faults a message lists; of more it says how many."""

# A field's description is what a message says it must be.
Text = Annotated[str, Field(pattern=r"\S", description="a text")]
Source = Annotated[str, Field(pattern=r"\S", description="a text that says where the value comes from")]


class _Strict(BaseModel):
    """Texts are no numbers and numbers no flags."""

    model_config = ConfigDict(strict=True)


def preset_model(values: Mapping[str, Any], texts: Mapping[str, Any] | None = None) -> type[BaseModel]:
    """What a file may hold: a description, ``texts``, and of each of ``values`` a table; nothing has to be there.

    Both map a name to its type; the type's description says what it must be.
    """
    fields: dict[str, Any] = {"description": (Annotated[str, Field(description="a text")], "")}
    fields |= {name: (kind | None, None) for name, kind in (texts or {}).items()}
    for name, kind in values.items():
        entry = create_model("Entry", __base__=_Strict, value=(kind, ...), source=(Source, ...))
        fields[name] = entry | None, Field(None, description=f"a table [{name}] with value and source")
    return create_model("Preset", __base__=_Strict, **fields)


def read_preset(
    path: Path, what: str, model: type[BaseModel], ignored: str | None = None
) -> tuple[dict[str, str], dict[str, tuple[Any, str]]]:
    """The texts of a file, the description among them, and its values with their sources; a UserError tells its faults.

    ``what`` it is a file of, for messages; ``model`` is what :func:`preset_model` gave; ``ignored`` a key nobody looks at.
    """
    name = f"The {what} file {path.name}"
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{name} is not TOML: {error}.") from None
    if ignored is not None:
        document.pop(ignored, None)
    known = [key for key in model.model_fields if key != "description"]
    faults = [_unknown(key, known) for key in document if key not in model.model_fields]
    try:
        read = model.model_validate(document)
    except ValidationError as error:
        faults += sentences(error, model)
    if faults:
        more = f"; and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
        raise UserError(f"{name}: {'; '.join(faults[:MOST_FAULTS])}{more}.")
    found = {key: getattr(read, key) for key in model.model_fields if getattr(read, key) is not None}
    texts = {key: entry for key, entry in found.items() if isinstance(entry, str)}
    return texts, {key: (entry.value, entry.source) for key, entry in found.items() if key not in texts}


def preset_text(texts: Mapping[str, str], values: Mapping[str, tuple[Any, str]]) -> str:
    """The text of a file that :func:`read_preset` reads again: ``texts``, and ``values`` with their sources."""
    # JSON strings without escapes beyond ASCII's are TOML strings.
    lines = [f"{key} = {json.dumps(text, ensure_ascii=False)}" for key, text in texts.items()]
    for key, (value, source) in values.items():
        lines += ["", f"[{key}]", f"value = {value!r}", f"source = {json.dumps(source, ensure_ascii=False)}"]
    return "\n".join(lines) + "\n"


def _unknown(key: str, known: list[str]) -> str:
    close = get_close_matches(key, known, n=1)
    return f"it has an unknown entry {key}" + (
        f", did you mean {close[0]}" if close else f"; it takes {', '.join(known)}"
    )
