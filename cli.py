"""The command line: parse, call, print. Everything heavy is imported inside the commands."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from analysis.progress import bar, with_bar
from analysis.verbs.synth import synth


class Verbs(TyperGroup):
    """The verb list; turns an error the user can mend into one sentence and exit code 2 (``--debug`` shows the traceback)."""

    def parse_args(self, ctx, args):
        self.debug = "--debug" in args
        return super().parse_args(ctx, [a for a in args if a != "--debug"])

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
    from tracer.errors import UserError

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name in ("torch", "transformers", "safetensors", "tokenizers"):
        return f"This verb runs a model and needs {error.name}; install it with pip install 'moetrace[capture]'."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    return None


app = typer.Typer(
    cls=Verbs,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
    help="Record what the routers of mixture-of-experts diffusion language models decide, and replay it under other "
    "policies, memory budgets and machines. Every verb takes --help; --debug shows the traceback of an error.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
HARDWARE = (
    "NAME, FILE.toml or NAME:key=value,... with other parts (gpu, cpu, dram, nvme, line), as line=sglang, or overlap=true or "
    "host_gib=GIB; moetrace hardware lists them."
)
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar, no table; one line, or the names of a list.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is already there.")]
TracePath = Annotated[Path, typer.Argument(help="A trace folder.", metavar="TRACE")]


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"moetrace {installed('moetrace')}")
        raise typer.Exit()


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=1))


@app.command()
def capture(
    model: Annotated[
        str,
        typer.Argument(
            help="demo:llada2, demo:sdar, a local folder, a hub id, or random:CONFIG.json.", metavar="MODEL"
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write the trace to, by convention NAME.trace.")],
    prompts: Annotated[Path | None, typer.Option(help="A .txt (a prompt a line), .jsonl or .parquet file.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Random prompts of N tokens (for random weights).")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N prompts.")] = None,
    level: Annotated[
        str, typer.Option(help="ids, active or scores: how much of the router scores to keep.")
    ] = "active",
    loop: Annotated[str, typer.Option(help="auto, llada2, sdar or own (the model's own generate).")] = "auto",
    kv_cache: Annotated[bool | None, typer.Option("--kv-cache/--no-kv-cache", help="Prefix KV cache.")] = None,
    block_length: Annotated[int | None, typer.Option(help="Tokens of a block.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps a block; sets the quota block_length/steps.")
    ] = None,
    threshold: Annotated[float, typer.Option(help="Accept tokens whose probability is above it.")] = 0.95,
    gen_length: Annotated[int, typer.Option(help="Tokens to generate a prompt.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling, random prompts and random weights.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default float32 on a CPU.")] = None,
    device_map: Annotated[
        str | None, typer.Option(help="Spread the model over devices, as in from_pretrained.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the checkpoint's own code.")
    ] = False,
    keep_text: Annotated[bool, typer.Option("--keep-text", help="Store the prompts' text in the trace.")] = False,
    compact: Annotated[
        bool, typer.Option("--compact", help="Smaller weights and scores, which polars and DuckDB cannot read.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last finished prompt.")] = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Decode prompts with a model and record what its routers select.

    Example: moetrace capture demo:llada2 --out first.trace --prompt "def main(" --level scores
    """
    from analysis.destinations import destination
    from tracer.capture import run_capture
    from tracer.capture_plan import CaptureOptions, plan_capture
    from tracer.prompts import gather_prompts

    destination(out, "trace", force, resume)
    options = CaptureOptions(
        level=level,
        loop=loop,
        kv_cache=kv_cache,
        block_length=block_length,
        steps=steps,
        threshold=threshold,
        gen_length=gen_length,
        temperature=temperature,
        seed=seed,
        keep_text=keep_text,
        compact=compact,
        force=force,
        resume=resume,
        device=device,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
    )
    plan = plan_capture(model, out, gather_prompts(prompts, prompt, prompt_tokens, limit), options)
    shown = not (as_json or quiet)
    if shown:
        typer.echo(plan.sentence, err=True)
    result = with_bar(run_capture, plan, shown)
    if as_json:
        _print_json(result.to_json())
    else:
        typer.echo(result.sentence)
    if result.interrupted:
        raise typer.Exit(130)


def _write_page(out: Path, **contents) -> Path:
    from analysis.destinations import make_parents
    from analysis.report import write_report

    make_parents(out)
    return write_report(out, **contents)


