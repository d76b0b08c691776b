"""``moetrace info``: what a trace holds."""

import typer

from analysis.verbs import Json, Quiet, TracePath, counted, print_json, print_table

GROUP = "Look"


def info(trace: TracePath, as_json: Json = False, quiet: Quiet = False) -> None:
    """Say what a trace holds: geometry, counts, sizes, bytes per decision, provenance.

    Example: moetrace info first.trace
    """
    from tracer.parquet import open_trace
    from tracer.summary import describe

    facts = describe(open_trace(trace))
    if as_json:
        print_json(facts)
        return
    if quiet:
        nouns = ("request", "forward", "decision", "step", "assignment")
        counts = [counted(facts["counts"][f"{noun}s"], noun) for noun in nouns if f"{noun}s" in facts["counts"]]
        typer.echo(f"{trace}: {', '.join(counts)}, {facts['bytes']['total'] / 1e6:.3g} MB")
        return
    from analysis.terminal import facts_table

    notes = facts.pop("notes")
    print_table(facts_table(facts), notes)
