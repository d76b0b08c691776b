"""``moetrace capture``: decode prompts with a model under the recorder."""

from pathlib import Path
from typing import Annotated

import typer

from analysis.progress import with_bar
from analysis.verbs import Force, Json, Quiet, print_json

GROUP = "Record"


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
        str, typer.Option(help="ids, active or scores: how much of the router scores to keep, none to all.")
    ] = "scores",
    loop: Annotated[
        str, typer.Option(help="auto, llada2, sdar, team (on models like SDAR) or own (generate).")
    ] = "auto",
    kv_cache: Annotated[bool | None, typer.Option("--kv-cache/--no-kv-cache", help="Prefix KV cache.")] = None,
    block_length: Annotated[int | None, typer.Option(help="Tokens of a block.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps a block; sets the quota block_length/steps.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Accept tokens whose probability is above it.", show_default="0.95")
    ] = None,
    gen_length: Annotated[int, typer.Option(help="Tokens to generate a prompt.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the most probable token.", show_default="0")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of sampling, random prompts and random weights.")] = 0,
    mask_id: Annotated[int | None, typer.Option(help="The mask token, where model and family do not say.")] = None,
    eos_id: Annotated[int | None, typer.Option(help="The token that ends a text.")] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="module:function that reads routers of an unknown kind.", metavar="MODULE:FUNCTION"),
    ] = None,
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

    Example: moetrace capture demo:llada2 --out first.trace --prompt "def main("
    """
    given = dict(locals())
    from dataclasses import fields

    from analysis.destinations import destination
    from tracer.capture import run_capture
    from tracer.capture_plan import CaptureOptions, plan_capture
    from tracer.prompts import gather_prompts

    destination(out, "trace", force, resume)
    options = CaptureOptions(**{field.name: given[field.name] for field in fields(CaptureOptions)})
    plan = plan_capture(model, out, gather_prompts(prompts, prompt, prompt_tokens, limit), options)
    shown = not (as_json or quiet)
    if shown:
        typer.echo(plan.sentence, err=True)
    result = with_bar(run_capture, plan, shown)
    if as_json:
        print_json(result.to_json())
    else:
        typer.echo(result.sentence)
    if result.interrupted:
        raise typer.Exit(130)
