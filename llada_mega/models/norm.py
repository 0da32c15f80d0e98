"""RMSNorm that works under sequence parallelism (Megatron's ``WrappedTorchNorm`` refuses it).

Legend: H normalised features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable


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
        if hidden.is_cuda:
            return F.rms_norm(hidden, (self.weight.numel(),), self.weight, self.eps)
        return _RMSNorm.apply(hidden, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """``F.rms_norm`` has a kernel on GPUs; on CPUs it is a dozen operations backward, three times as slow as this."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        inverse_rms = square.div_(hidden.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight_H, inverse_rms)
        return (wide * inverse_rms).mul_(weight_H).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight_H, inverse_rms = ctx.saved_tensors
        dtype, wide, size = hidden.dtype, inverse_rms.dtype, hidden.shape[-1]
        hidden, grad, weight_H = hidden.to(wide), grad.to(wide), weight_H.to(wide)
        product = grad * hidden
        grad_weight_H = inverse_rms.flatten() @ product.reshape(-1, size)
        along_hidden = (product.reshape(-1, size) @ weight_H).view(inverse_rms.shape)
        shift = along_hidden.mul_(inverse_rms.pow(3)).div_(size)
        grad_hidden = torch.mul(grad, weight_H, out=product).mul_(inverse_rms).addcmul_(hidden, shift, value=-1)
        return grad_hidden.to(dtype), grad_weight_H.to(dtype), None
