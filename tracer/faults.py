"""What is wrong with a document, all of it at once, a sentence each: pydantic's errors in the words of the fields."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError


def wrong() -> PydanticCustomError:
    """The value is not what the field's description says."""
    return PydanticCustomError("wrong", "wrong")


def said(message: str) -> PydanticCustomError:
    """A whole sentence of its own, without the stop."""
    return PydanticCustomError("said", message)


def shown(value: Any) -> str:
    """A value as messages show it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def sentences(error: ValidationError, whole: type[BaseModel]) -> list[str]:
    """What a pydantic error says, one fault each: the key, what it must be (its field's description), what it is."""
    found: dict[str, str] = {}
    for fault in error.errors(include_url=False):
        keys: list[str] = []
        wanted, at = "", whole
        for step in fault["loc"]:
            field = at.model_fields.get(str(step)) if at is not None else None
            named = field or next((f for f in at.model_fields.values() if f.alias == step), None) if at else None
            if named is None:
                break
            keys.append(str(step))
            wanted, at = named.description or _described(named.metadata, named.annotation) or wanted, _model(named)
        name = ".".join(keys)
        if fault["type"] == "said":
            found.setdefault(fault["msg"], fault["msg"])
        elif fault["type"] == "missing":
            found.setdefault(name, f"{name} is missing: it must be {wanted}")
        else:
            # a fault inside a list or an object is told of the whole field
            value = fault["input"]
            inside = len(fault["loc"]) > len(keys)
            found.setdefault(name, f"{name} must be {wanted}" + ("" if inside else f", not {shown(value)}"))
    return list(found.values())


def _described(metadata: Any, annotation: Any) -> str | None:
    """The description inside ``Annotated[...]``, whether or not in a union."""
    for part in (annotation, *getattr(annotation, "__args__", ())):
        for extra in getattr(part, "__metadata__", ()):
            if getattr(extra, "description", None):
                return str(extra.description)
    return None


def _model(field: Any) -> Any:
    """The section a field holds, None where it is a plain value."""
    for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None