@app.command()
def info(trace: TracePath, as_json: Json = False, quiet: Quiet = False) -> None:
    """Say what a trace holds: geometry, counts, sizes, bytes per decision, provenance.

    Example: moetrace info first.trace
    """
    from tracer.parquet import open_trace
    from tracer.summary import describe

    facts = describe(open_trace(trace))
    if as_json:
        _print_json(facts)
        return
    if quiet:
        nouns = ("request", "forward", "decision", "step", "assignment")
        counts = [_count(facts["counts"][f"{noun}s"], noun) for noun in nouns if f"{noun}s" in facts["counts"]]
        typer.echo(f"{trace}: {', '.join(counts)}, {facts['bytes']['total'] / 1e6:.3g} MB")
        return
    from analysis.tables import show
    from analysis.terminal import facts_table

    notes = facts.pop("notes")
    show(facts_table(facts))
    for note in notes:
        typer.echo(note)


@app.command()
def check(trace: TracePath, as_json: Json = False, quiet: Quiet = False) -> None:
    """Hold a trace against every requirement of the format; exit code 1 and the first faults if it breaks any.

    Example: moetrace check first.trace
    """
    from tracer.check import check as find_faults
    from tracer.parquet import open_trace

    if not (trace / "meta.json").is_file():
        # No trace at all is the caller's mistake, not a fault of a trace; opening says which.
        open_trace(trace)
    faults = find_faults(trace)
    if as_json:
        _print_json({"trace": str(trace), "faults": faults})
    else:
        for fault in faults if not quiet else ():
            typer.echo(fault)
        if faults and quiet:
            typer.echo(f"{trace}: {_count(len(faults), 'fault')}.")
        elif not faults:
            typer.echo(f"{trace}: every requirement of the format holds.")
    if faults:
        raise typer.Exit(1)


