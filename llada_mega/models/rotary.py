"""Rotary embedding with one position a token."""

from __future__ import annotations

import torch
from torch import Tensor

from llada_mega.config.model import ModelConfig


def rotary_angles(position_ids_BS: Tensor, model: ModelConfig, dtype: torch.dtype) -> Tensor:
    """Angles ``[S, B, 1, d]`` for Megatron's ``apply_rotary_pos_emb`` (half-split layout), fp32 or fp64.

    d = ``rotary_percent`` of the head dimension; the remaining channels of each head are not rotated.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    channels = round(model.head_dim * model.rotary_percent)
    exponent = torch.arange(0, channels, 2, dtype=wide, device=position_ids_BS.device) / channels
    angles_BSd = position_ids_BS.to(wide)[..., None] * (1.0 / model.rope_theta**exponent)
    return torch.cat([angles_BSd, angles_BSd], dim=-1).transpose(0, 1)[:, :, None, :]
