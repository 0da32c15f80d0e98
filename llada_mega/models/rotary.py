"""Rotary embedding with one position a token, half-split layout.

Legend: S rows, B batch, N heads, D head dim, d = ``rotary_percent`` of D, the channels that are rotated, h = d / 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llada_mega.config.model import ModelConfig


def rotary_angles(position_ids_BS: Tensor, model: ModelConfig, dtype: torch.dtype) -> Tensor:
    """Angles ``[S, B, 1, d]`` for Megatron's ``apply_rotary_pos_emb``, each of the h twice; fp32 or fp64."""
    angles_SB1h = _angles(position_ids_BS, model, dtype)
    return torch.cat([angles_SB1h, angles_SB1h], dim=-1)


def rotary_factors(position_ids_BS: Tensor, model: ModelConfig, dtype: torch.dtype) -> Tensor:
    """``[S, B, 1, D + h]`` for :func:`rotate`, in ``dtype``, once for all layers.

    First what each channel keeps of itself, the cosines of the angles twice and ones, then the sines.
    """
    angles_SB1h = _angles(position_ids_BS, model, dtype)
    cos = angles_SB1h.cos()
    ones = cos.new_ones(*cos.shape[:-1], model.head_dim - 2 * cos.shape[-1])
    return torch.cat([cos, cos, ones, angles_SB1h.sin()], dim=-1).to(dtype)


def rotate(x_SBND: Tensor, factors: Tensor) -> Tensor:
    """Turn channels i and h + i of each head by angle i; channels from d on stay. ``factors`` get no gradient."""
    return _Rotate.apply(x_SBND, factors)


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is turned back by the same angle; no intermediate tensor is kept."""

    @staticmethod
    def forward(ctx: Any, x_SBND: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(factors)
        return _turned(x_SBND, factors, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SBND: Tensor) -> tuple[Tensor, None]:
        return _turned(grad_SBND, ctx.saved_tensors[0], -1), None


def _turned(x_SBND: Tensor, factors: Tensor, direction: int) -> Tensor:
    kept, sin = factors.tensor_split([x_SBND.shape[-1]], dim=-1)
    half = sin.shape[-1]
    result_SBND = x_SBND * kept
    result_SBND[..., :half].addcmul_(x_SBND[..., half : 2 * half], sin, value=-direction)
    result_SBND[..., half : 2 * half].addcmul_(x_SBND[..., :half], sin, value=direction)
    return result_SBND


def _angles(position_ids_BS: Tensor, model: ModelConfig, dtype: torch.dtype) -> Tensor:
    """``[S, B, 1, h]``."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    channels = round(model.head_dim * model.rotary_percent)
    exponent = torch.arange(0, channels, 2, dtype=wide, device=position_ids_BS.device) / channels
    angles_BSh = position_ids_BS.to(wide)[..., None] * (1.0 / model.rope_theta**exponent)
    return angles_BSh.transpose(0, 1)[:, :, None, :]
