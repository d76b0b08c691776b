"""``moetrace synth``: a made-up trace."""

from pathlib import Path
from typing import Annotated

import typer

from analysis.progress import bar
from analysis.verbs import Force, Json, Quiet, print_json

GROUP = "Record"


def synth(
    out: Annotated[Path, typer.Option("--out", help="Folder to write the trace to, by convention NAME.trace.")],
    layers: Annotated[int, typer.Option(help="MoE layers; they come after one dense layer.")] = 19,
    experts: Annotated[int, typer.Option(help="Experts of a layer.")] = 256,
    top_k: Annotated[int, typer.Option(help="Experts a token takes.")] = 8,
    groups: Annotated[int, typer.Option(help="Groups the experts are divided into; 1 does without.")] = 8,
    topk_group: Annotated[int, typer.Option(help="Groups a token may use.")] = 4,
    score_function: Annotated[str, typer.Option(help="softmax or sigmoid.")] = "sigmoid",
    expert_bias: Annotated[
        bool, typer.Option("--expert-bias/--no-expert-bias", help="A bias that sigmoid routers select with.")
    ] = True,
    routed_scaling_factor: Annotated[float, typer.Option(help="What a token's weights add up to.")] = 2.5,
    expert_bytes: Annotated[int, typer.Option(help="Bytes of one expert.")] = 6291456,
    requests: Annotated[int, typer.Option(help="Prompts.")] = 2,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 40,
    blocks: Annotated[int, typer.Option(help="Blocks to decode a prompt.")] = 4,
    block_length: Annotated[int, typer.Option(help="Tokens of a block.")] = 32,
    accepted_per_step: Annotated[float, typer.Option(help="Mean tokens a denoising step accepts.")] = 2.5,
    kv_cache: Annotated[bool, typer.Option("--kv-cache/--no-kv-cache", help="Prefix KV cache.")] = True,
    temporal: Annotated[float, typer.Option(help="Chance that a position keeps an expert in the next step.")] = 0.9,
    spatial: Annotated[float, typer.Option(help="Chance that a new expert is the left neighbour's.")] = 0.3,
    skew: Annotated[float, typer.Option(help="Popularity of experts goes by 1 / rank ** skew.")] = 0.6,
    level: Annotated[str, typer.Option(help="ids, active or scores: how much of the router scores to keep.")] = "ids",
    tokens: Annotated[bool, typer.Option("--tokens/--no-tokens", help="Write the tokens table.")] = True,
    seed: Annotated[int, typer.Option(help="The same options and seed give the same trace.")] = 0,
    compact: Annotated[
        bool, typer.Option("--compact", help="Smaller weights and scores, which polars and DuckDB cannot read.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a seeded synthetic trace, with the popularity and the consistency of experts that is asked for.

    The defaults have the shape of LLaDA2.0-mini; nothing in it was measured on any model.

    Example: moetrace synth --out made-up.trace --requests 10 --temporal 0.8 --level scores
    """
    from analysis.destinations import destination
    from tracer.parquet import open_trace
    from tracer.summary import describe
    from tracer.synthetic import SyntheticOptions, write_synthetic

    destination(out, "trace", force)
    options = SyntheticOptions(
        layers=layers,
        experts=experts,
        top_k=top_k,
        groups=groups,
        topk_group=topk_group,
        score_function=score_function,
        expert_bias=expert_bias,
        routed_scaling_factor=routed_scaling_factor,
        expert_bytes=expert_bytes,
        requests=requests,
        prompt_tokens=prompt_tokens,
        blocks=blocks,
        block_length=block_length,
        accepted_per_step=accepted_per_step,
        kv_cache=kv_cache,
        temporal=temporal,
        spatial=spatial,
        skew=skew,
        level=level,
        tokens=tokens,
        seed=seed,
    )
    with bar("synth", not (as_json or quiet)) as on_call:
        write_synthetic(out, options, force=force, compact=compact, progress=on_call)
    facts = describe(open_trace(out))
    counts, size = facts["counts"], facts["bytes"]["total"]
    if as_json:
        document = {"trace": str(out), "counts": counts, "bytes": size, "options": facts["provenance"]["options"]}
        print_json(document)
        return
    made = f"{requests} made-up request{'' if requests == 1 else 's'} in {counts['forwards']} forwards"
    typer.echo(f"{out}: {made}, {counts['decisions']:,} decisions, {size / 1e6:.3g} MB")
