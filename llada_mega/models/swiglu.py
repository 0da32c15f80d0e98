"""SwiGLU that keeps its input alone for the backward pass.

Megatron's unfused one keeps four tensors of its output's size: gate and up, ``silu(gate)``, and ``up`` once more.

Legend: F width, the gate's and the up projection's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.autograd.function import once_differentiable


class SwiGLU(MegatronModule):
    """``silu(gate) * up`` of ``[gate; up]``; the activation module of Megatron's ``MLP``. No parameters."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)

    def forward(self, inner: Tensor) -> Tensor:
        """``[..., 2F]`` -> ``[..., F]``."""
        return _SwiGLU.apply(inner)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner: Tensor) -> Tensor:
        ctx.save_for_backward(inner)
        gate, up = inner.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inner,) = ctx.saved_tensors
        grad_inner = torch.empty_like(inner)
        swiglu_gradient_(F.silu(inner.chunk(2, dim=-1)[0]), grad, inner, grad_inner)
        return grad_inner


def swiglu_gradient_(silu: Tensor, grad: Tensor, inner: Tensor, grad_inner: Tensor) -> None:
    """Write the gradient of ``[gate; up]`` into ``grad_inner``; ``silu``, which holds ``silu(gate)``, is used up.

    Args:
        silu, grad: ``[..., F]``, the latter the gradient of ``silu * up``.
        inner, grad_inner: ``[..., 2F]``.
    """
    gate, up = inner.chunk(2, dim=-1)
    grad_gate, grad_up = grad_inner.chunk(2, dim=-1)
    torch.mul(grad, silu, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(torch.mul(grad, up, out=silu), gate, grad_input=grad_gate)
