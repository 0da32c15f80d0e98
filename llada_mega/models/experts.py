"""The routed experts of a rank as one autograd function, in place of Megatron's loop over modules.

``SequentialMLP`` runs each expert as modules of its own, splits and concatenates around them, and keeps every
intermediate tensor: on a CPU a quarter of a small model's step. Here an expert's tokens are gathered, go through it and
are added to the output while they are in the cache, and of the intermediates only the output of the first layer is
kept. Parameters, their names and checkpoints are Megatron's, which still builds them; so are the products and their
roundings.

Legend: T tokens, N routes (a token and one of its experts, sorted by expert), n routes of one expert, H hidden size,
F width of an expert (/etp), E local experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

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


class Routes(NamedTuple):
    """Which tokens go to which local expert: the number of each expert's routes, and int64 [N] the token of each."""

    counts: list[int]
    token_N: Tensor


class FusedExperts(SequentialMLP):
    """SwiGLU experts without biases, built from :class:`ExpertColumn` and :class:`ExpertRow`."""

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor | Routes, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Outputs of the experts times shares, and no bias.

        Args:
            permuted_local_hidden_states: tokens ``[N, H]`` sorted by expert; with :class:`Routes`, ``[T, H]``.
            tokens_per_expert: int64 ``[E]``, from Megatron's dispatchers, or routes, from ours.
            permuted_probs: shares ``[N]``.

        Returns:
            ``[N, H]``; with routes ``[T, H]``, the sum over each token's experts.
        """
        first = [expert.linear_fc1() for expert in self.local_experts]
        second = [expert.linear_fc2() for expert in self.local_experts]
        if isinstance(tokens_per_expert, Routes):
            counts, token_N = tokens_per_expert
        else:
            counts, token_N = tokens_per_expert.tolist(), None
        return _Experts.apply(permuted_local_hidden_states, permuted_probs, counts, token_N, *first, *second), None


class _Experts(torch.autograd.Function):
    """y = (share * silu(gate) * up) W2', [gate; up] = x W1', with the weights of each route's expert."""

    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, share_N: Tensor, counts: list[int], token_N: Tensor | None, *weights: Tensor
    ) -> Tensor:
        places = _places(counts, token_N)
        inner_N2F = x_TH.new_empty(sum(counts), weights[0].shape[0])
        output_TH = torch.zeros_like(x_TH)
        for place, share_n, inner_n2F, first, second in zip(
            places, share_N.split(counts), inner_N2F.split(counts), *_halves(weights), strict=True
        ):
            torch.mm(_gather(x_TH, place), first.t(), out=inner_n2F)
            gate_nF, up_nF = inner_n2F.chunk(2, dim=1)
            active_nF = F.silu(gate_nF).mul_(up_nF).mul_(share_n[:, None])
            _add(output_TH, place, active_nF.mm(second.t()))
        ctx.counts, ctx.has_routes = counts, token_N is not None
        ctx.save_for_backward(x_TH, share_N, inner_N2F, *weights, *([] if token_N is None else [token_N]))
        return output_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, share_N, inner_N2F, *weights = ctx.saved_tensors
        token_N = weights.pop() if ctx.has_routes else None
        grad_x_TH, grad_share_N = torch.zeros_like(x_TH), torch.empty_like(share_N)
        first_grads, second_grads = [], []
        for place, share_n, inner_n2F, grad_share_n, first, second in zip(
            _places(ctx.counts, token_N),
            share_N.split(ctx.counts),
            inner_N2F.split(ctx.counts),
            grad_share_N.split(ctx.counts),
            *_halves(weights),
            strict=True,
        ):
            gate_nF, up_nF = inner_n2F.chunk(2, dim=1)
            silu_nF = F.silu(gate_nF)
            active_nF = silu_nF * up_nF
            grad_nH = _gather(grad_TH, place)
            grad_active_nF = grad_nH.mm(second)
            torch.sum(grad_active_nF * active_nF.to(share_n.dtype), dim=1, out=grad_share_n)
            second_grads.append(grad_nH.t().mm(active_nF.mul_(share_n[:, None])))

            grad_active_nF.mul_(share_n[:, None])
            grad_inner_n2F = torch.empty_like(inner_n2F)
            grad_gate_nF, grad_up_nF = grad_inner_n2F.chunk(2, dim=1)
            torch.mul(grad_active_nF, silu_nF, out=grad_up_nF)
            torch.ops.aten.silu_backward.grad_input(grad_active_nF.mul_(up_nF), gate_nF, grad_input=grad_gate_nF)
            first_grads.append(grad_inner_n2F.t().mm(_gather(x_TH, place)))
            _add(grad_x_TH, place, grad_inner_n2F.mm(first))
        return grad_x_TH, grad_share_N, None, None, *first_grads, *second_grads


def _halves(weights: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The weights of the experts' first and of their second layers."""
    middle = len(weights) // 2
    return weights[:middle], weights[middle:]


def _places(counts: list[int], token_N: Tensor | None) -> Sequence[Tensor | slice]:
    """Where the tokens of each expert are: anywhere, or one expert's after the other's."""
    if token_N is not None:
        return token_N.split(counts)
    ends = list(accumulate(counts))
    return [slice(end - count, end) for count, end in zip(counts, ends, strict=True)]


def _gather(x_TH: Tensor, place: Tensor | slice) -> Tensor:
    return x_TH[place] if isinstance(place, slice) else x_TH.index_select(0, place)


def _add(total_TH: Tensor, place: Tensor | slice, part_nH: Tensor) -> None:
    if isinstance(place, slice):
        total_TH[place] = part_nH
    else:
        total_TH.index_add_(0, place, part_nH)