@app.command()
def replay(
    trace: TracePath,
    routing: Annotated[list[str], typer.Option(help="A routing policy, name:key=value,...; repeatable.")] = ["vanilla"],  # noqa: B006
    residency: Annotated[list[str], typer.Option(help="A residency policy, likewise.")] = ["all_resident"],  # noqa: B006
    hardware: Annotated[list[str] | None, typer.Option(help=f"{HARDWARE} Repeatable.")] = None,
    fit: Annotated[Path | None, typer.Option(help="The trace that static counts popularity on; else TRACE.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for replay.parquet and replay.json.")] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Replay a trace under routing policies x residency policies x hardware, routing outermost.

    Example: moetrace replay first.trace --routing vanilla --routing dmoe:top_p=0.6 --residency tide:budget=16
    """
    from analysis.destinations import destination
    from analysis.tables import show
    from analysis.terminal import every_kind, run_table
    from simulator.replay import replay as run_replay
    from simulator.residency.static import fitted
    from tracer.parquet import open_trace

    if out is not None:
        destination(out, "replay", force)
    opened = open_trace(trace)
    residency = fitted(residency, fit) if fit is not None else residency
    names = [(one, other) for one, other, _ in product(routing, residency, hardware or [""])]
    result = _run_replay(run_replay, opened, routing, residency, hardware, not (as_json or quiet))
    if out is not None:
        result.write(out, force=force)
    if as_json:
        _print_json(result.to_json())
        return
    if not quiet:
        show(run_table([(opened.meta.model.id, names, result)]))
        if any(every_kind(one.summary) for one in result.runs):
            typer.echo("experts/layer: over forwards of every kind, as none of this trace denoises.")
        for note in _notes(result):
            typer.echo(note)
    typer.echo(_count(len(result.runs), "run") + (f", written to {out}" if out is not None else ""))


def _run_replay(run_replay, opened, routing, residency, hardware, shown: bool):
    with bar("replay", shown) as on_segment:
        return run_replay(opened, routing, residency, hardware=hardware or None, progress=on_segment)


def _notes(*results) -> list[str]:
    """Every note of every run once, in order."""
    return list(dict.fromkeys(note for result in results for run in result.to_json()["runs"] for note in run["notes"]))


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(help="Folder to make; by default moetrace-demo, moetrace-demo-2, ...")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole job in one go, offline: capture both bundled models, replay vanilla, TEAM, dMoE and TIDE, write report.html.

    Example: moetrace demo
    """
    from analysis.destinations import new_folder
    from analysis.report import write_report
    from analysis.tables import show
    from analysis.terminal import run_table
    from simulator.replay import replay as run_replay
    from tracer.capture import run_capture
    from tracer.capture_plan import DEMO_OPTIONS, demo_prompts, plan_capture
    from tracer.parquet import open_trace

    shown = not (as_json or quiet)
    folder = new_folder(out, DEMO_FOLDER)
    traces, results = [], []
    for name in ("llada2", "sdar"):
        path = folder / f"{name}.trace"
        plan = plan_capture(f"demo:{name}", path, demo_prompts(), DEMO_OPTIONS)
        captured = with_bar(run_capture, plan, shown)
        if shown:
            typer.echo(captured.sentence)
        opened = open_trace(path)
        result = _run_replay(run_replay, opened, DEMO_ROUTING, DEMO_RESIDENCY, "h100-pcie5", shown)
        result.write(folder / f"{name}.replay")
        traces.append(opened)
        results.append(result)
    with bar("report", shown):
        report = write_report(folder / "report.html", traces=traces, results=results)
    if as_json:
        runs = {t.meta.model.id: r.to_json() for t, r in zip(traces, results, strict=True)}
        _print_json({"report": str(report), "replays": runs})
        return
    if not quiet:
        names = list(product(DEMO_ROUTING, DEMO_RESIDENCY))
        show(run_table([(t.meta.model.id, names, r) for t, r in zip(traces, results, strict=True)]), "the report")
        typer.echo("Rows in italics are estimates: other experts or other forwards than the recorded ones.")
        typer.echo("held: expert weights in fast memory at most; a cache that loads on demand may outgrow its budget.")
    typer.echo(f"The report is {report.resolve()}" if shown else str(report))


@app.command()
def consistency(
    trace: TracePath,
    out: Annotated[Path | None, typer.Option(help="Write a page of charts here.")] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say how stable routing is in time and space, each figure beside the null that is hardest to beat.

    Example: moetrace consistency first.trace --out charts.html
    """
    from analysis.destinations import destination
    from analysis.metrics import consistency as measure
    from analysis.tables import show
    from analysis.terminal import headline_table
    from tracer.parquet import open_trace

    if out is not None:
        destination(out, "file", force)
    opened = open_trace(trace)
    with bar("consistency", not (as_json or quiet), opened.num_forwards) as on_segment:
        result = measure(opened, progress=on_segment)
    page = None if out is None else _write_page(out, traces=[opened], consistency=[result], force=force)
    if as_json:
        _print_json(result.to_json())
        return
    if not quiet:
        show(headline_table(result.headline()))
        for note in [*result.notes, *(f"{name}: {reason}" for name, reason in result.reasons.items())]:
            typer.echo(note)
    typer.echo(f"{trace}: {len(result.frames)} tables" + (f", charts in {page}" if page else ""))


@app.command()
def report(
    sources: Annotated[list[Path], typer.Argument(help="Traces and folders written by replay --out.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write one self-contained page about traces and replays.

    Example: moetrace report first.trace result --out report.html
    """
    from analysis.destinations import destination
    from analysis.summary import read_replay
    from tracer.parquet import open_trace

    destination(out, "file", force)
    results = [path for path in sources if (path / "replay.json").is_file()]
    traces = [open_trace(path) for path in sources if path not in results]
    with bar("report", not (as_json or quiet)):
        page = _write_page(out, traces=traces, results=[read_replay(path) for path in results], force=force)
    if as_json:
        _print_json({"report": str(page), "traces": len(traces), "replays": len(results)})
        return
    typer.echo(str(page) if quiet else f"The report is {page.resolve()}")


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="A trace, or a folder written by replay --out.", metavar="A")],
    b: Annotated[Path, typer.Argument(help="Another of the same kind.", metavar="B")],
    limit: Annotated[int, typer.Option(min=1, help="Rows to print.")] = 30,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two traces or two replays, the differences that matter first.

    Example: moetrace diff first.trace second.trace
    """
    from analysis.diff import diff as compare
    from analysis.tables import show
    from analysis.terminal import frame_table

    result = compare(a, b)
    if as_json:
        _print_json(result.to_json())
        return
    if not quiet:
        columns = ("part", "figure", "a", "b", "difference")
        rows = ([row[column] for column in columns] for row in result.differing[:limit])
        show(frame_table(columns, rows, columns[:4], ("figure", "a", "b", "difference", "part"), 14))
        for note in result.notes:
            typer.echo(note)
    typer.echo(result.sentence())


@app.command()
def interval(
    trace: TracePath,
    budget: Annotated[int, typer.Option(help="Experts a layer keeps on the GPU.")],
    hardware: Annotated[str, typer.Option(help=HARDWARE)] = "h100-pcie5",
    copy_back: Annotated[
        bool, typer.Option("--copy-back/--no-copy-back", help="Demoted experts cross the bus.")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="Write a page of charts here.")] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose TIDE's refresh interval: its program with measured drift, the replayed optimum, the regret.

    Example: moetrace interval first.trace --budget 24 --hardware h100-pcie5 --out interval.html
    """
    from analysis.destinations import destination
    from analysis.tables import show
    from analysis.terminal import INTERVAL_ORDER, frame_table
    from simulator.interval import find_interval
    from tracer.parquet import open_trace

    if out is not None:
        destination(out, "file", force)
    with bar("interval", not (as_json or quiet)) as on_segment:
        opened = open_trace(trace)
        result = find_interval(opened, budget, hardware, copy_back, progress=on_segment)
    found = {"traces": [opened], "consistency": [None], "intervals": [result]}
    page = None if out is None else _write_page(out, **found, force=force)
    if as_json:
        _print_json(result.to_json())
        return
    if not quiet:
        frame = result.frame
        show(frame_table(frame.columns, frame.iter_rows(), INTERVAL_ORDER[:1], INTERVAL_ORDER))
        for note in result.notes:
            typer.echo(note)
    typer.echo(
        f"The program chooses {result.program} (drift {result.drift:.3f} a step), replaying finds {result.best} fastest; "
        f"regret {100 * result.regret:.1f}%" + (f"; charts in {page}" if page else "")
    )


