"""How many tokens a step accepts at least: the rule that decoding loops and replays share.

Source: the generate methods of LLaDA2.0's and SDAR's released code.
"""

from __future__ import annotations


def quotas(block_length: int, steps: int) -> list[int]:
    """Tokens a block must gain at each of its steps, at least one.

    ``block_length / steps`` where that divides; otherwise the remainder goes to the first steps, as in the released code, so
    that a block is always done within ``steps`` forwards. Steps beyond the block length never happen.
    """
    share, rest = divmod(block_length, steps)
    return [max(1, share + (step < rest)) for step in range(steps)]
