"""The command line: finds the verbs by file, and turns errors into sentences.

A verb is a file ``analysis/verbs/NAME.py`` with one function of that name (``import_`` for ``import``), whose docstring is its
help, and ``GROUP``, the heading it stands under. Everything heavy is imported inside these functions.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tracer.errors import UserError, unknown
from tracer.packages import modules_in

GROUPS = ("Record", "Look", "Ask", "Bring in and out")
MODELS_NEED = ("torch", "transformers", "safetensors", "tokenizers")


class Verbs(TyperGroup):
    """The verb list; turns an error the user can mend into one sentence and exit code 2 (``--debug`` shows the traceback)."""

    def parse_args(self, ctx, args):
        self.debug = "--debug" in args
        return super().parse_args(ctx, [a for a in args if a != "--debug"])

    def resolve_command(self, ctx, args):
        if args[0] not in self.commands:
            raise unknown("verb", args[0], self.commands)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx, formatter):
        widest = max(map(len, self.commands))
        commands: dict[str, Any] = dict(self.commands)
        for group in GROUPS:
            verbs = [(name, verb) for name, verb in commands.items() if verb.rich_help_panel == group]
            with formatter.section(group):
                room = formatter.width - 6 - widest
                formatter.write_dl([(name.ljust(widest), verb.get_short_help_str(room)) for name, verb in verbs])

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            sentence = _sentence(error)
            if self.debug or sentence is None:
                raise
            typer.echo(f"moetrace: {sentence}", err=True)
            raise typer.Exit(2) from None


def _sentence(error: Exception) -> str | None:
    """What to tell the user of an error they can mend; None for any other."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name in MODELS_NEED:
        return f"This verb runs a model and needs {error.name}; install it with pip install 'moetrace[capture]'."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    return None


app = typer.Typer(
    cls=Verbs,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Record what the routers of mixture-of-experts diffusion language models decide, and replay it under other "
    "policies, memory budgets and machines. Every verb takes --help; --debug shows the traceback of an error.",
)


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Answer ``--version``."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"moetrace {installed('moetrace')}")
        raise typer.Exit()


for _name in modules_in(Path(__file__).parent / "analysis" / "verbs"):
    _verb = import_module(f"analysis.verbs.{_name}")
    app.command(_name.rstrip("_"), rich_help_panel=_verb.GROUP)(getattr(_verb, _name))


if __name__ == "__main__":
    app()
