"""``moetrace profile``: this machine as a hardware preset."""

from pathlib import Path
from typing import Annotated

import typer

from analysis.progress import bar
from analysis.verbs import Force, Json, Quiet, print_json, print_table

GROUP = "Record"


def profile(
    out: Annotated[Path, typer.Option(help="A .toml file that --hardware takes.")],
    gpu: Annotated[str | None, typer.Option(help="A GPU preset to stand beside this host where it has none.")] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure this machine into a hardware preset: memory and drive bandwidth, expert latency against tokens.

    Example: moetrace profile --out my.toml --gpu rtx-4090
    """
    from analysis.destinations import destination, make_parents
    from analysis.terminal import frame_table
    from simulator.profile import write_profile

    destination(out, "file", force)
    make_parents(out)
    with bar("profile", not (as_json or quiet)) as on_step:
        measured = write_profile(out, force=force, progress=on_step, gpu=gpu)
    if as_json:
        print_json(measured)
        return
    if not quiet:
        print_table(frame_table(("value", "measured"), measured["values"].items()), measured["notes"])
    typer.echo(f"{out} is ready for --hardware")
