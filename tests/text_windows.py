"""Evaluation windows from a plain run of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from llada_mega.data.sample import Sample


def windows(token_ids: Tensor, length: int, count: int) -> list[Sample]:
    """``count`` windows of ``length`` tokens, evenly spread over ``token_ids`` int64 [N]."""
    starts = torch.linspace(0, len(token_ids) - length, count).long().tolist()
    whole = torch.ones(length, dtype=torch.bool)
    return [
        Sample(token_ids[start : start + length], [length], [False], whole, index) for index, start in enumerate(starts)
    ]
