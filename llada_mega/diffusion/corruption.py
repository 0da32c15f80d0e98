"""Corruption: replace tokens by MASK, as a pure function of (seed, sample index, position).

Legend: L tokens of one sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llada_mega.diffusion.random import Stream, uniform
from llada_mega.diffusion.schedule import Schedule


def corrupt(
    tokens_L: Tensor,
    supervised_L: Tensor,
    t_L: Tensor,
    *,
    seed: int,
    sample_index: int,
    mask_token_id: int,
    schedule: Schedule,
) -> tuple[Tensor, Tensor]:
    """x_t of eq. (1): every supervised token becomes MASK with probability 1 - alpha_t, independently.

    Args:
        tokens_L: int64 clean tokens x_0.
        supervised_L: bool; padding and prompts are False and are never masked.
        t_L: float32 noise level of each token.
        sample_index: global sample index; with ``seed`` and the position it fixes the mask, whatever the batch.

    Returns:
        noisy_L (int64) and masked_L (bool). A sample may come out without any masked token, with probability
        prod(alpha_t): it then trains nothing. Forcing a mask would bias the estimator of the bound.
    """
    position_L = torch.arange(len(tokens_L), device=tokens_L.device)
    draw_L = uniform(seed, Stream.MASK, sample_index, position_L)
    masked_L = supervised_L & (draw_L < schedule.mask_probability(t_L))
    return torch.where(masked_L, mask_token_id, tokens_L), masked_L
