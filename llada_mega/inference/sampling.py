"""Candidates for masked positions and the rule that accepts some of them.

Legend: R masked positions of the current block, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llada_mega.diffusion.random import Stream, uniform


def transfer_schedule(block_size: int, steps: int) -> list[int]:
    """Tokens to accept in each of ``steps`` denoising steps: block_size // steps, the remainder in the first steps."""
    share, remainder = divmod(block_size, steps)
    return [share + (step < remainder) for step in range(steps)]


def draw_candidates(
    logits_RV: Tensor, positions_R: Tensor, *, step: int, seed: int, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    """One candidate token for each masked position, and its probability.

    At temperature 0 the candidate is the most probable token. Otherwise it is drawn from softmax(logits / temperature)
    cut to the smallest set of tokens whose probabilities reach ``top_p``, by one uniform number that depends on nothing
    but (seed, step, position). The probability is that under the distribution drawn from.

    Args:
        logits_RV: float; -inf where a token is not allowed.
        positions_R: int64, absolute positions.
        step: denoising step inside the block.
        temperature: >= 0.
        top_p: in (0, 1].
    Returns:
        token ids int64 [R] and probabilities float64 [R].
    """
    if temperature == 0.0:
        probability_R, token_R = logits_RV.double().softmax(-1).max(-1)
        return token_R, probability_R
    probability_RV = (logits_RV.double() / temperature).softmax(-1)
    sorted_RV, token_RV = probability_RV.sort(dim=-1, descending=True, stable=True)
    if top_p < 1.0:
        before_RV = sorted_RV.cumsum(-1) - sorted_RV
        sorted_RV = sorted_RV.masked_fill(before_RV >= top_p, 0.0)
    cumulative_RV = sorted_RV.cumsum(-1)
    total_R = cumulative_RV[:, -1]
    draw_R = uniform(seed, Stream.GENERATION, step, positions_R.cpu()).to(total_R) * total_R
    rank_R1 = torch.searchsorted(cumulative_RV, draw_R[:, None], right=True)
    rank_R1 = rank_R1.minimum((sorted_RV > 0).sum(-1, keepdim=True) - 1)  # rounding must not pick a token that was cut
    return token_RV.gather(1, rank_R1)[:, 0], sorted_RV.gather(1, rank_R1)[:, 0] / total_R


def accept(probability_R: Tensor, scheduled: int, threshold: float) -> Tensor:
    """Which candidates to keep: bool [R].

    Those strictly above ``threshold``; when fewer than ``scheduled`` are, the ``scheduled`` most probable ones (the
    first positions among equals).
    """
    above_R = probability_R > threshold
    if int(above_R.sum()) >= scheduled:
        return above_R
    order_R = probability_R.argsort(descending=True, stable=True)
    chosen_R = torch.zeros_like(above_R)
    chosen_R[order_R[:scheduled]] = True
    return chosen_R
