"""``moetrace hardware``: machines and parts."""

from typing import Annotated

import typer

from analysis.verbs import Json, Quiet, print_json, print_table

GROUP = "Look"


def hardware(
    name: Annotated[
        str | None, typer.Argument(help="A machine, or a part as gpu=h200: every value and its source.", metavar="NAME")
    ] = None,
    toml: Annotated[bool, typer.Option("--toml", help="Print the machine as a file to start your own from.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the machines and parts that --hardware takes; with a name, that one's every value and its source.

    Example: moetrace hardware h100-pcie5
    """
    from dataclasses import asdict

    from analysis.listings import HOW, hardware_values, machine_table, part_table
    from simulator.presets import PARTS, find_hardware, hardware_text, list_hardware, list_parts
    from simulator.pricing import hardware_options
    from tracer.errors import UserError

    if name:
        # KIND=NAME has no colon, and neither is it a machine with options.
        listed = [find_hardware(*hardware_options(name))]
    else:
        listed = [*list_hardware(), *(part for kind in PARTS for part in list_parts(kind))]
    if toml:
        if not name:
            raise UserError("--toml prints one machine; name it, as moetrace hardware h100 --toml.")
        typer.echo(hardware_text(listed[0]), nl=False)
        return
    machines = [info for info in listed if info.kind == "machine"]
    if as_json:
        print_json(asdict(listed[0]) if name else [asdict(info) for info in listed])
    elif quiet:
        typer.echo("\n".join(info.spec for info in listed))
    elif name:
        typer.echo(f"{listed[0].spec}: {listed[0].line}")
        print_table(hardware_values(listed[0]))
    else:
        print_table(machine_table(machines))
        typer.echo()
        print_table(part_table([info for info in listed if info not in machines]))
        typer.echo(HOW)
