"""``moetrace policies``: the policies of every axis."""

import typer

from analysis.verbs import Json, Quiet, print_json, print_table

GROUP = "Look"


def policies(as_json: Json = False, quiet: Quiet = False) -> None:
    """List the policies of every axis with their parameters, defaults and sources.

    Example: moetrace policies
    """
    from dataclasses import asdict

    from analysis.terminal import frame_table
    from simulator.registry import list_policies

    listed = [(axis, policy) for axis in ("acceptance", "routing", "residency") for policy in list_policies(axis)]
    if as_json:
        print_json([{"axis": axis, **asdict(policy)} for axis, policy in listed])
    elif quiet:
        typer.echo("\n".join(f"{axis} {policy.name}" for axis, policy in listed))
    else:
        columns = ("axis", "name", "what it does", "parameters", "source")
        rows = []
        for axis, policy in listed:
            parameters = ", ".join(k if v is None else f"{k}={v}" for k, v in policy.parameters.items())
            rows.append((axis, policy.name, policy.line, parameters, policy.source))
        print_table(frame_table(columns, rows, columns[:2], ("name", "axis", *columns[2:])))
