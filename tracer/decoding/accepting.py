"""Which masked tokens a denoising step accepts: the rules that decoding loops and replays share.

A rule is a NamedTuple of numbers and arrays; whoever decodes, live or over recorded states, hands it to :func:`accept` with
what a step knows. Sets are uint8 arrays over the B positions of a block. Source: the generate methods of LLaDA2.0's and SDAR's
released code (threshold and quota).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tracer.jit import njit


class AcceptRule(NamedTuple):
    """Threshold and quota, as :func:`accept_rule` makes it."""

    threshold: np.float32
    quotas: np.ndarray  # int64 [steps]; the last one holds for all further steps


def accept_rule(threshold: float, step_quotas: Sequence[int] | np.ndarray) -> AcceptRule:
    """The rule of a threshold and the tokens each step of a block accepts at least."""
    # From 1 on the threshold accepts nothing, whatever a probability rounds to.
    return AcceptRule(np.float32(np.inf if threshold >= 1 else threshold), np.asarray(step_quotas, np.int64))


def quotas(block_length: int, steps: int) -> list[int]:
    """Tokens a block must gain at each of its steps, at least one.

    ``block_length / steps`` where that divides; otherwise the remainder goes to the first steps, as in the released code, so
    that a block is always done within ``steps`` forwards. Steps beyond the block length never happen.
    """
    share, rest = divmod(block_length, steps)
    return [max(1, share + (step < rest)) for step in range(steps)]


@njit
def accept(rule, step, known, confidence, accepted):
    """Accept masked positions strictly above the threshold if they reach the step's quota, else the surest up to the quota.

    Parameters
    ----------
    rule : AcceptRule
    step : int
        Of the block, from 0.
    known : uint8 [B]
        Positions that are not masked; a step accepts none of them.
    confidence : float32 [B]
        Probability of the token that would be written at each position; ties go to the lowest position.
    accepted : uint8 [B]
        Written.
    """
    quota = rule.quotas[min(step, len(rule.quotas) - 1)]
    total = 0
    for j in range(len(known)):
        accepted[j] = not known[j] and confidence[j] > rule.threshold
        total += accepted[j]
    if total >= quota:
        return
    for j in range(len(known)):
        accepted[j] = 0
    for _ in range(quota):
        best = -1
        for j in range(len(known)):
            if not known[j] and not accepted[j] and (best < 0 or confidence[j] > confidence[best]):
                best = j
        if best < 0:
            return
        accepted[best] = 1
