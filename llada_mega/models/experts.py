"""The routed experts of a rank as one autograd function, in place of Megatron's loop over modules.

``SequentialMLP`` runs each expert as modules of its own, splits and concatenates around them, and keeps every
intermediate tensor: on a CPU a quarter of a small model's step. Here the experts write into shared buffers, the
activation runs once over all tokens, and of the intermediates only the output of the first layer is kept. Parameters,
names and checkpoints are Megatron's: it still builds them. Products, their order and roundings are its too.

Legend: N routed tokens (sorted by expert), H hidden size, F width of an expert (/etp), E local experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor
from torch.autograd.function import once_differentiable


class ExpertColumn(ColumnParallelLinear):
    """Holds a weight. It is called, not read, so that hooks run that wait for the parameter (overlapped all-gather)."""

    def forward(self) -> Tensor:
        """The weight ``[2F, H]``, gate above up."""
        return self.weight


class ExpertRow(RowParallelLinear):
    """As :class:`ExpertColumn`."""

    def forward(self) -> Tensor:
        """The weight ``[H, F]``."""
        return self.weight


class FusedExperts(SequentialMLP):
    """SwiGLU experts without biases, built from :class:`ExpertColumn` and :class:`ExpertRow`."""

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Tokens ``[N, H]`` sorted by expert, counts int64 ``[E]``, shares ``[N]`` -> outputs ``[N, H]``, no bias."""
        first = [expert.linear_fc1() for expert in self.local_experts]
        second = [expert.linear_fc2() for expert in self.local_experts]
        counts = tokens_per_expert.tolist()
        return _Experts.apply(permuted_local_hidden_states, permuted_probs, counts, *first, *second), None


class _Experts(torch.autograd.Function):
    """y = share * (silu(gate) * up) W2', [gate; up] = x W1', with the W of each token's expert."""

    @staticmethod
    def forward(ctx: Any, x_NH: Tensor, share_N: Tensor, counts: list[int], *weights: Tensor) -> Tensor:
        first, second = _halves(weights)
        inner_N2F = x_NH.new_empty(len(x_NH), first[0].shape[0])
        for x, weight, inner in zip(x_NH.split(counts), first, inner_N2F.split(counts), strict=True):
            torch.mm(x, weight.t(), out=inner)
        gate_NF, up_NF = inner_N2F.chunk(2, dim=1)
        active_NF = F.silu(gate_NF).mul_(up_NF).mul_(share_N[:, None])
        output_NH = torch.empty_like(x_NH)
        for active, weight, output in zip(active_NF.split(counts), second, output_NH.split(counts), strict=True):
            torch.mm(active, weight.t(), out=output)
        ctx.counts = counts
        ctx.save_for_backward(x_NH, share_N, inner_N2F, *weights)
        return output_NH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor | None, ...]:
        x_NH, share_N, inner_N2F, *weights = ctx.saved_tensors
        counts = ctx.counts
        first, second = _halves(weights)
        gate_NF, up_NF = inner_N2F.chunk(2, dim=1)
        silu_NF = F.silu(gate_NF)
        unshared_NF = silu_NF * up_NF
        grads = grad_NH.split(counts)

        grad_active_NF = torch.empty_like(unshared_NF)
        for grad, weight, grad_active in zip(grads, second, grad_active_NF.split(counts), strict=True):
            torch.mm(grad, weight, out=grad_active)
        grad_share_N = (grad_active_NF * unshared_NF.to(share_N.dtype)).sum(dim=1)
        active_NF = unshared_NF.mul_(share_N[:, None])
        second_grads = [grad.t().mm(active) for grad, active in zip(grads, active_NF.split(counts), strict=True)]

        grad_active_NF.mul_(share_N[:, None])
        grad_inner_N2F = torch.empty_like(inner_N2F)
        grad_gate_NF, grad_up_NF = grad_inner_N2F.chunk(2, dim=1)
        torch.mul(grad_active_NF, silu_NF, out=grad_up_NF)
        torch.ops.aten.silu_backward.grad_input(grad_active_NF.mul_(up_NF), gate_NF, grad_input=grad_gate_NF)
        grad_inners = grad_inner_N2F.split(counts)

        grad_x_NH = torch.empty_like(x_NH)
        for grad_inner, weight, grad_x in zip(grad_inners, first, grad_x_NH.split(counts), strict=True):
            torch.mm(grad_inner, weight, out=grad_x)
        first_grads = [grad.t().mm(x) for grad, x in zip(grad_inners, x_NH.split(counts), strict=True)]
        return grad_x_NH, grad_share_N, None, *first_grads, *second_grads


def _halves(weights: tuple[Tensor, ...] | list[Tensor]) -> tuple[Any, Any]:
    """The weights of the experts' first and of their second layers."""
    middle = len(weights) // 2
    return weights[:middle], weights[middle:]
