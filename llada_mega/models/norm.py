"""RMSNorm that works under sequence parallelism (Megatron's ``WrappedTorchNorm`` refuses it)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, computed in fp32 at least.

    At an all-zero row the Jacobian is ``weight / sqrt(eps)``: this is what makes an unseen MASK embedding explode
    (arXiv 2512.15745, the section on the masked embedding noise).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        # each tensor-parallel rank sees a part of the sequence: Megatron sums the gradients of marked parameters
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., hidden_size]`` -> the same shape and dtype."""
        return F.rms_norm(hidden, (self.weight.numel(),), self.weight, self.eps)
