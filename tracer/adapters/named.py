"""A router's reader by the name a command line gives it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

from tracer.errors import UserError


def named_adapter(name: str) -> Callable:
    """The callable that ``module:function`` names; modules of the working directory count.

    Raises
    ------
    UserError
        Not of that form, no such module, or nothing callable under that name.
    """
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise UserError(f"An adapter is named as module:function, not '{name}'.")
    sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"The adapter's module {module_name} could not be imported: {error}.") from error
    finally:
        sys.path.remove("")
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"The module {module_name} has no function {function_name} to read routers with.")
    return function