@app.command()
def sweep(
    trace: TracePath,
    out: Annotated[Path, typer.Option(help="The Parquet file of results; runs it holds are not computed again.")],
    routing: Annotated[list[str], typer.Option(help="Grids inside: dmoe:top_p=0.4|0.6.")] = ["vanilla"],  # noqa: B006
    residency: Annotated[list[str], typer.Option(help="tide:budget=16|32.")] = ["all_resident"],  # noqa: B006
    hardware: Annotated[list[str] | None, typer.Option(help=f"{HARDWARE} Repeatable.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; by default one a processor.")] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Replay a trace over grids of policies, keep every run in Parquet, print the Pareto front.

    Example: moetrace sweep first.trace --residency "tide:budget=16|32,refresh_interval=1..8" --out results.parquet
    """
    from analysis.destinations import destination
    from analysis.tables import show
    from analysis.terminal import ALL_KINDS, SWEEP_COLUMNS, SWEEP_ORDER, frame_table
    from simulator.pareto import pareto
    from simulator.sweep import sweep as run_sweep
    from tracer.parquet import open_trace

    destination(out, "results", force)
    with bar("sweep", not (as_json or quiet)) as on_segment:
        opened = open_trace(trace)
        result = run_sweep(
            opened,
            routing,
            residency,
            hardware or None,
            out=out,
            workers=workers,
            progress=on_segment,
            force=force,
        )
    front = pareto(result.frame)
    if as_json:
        _print_json({"results": str(result.path), "runs": len(result.rows), "pareto": front.to_dicts()})
        return
    if not quiet:
        columns = [name for name in SWEEP_COLUMNS if name in front.columns and front[name].null_count() < front.height]
        if "unique_experts" in columns:
            columns = [name for name in columns if name != f"unique_experts{ALL_KINDS}"]
        show(frame_table(columns, front.select(columns).iter_rows(), SWEEP_COLUMNS[:3], SWEEP_ORDER), str(result.path))
        for note in opened.notes:
            typer.echo(note)
    typer.echo(
        f"{result.path}: {len(result.rows)} runs, {result.computed} computed now; {front.height} of them on the Pareto front"
    )


@app.command()
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
    from analysis.tables import show
    from analysis.terminal import parallel_table
    from simulator.expert_placement import PLACEMENTS
    from simulator.parallel import parallel_runs
    from tracer.parquet import open_trace

    with bar("parallel", not (as_json or quiet)) as on_policy:
        runs = parallel_runs(open_trace(trace), routing, gpus, placement or PLACEMENTS, progress=on_policy)
    if as_json:
        _print_json({"runs": runs})
        return
    if not quiet:
        specs = [spec for spec, _, _ in product(routing, gpus, placement or PLACEMENTS)]
        decodes = any(run["imbalance"] is not None for run in runs)
        show(parallel_table(specs, runs, "" if decodes else "_all_forwards"))
        for note in dict.fromkeys(note for run in runs for note in run["notes"]):
            typer.echo(note)
        calls = "denoise forward" if decodes else "forward of any kind, as none denoises,"
        typer.echo(f"Imbalance: tokens of the fullest GPU over the mean, each {calls} and layer.")
    typer.echo(_count(len(runs), "group"))


@app.command()
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
    from analysis.tables import show
    from analysis.terminal import frame_table
    from simulator.profile import write_profile

    destination(out, "file", force)
    make_parents(out)
    with bar("profile", not (as_json or quiet)) as on_step:
        measured = write_profile(out, force=force, progress=on_step, gpu=gpu)
    if as_json:
        _print_json(measured)
        return
    if not quiet:
        show(frame_table(("value", "measured"), measured["values"].items()))
        for note in measured["notes"]:
            typer.echo(note)
    typer.echo(f"{out} is ready for --hardware")


@app.command("import")
def import_trace(
    format: Annotated[str, typer.Argument(help="bigmoe: BigMoeOnEdge route traces.", metavar="FORMAT")],
    source: Annotated[Path, typer.Argument(help="The foreign file.", metavar="SRC")],
    out: Annotated[Path, typer.Option(help="Folder to write the trace to.")],
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn another tool's routing dump into a trace.

    Example: moetrace import bigmoe qwen.route.csv --out qwen.trace
    """
    from importlib import import_module

    from analysis.destinations import destination
    from tracer.errors import UserError
    from tracer.importers import FORMATS

    destination(out, "trace", force)
    if format not in FORMATS:
        raise UserError(f"There is no importer for '{format}'; there are {', '.join(FORMATS)}.")
    decisions = getattr(import_module(f"tracer.importers.{format}"), f"import_{format}")(source, out, force=force)
    if as_json:
        _print_json({"trace": str(out), "decisions": decisions})
        return
    typer.echo(str(out) if quiet else f"{out}: {decisions} decisions")


app.command()(synth)


@app.command()
def policies(as_json: Json = False, quiet: Quiet = False) -> None:
    """List the policies of every axis with their parameters, defaults and sources.

    Example: moetrace policies
    """
    from dataclasses import asdict

    from analysis.listings import policy_table
    from analysis.tables import show
    from simulator.registry import list_policies

    found = [(axis, policy) for axis in ("acceptance", "routing", "residency") for policy in list_policies(axis)]
    if as_json:
        _print_json([{"axis": axis, **asdict(policy)} for axis, policy in found])
    elif quiet:
        typer.echo("\n".join(f"{axis} {policy.name}" for axis, policy in found))
    else:
        show(policy_table(found))


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="One of them: every value and its source.", metavar="NAME")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the published models whose geometry is known; with a name, that model's every value and its source.

    Example: moetrace models llada2-mini
    """
    from dataclasses import asdict

    from analysis.listings import model_table, model_values
    from analysis.tables import show
    from simulator.model_presets import load_model_spec, model_names

    specs = [load_model_spec(one) for one in ([name] if name else model_names())]
    if as_json:
        _print_json(asdict(specs[0]) if name else [asdict(spec) for spec in specs])
    elif quiet:
        typer.echo("\n".join(spec.name for spec in specs))
    elif name:
        typer.echo(f"{specs[0].name}: {specs[0].description}")
        show(model_values(specs[0]))
    else:
        show(model_table(specs))
        typer.echo("moetrace models NAME has every value and its source.")


@app.command()
def hardware(
    name: Annotated[
        str | None, typer.Argument(help="A machine, or a part as gpu=h200: every value and its source.", metavar="NAME")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the machines and parts that --hardware takes; with a name, that one's every value and its source.

    Example: moetrace hardware h100-pcie5
    """
    from dataclasses import asdict

    from analysis.listings import HOW, hardware_values, machine_table, part_table
    from analysis.tables import show
    from simulator.presets import PARTS, find_hardware, list_hardware, list_parts
    from simulator.pricing import split_spec

    if name:
        # KIND=NAME has no colon, and neither is it a machine with options.
        found = [find_hardware(*split_spec(name))]
    else:
        found = [*list_hardware(), *(part for kind in PARTS for part in list_parts(kind))]
    machines = [info for info in found if info.kind == "machine"]
    if as_json:
        _print_json(asdict(found[0]) if name else [asdict(info) for info in found])
    elif quiet:
        typer.echo("\n".join(info.spec for info in found))
    elif name:
        typer.echo(f"{found[0].spec}: {found[0].line}")
        show(hardware_values(found[0]))
    else:
        show(machine_table(machines))
        typer.echo()
        show(part_table([info for info in found if info not in machines]))
        typer.echo(HOW)


DEMO_ROUTING = ["vanilla", "team", "dmoe"]
DEMO_RESIDENCY = ["all_resident", "lru:budget=24", "tide:budget=24,refresh_interval=4"]
DEMO_FOLDER = "moetrace-demo"


if __name__ == "__main__":
    app()
