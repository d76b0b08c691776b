"""Which masked tokens a denoising step accepts, and what it would write: the rule LLaDA2 and SDAR share.

Source: the generate methods of LLaDA2.0's and SDAR's released code (threshold and quota per step).
"""

from __future__ import annotations

import torch


def accept(probability: torch.Tensor, masked: torch.Tensor, threshold: float, quota: int) -> torch.Tensor:
    """Rows accepted by a step.

    Parameters
    ----------
    probability : float [R]
        Of the token that would be written at each row.
    masked : bool [R]
        Rows that may be accepted.
    threshold : float
        Rows strictly above it are accepted, if they are at least ``quota``; from 1 on never.
    quota : int
        Otherwise the ``quota`` masked rows of highest probability are accepted (all, if fewer are masked); ties go to the
        lowest row.

    Returns
    -------
    bool [R]
    """
    high = masked & (probability > threshold)
    if threshold < 1 and int(high.sum()) >= quota:
        return high
    ranked = probability.float().masked_fill(~masked, -1.0).argsort(descending=True, stable=True)
    chosen = torch.zeros_like(masked)
    chosen[ranked[:quota]] = True
    return chosen & masked


def predict(
    logits: torch.Tensor, mask_id: int, temperature: float, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The token to write at each row, its probability, the most probable token and its probability.

    Parameters
    ----------
    logits : float [R, V]
    mask_id : int
        Never chosen, so that every accepted row leaves the mask; probabilities are of the whole vocabulary all the same.
    temperature : float
        0 takes the most probable token of softmax(logits); above 0 a token is drawn from softmax(logits / temperature), which
        then is the distribution of both probabilities.
    generator : torch.Generator, optional
        Of the draw, on the device of ``logits``.

    Returns
    -------
    tuple of (int64 [R], float32 [R], int64 [R], float32 [R])
    """
    scaled = logits.float() / temperature if temperature > 0 else logits.float()
    distribution = scaled.softmax(dim=-1)
    choosable = distribution.clone()
    choosable[:, mask_id] = 0.0
    best_probability, best = choosable.max(dim=-1)
    if temperature == 0:
        return best, best_probability, best, best_probability
    drawn = torch.multinomial(choosable, 1, generator=generator)
    return drawn.squeeze(-1), distribution.gather(-1, drawn).squeeze(-1), best, best_probability
