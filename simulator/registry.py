"""Policies by name: the file name in ``simulator/{routing,residency,acceptance}`` is the policy's name.

Specs are those of ``spec.py``; instead of a name, a path to a ``.py`` file or a dotted module loads the user's own policy.
Parameters are the fields of the policy's dataclass.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

from simulator.amounts import Percent, Size, parse_percent, parse_size
from simulator.spec import parse, split, write
from tracer.errors import UserError, unknown

AXES = {"routing": "select", "residency": "place", "acceptance": "unroll"}


@dataclass(frozen=True, slots=True)
class PolicyInfo:
    """A policy as a list shows it; ``parameters`` maps each name to its default, ``source`` is where the rule was published."""

    name: str
    line: str
    parameters: dict[str, Any]
    source: str


@cache
def policy_names(axis: str) -> list[str]:
    """Names of the policies that come with the package, sorted; imports none of them."""
    folder = Path(__file__).parent / axis
    return sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_"))


def list_policies(axis: str) -> list[PolicyInfo]:
    """Name, first docstring line, parameters with defaults and source of every policy of an axis.

    Parameters
    ----------
    axis : str
        "routing", "residency" or "acceptance".
    """
    found = []
    for name in policy_names(axis):
        module = importlib.import_module(f"simulator.{axis}.{name}")
        policy = _policy_class(module, axis, name)
        line = (inspect.getdoc(policy) or "").split("\n", 1)[0]
        parameters = {f.name: f.default for f in dataclasses.fields(policy) if f.init}
        found.append(PolicyInfo(name, line, parameters, _source(inspect.getdoc(module) or "")))
    return found


def _source(text: str) -> str:
    """The first clause after "Source:"; the point after an initial does not end it."""
    said = " ".join(text.partition("Source:")[2].split())
    return re.split(r"(?<![A-Z])\. |[:;] ", said, maxsplit=1)[0].rstrip(".")


def load_policy(axis: str, spec: str) -> Any:
    """The policy object a spec names.

    Parameters
    ----------
    axis : str
        "routing", "residency" or "acceptance".
    spec : str
        See :mod:`simulator.spec`; the name may be a path to a .py file or a dotted module.

    Raises
    ------
    UserError
        Unknown policy or parameter, or a value of the wrong type.
    """
    name = split(spec)[0]
    policy = _policy_class(_module(axis, name), axis, name)
    hints = _hints(policy)
    given = parse(spec, f"{axis} policy", [f.name for f in dataclasses.fields(policy)])[1]
    values = {key: _value(f"{name}:{key}", text, hints[key]) for key, text in given.items()}
    missing = [f.name for f in dataclasses.fields(policy) if f.name not in values and _required(f)]
    if missing:
        raise UserError(f"{axis} policy {name} needs a value for {', '.join(missing)}; add {missing[0]}=VALUE.")
    return policy(**values)


def name_of(policy: Any) -> str:
    """A policy's name: that of the file it is defined in."""
    return type(policy).__module__.rsplit(".", 1)[-1]


def describe(policy: Any) -> dict[str, Any]:
    """``{"name": ..., "parameters": {...}}`` of a policy object, parameters that are None left out."""
    parameters = {f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)}
    return {"name": name_of(policy), "parameters": {k: v for k, v in parameters.items() if v is not None}}


def spec_of(policy: Any, name: str | None = None) -> str:
    """The spec of a policy object, all parameters written out but those that are None; ``name`` where it is not its own."""
    told = describe(policy)
    return write(name or told["name"], told["parameters"])


@lru_cache(maxsize=256)
def _hints(policy: type) -> dict[str, Any]:
    """Types of a policy's parameters; evaluated once, as grids load a policy many times."""
    return typing.get_type_hints(policy, include_extras=True)


def answer_of(policy: Any, method: str, *arguments: Any) -> Any:
    """What a policy answers; what goes wrong inside one of the user's own is told in a sentence.

    Raises
    ------
    UserError
        A policy that does not come with the package fails, or answers nothing.
    """
    if type(policy).__module__.startswith("simulator."):
        return getattr(policy, method)(*arguments)
    name = name_of(policy)
    try:
        answer = getattr(policy, method)(*arguments)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"The policy {name} fails in {method}: {type(error).__name__}: {error}.") from error
    if answer is None:
        raise UserError(f"The policy {name} answers nothing in {method}; return what simulator/policy.py says.")
    return answer


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _module(axis: str, name: str) -> types.ModuleType:
    if name in policy_names(axis):
        return importlib.import_module(f"simulator.{axis}.{name}")
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"There is no policy file {name}; check the path.")
        # A module of its own name: dataclasses look their module up, and two files may share a stem.
        module_name = f"moetrace_policies_{abs(hash(path.resolve()))}.{path.stem}"
        found = importlib.util.spec_from_file_location(module_name, path)
        if found is None or found.loader is None:
            raise UserError(f"{name} cannot be read as a Python file; check the path.")
        module = importlib.util.module_from_spec(found)
        sys.modules[module_name] = module
        try:
            found.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise UserError(f"The policy file {name} fails to load: {type(error).__name__}: {error}.") from error
        return module
    if "." in name:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"The policy module {name} cannot be imported: {error}.") from error
    raise unknown(f"{axis} policy", name, policy_names(axis), ", or give a path to a .py file or a dotted module")


def _policy_class(module: types.ModuleType, axis: str, name: str) -> type:
    method = AXES[axis]
    found = [
        c
        for c in vars(module).values()
        if isinstance(c, type)
        and c.__module__ == module.__name__
        and dataclasses.is_dataclass(c)
        and callable(getattr(c, method, None))
    ]
    if len(found) != 1:
        raise UserError(
            f"{name} defines {len(found)} dataclasses with a method {method}; a {axis} policy's file defines exactly one."
        )
    return found[0]


def _value(where: str, text: str, hint: Any) -> Any:
    """Text as the type of a field: int, float, bool, str, a size, a share, a Literal, or one of these or None."""
    options = [hint]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        options = [o for o in typing.get_args(hint) if o is not type(None)]
        if text.lower() == "none" and len(options) < len(typing.get_args(hint)):
            return None
    for option in options:
        if typing.get_origin(option) is Literal:
            for choice in typing.get_args(option):
                if str(choice) == text:
                    return choice
        elif option is bool:
            if text.lower() in ("true", "false"):
                return text.lower() == "true"
        else:
            try:
                return READERS.get(option, option)(text)
            except (TypeError, ValueError, OverflowError):
                continue
    raise UserError(f"{where}={text} is not {_wanted(options)}; give another value.")


def _whole(text: str) -> int:
    # Large numbers are often written 1.5e9.
    return int(float(text)) if float(text).is_integer() else int(text)


READERS: dict[Any, Callable[[str], Any]] = {int: _whole, Size: parse_size, Percent: parse_percent}


def _wanted(options: list[Any]) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    names |= {Size: "a size such as 512MB or 24GiB", Percent: "a share such as 25%"}
    return " or ".join(
        " or ".join(map(str, typing.get_args(o))) if typing.get_origin(o) is Literal else names.get(o, str(o))
        for o in options
    )
