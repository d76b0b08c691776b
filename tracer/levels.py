"""What a capture level costs on disk, and which routing policies it rules out."""

from __future__ import annotations

# Routing policies that a trace of the level cannot be replayed under, because they select experts by scores it lacks.
RULED_OUT = {
    "ids": ("block_pool", "des_seq", "des_vote", "dmoe", "expert_choice", "oea", "team", "top_k"),
    "active": ("block_pool", "des_vote", "expert_choice", "team"),
    "scores": (),
}
# Rows of the forward that sizes are told for: a block of the usual length.
USUAL_ROWS = 32


def row_bytes(level: str, num_layers: int, num_experts: int, top_k: int) -> float:
    """Bytes that one row of a forward takes on disk at most, as benchmarks measured them: a row of ``tokens`` and, in every
    layer, ids, weights and scores."""
    scores = {"ids": 0, "active": num_experts / 4, "scores": num_experts}[level]
    return num_layers * (top_k * 1.8 + scores * 3.6) + 12


def level_sentence(level: str, bytes_a_forward: float, rows: int) -> str:
    """How large a forward of ``rows`` rows gets, and what a level below "scores" rules out."""
    size = f"Level {level}: about {as_size(bytes_a_forward)} a forward of {rows} rows"
    if not RULED_OUT[level]:
        return f"{size}."
    return f"{size}; it rules out the routing policies {', '.join(RULED_OUT[level])}, which level scores allows."


def as_size(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
