"""``moetrace parallel``: the load of expert-parallel groups."""

from itertools import product
from typing import Annotated

import typer

from analysis.progress import bar
from analysis.verbs import Json, Quiet, TracePath, counted, print_json, print_table

GROUP = "Ask"


def parallel(
    trace: TracePath,
    gpus: Annotated[list[int], typer.Option(min=1, help="GPUs of a group; repeatable.")] = [2, 4, 8],  # noqa: B006
    routing: Annotated[list[str], typer.Option(help="A routing policy; repeatable.")] = ["vanilla"],  # noqa: B006
    placement: Annotated[
        list[str] | None, typer.Option(help="contiguous, round_robin or balanced; repeatable, all by default.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say how evenly expert-parallel groups of GPUs are loaded: each holds a share of every layer's experts.

    Example: moetrace parallel first.trace --gpus 4 --gpus 8 --routing vanilla --routing dmoe
    """
    from analysis.terminal import parallel_table
    from simulator.expert_placement import PLACEMENTS
    from simulator.parallel import parallel_runs
    from tracer.parquet import open_trace

    with bar("parallel", not (as_json or quiet)) as on_policy:
        runs = parallel_runs(open_trace(trace), routing, gpus, placement or PLACEMENTS, progress=on_policy)
    if as_json:
        print_json({"runs": runs})
        return
    if not quiet:
        specs = [spec for spec, _, _ in product(routing, gpus, placement or PLACEMENTS)]
        decodes = any(run["imbalance"] is not None for run in runs)
        sheet = parallel_table(specs, runs, "" if decodes else "_all_forwards")
        print_table(sheet, (note for run in runs for note in run["notes"]))
        calls = "denoise forward" if decodes else "forward of any kind, as none denoises,"
        typer.echo(f"Imbalance: tokens of the fullest GPU over the mean, each {calls} and layer.")
    typer.echo(counted(len(runs), "group"))
