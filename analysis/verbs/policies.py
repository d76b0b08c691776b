"""``moetrace policies``: the policies of every axis."""

import typer

from analysis.verbs import Json, Quiet, print_json, print_table

GROUP = "Look"


def policies(as_json: Json = False, quiet: Quiet = False) -> None:
    """List the policies of every axis with their parameters, defaults and sources.

    Example: moetrace policies
    """
    from dataclasses import asdict

    from analysis.listings import policy_table
    from simulator.registry import list_policies

    found = [(axis, policy) for axis in ("acceptance", "routing", "residency") for policy in list_policies(axis)]
    if as_json:
        print_json([{"axis": axis, **asdict(policy)} for axis, policy in found])
    elif quiet:
        typer.echo("\n".join(f"{axis} {policy.name}" for axis, policy in found))
    else:
        print_table(policy_table(found))
