"""``moetrace models``: the published models whose geometry is known."""

from typing import Annotated

import typer

from analysis.verbs import Json, Quiet, print_json, print_table

GROUP = "Look"
COLUMNS = ("name", "num_layers", "num_experts", "top_k", "hidden_size", "moe_intermediate_size", "expert_bytes")


def models(
    name: Annotated[str | None, typer.Argument(help="One of them: every value and its source.", metavar="NAME")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the published models whose geometry is known; with a name, that model's every value and its source.

    Example: moetrace models llada2-mini
    """
    from dataclasses import asdict

    from analysis.listings import values_table
    from analysis.terminal import frame_table, plain
    from simulator.model_presets import load_model_spec, model_names

    specs = [load_model_spec(one) for one in ([name] if name else model_names())]
    if as_json:
        print_json(asdict(specs[0]) if name else [asdict(spec) for spec in specs])
    elif quiet:
        typer.echo("\n".join(spec.name for spec in specs))
    elif name:
        typer.echo(f"{specs[0].name}: {specs[0].description}")
        print_table(
            values_table([(key, plain(getattr(specs[0], key)), text) for key, text in specs[0].sources.items()])
        )
    else:
        rows = [[getattr(spec, column) for column in COLUMNS] for spec in specs]
        print_table(frame_table(COLUMNS, rows, COLUMNS[:1], COLUMNS, folds=0))
        typer.echo("moetrace models NAME has every value and its source.")
