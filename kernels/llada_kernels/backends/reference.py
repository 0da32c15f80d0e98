"""The oracle: attention over the dense mask, written for clarity. O(S^2) memory; any dtype; plain autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llada_kernels.interval_mask import IntervalMask

SUMMARY = "dense mask, O(S^2) memory"


def obstacle(device: torch.device, dtype: torch.dtype | None, head_dim: int | None) -> str | None:
    """It runs everywhere."""
    return None


def attention(
    query_BSHD: Tensor,
    key_BKHD: Tensor,
    value_BKHD: Tensor,
    mask: IntervalMask,
    scale: float,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention of ``[B, S, Hq, D]`` queries over ``[B, K, Hk, D]`` keys and values; Hq is a multiple of Hk.

    Computed in float32, or in float64 for float64 inputs. Rows that see nothing give output 0, lse -inf and zero
    gradients.

    Returns:
        Output ``[B, S, Hq, D]`` in the dtype of the query, log-sum-exp of the scaled scores ``[B, S, Hq]`` in the
        dtype of the computation.
    """
    batch, rows, heads, head_dim = query_BSHD.shape
    groups = key_BKHD.shape[2]
    compute = torch.float64 if query_BSHD.dtype == torch.float64 else torch.float32

    query_BSGHD = query_BSHD.to(compute).reshape(batch, rows, groups, heads // groups, head_dim)
    score_BGHSK = torch.einsum("bsghd,bkgd->bghsk", query_BSGHD, key_BKHD.to(compute)) * scale
    visible_SK = mask.dense()
    blind_S1 = ~visible_SK.any(1, keepdim=True)
    # A blind row keeps finite scores (all zero) until its probabilities and lse are overwritten: no NaN, no gradient.
    score_BGHSK = score_BGHSK.masked_fill(~visible_SK, -math.inf).masked_fill(blind_S1, 0.0)
    lse_BGHS = score_BGHSK.logsumexp(-1).masked_fill(blind_S1[:, 0], -math.inf)
    probability_BGHSK = score_BGHSK.softmax(-1).masked_fill(blind_S1, 0.0)
    output_BSGHD = torch.einsum("bghsk,bkgd->bsghd", probability_BGHSK, value_BKHD.to(compute))
    return (
        output_BSGHD.reshape(query_BSHD.shape).to(query_BSHD.dtype),
        lse_BGHS.permute(0, 3, 1, 2).reshape(batch, rows, heads),
    )
