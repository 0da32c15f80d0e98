"""The routed experts of a rank as one autograd function, in place of Megatron's loop over modules.

``SequentialMLP`` runs each expert as modules of its own, splits and concatenates around them, and keeps every
intermediate tensor. Here an expert's tokens are gathered, go through it and are added to the output while they are in
the cache, and of the intermediates only the output of the first layer is kept. Parameters, their names and checkpoints
are Megatron's, which still builds them; so are the products and their roundings.

Legend: T tokens, N routes (a token and one of its experts, sorted by expert), n routes of one expert, H hidden size,
F width of an expert (/etp), E local experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor
from torch.autograd.function import once_differentiable

from llada_mega.models.swiglu import swiglu_gradient_


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
    """y = (share * silu(gate) * up) W2', [gate; up] = x W1', with the weights of each route's expert.

    What one expert needs for a moment lives in scratch rows that the next one writes over while they are in the cache.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, share_N: Tensor, counts: list[int], token_N: Tensor | None, *weights: Tensor
    ) -> Tensor:
        first_weights, second_weights = _halves(weights)
        inner_N2F = x_TH.new_empty(sum(counts), len(first_weights[0]))
        output_TH = torch.zeros_like(x_TH)
        scratch_H, scratch_F = _scratch(x_TH, counts, x_TH.shape[1], second_weights[0].shape[1])
        for count, place, share_n, inner_n2F, first, second in zip(
            counts,
            _places(counts, token_N),
            share_N.split(counts),
            inner_N2F.split(counts),
            first_weights,
            second_weights,
            strict=True,
        ):
            row_nH, active_nF = scratch_H[:count], scratch_F[:count]
            torch.mm(_gather(x_TH, place, row_nH), first.t(), out=inner_n2F)
            gate_nF, up_nF = inner_n2F.chunk(2, dim=1)
            torch.ops.aten.silu.out(gate_nF, out=active_nF).mul_(up_nF).mul_(share_n[:, None])
            _add(output_TH, place, torch.mm(active_nF, second.t(), out=row_nH))
        ctx.counts, ctx.has_routes = counts, token_N is not None
        ctx.save_for_backward(x_TH, share_N, inner_N2F, *weights, *([] if token_N is None else [token_N]))
        return output_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, share_N, inner_N2F, *weights = ctx.saved_tensors
        token_N = weights.pop() if ctx.has_routes else None
        counts, (first_weights, second_weights) = ctx.counts, _halves(weights)
        grad_x_TH, grad_share_N = torch.zeros_like(x_TH), torch.empty_like(share_N)
        first_grads, second_grads = [], []
        hidden, width = x_TH.shape[1], second_weights[0].shape[1]
        scratch = _scratch(x_TH, counts, hidden, width, width, width, 2 * width)
        for count, place, share_n, inner_n2F, grad_share_n, first, second in zip(
            counts,
            _places(counts, token_N),
            share_N.split(counts),
            inner_N2F.split(counts),
            grad_share_N.split(counts),
            first_weights,
            second_weights,
            strict=True,
        ):
            row_nH, silu_nF, active_nF, grad_active_nF, grad_inner_n2F = (rows[:count] for rows in scratch)
            gate_nF, up_nF = inner_n2F.chunk(2, dim=1)
            torch.ops.aten.silu.out(gate_nF, out=silu_nF)
            torch.mul(silu_nF, up_nF, out=active_nF)
            grad_nH = _gather(grad_TH, place, row_nH)
            torch.mm(grad_nH, second, out=grad_active_nF)
            torch.sum(grad_active_nF * active_nF.to(share_n.dtype), dim=1, out=grad_share_n)
            second_grads.append(grad_nH.t().mm(active_nF.mul_(share_n[:, None])))

            grad_active_nF.mul_(share_n[:, None])
            swiglu_gradient_(silu_nF, grad_active_nF, inner_n2F, grad_inner_n2F)
            first_grads.append(grad_inner_n2F.t().mm(_gather(x_TH, place, row_nH)))
            _add(grad_x_TH, place, torch.mm(grad_inner_n2F, first, out=row_nH))
        return grad_x_TH, grad_share_N, None, None, *first_grads, *second_grads


def _halves(weights: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The weights of the experts' first and of their second layers."""
    middle = len(weights) // 2
    return weights[:middle], weights[middle:]


def _scratch(x_TH: Tensor, counts: list[int], *widths: int) -> list[Tensor]:
    """Uninitialised rows for the expert with the most routes, of each width."""
    return [x_TH.new_empty(max(counts), width) for width in widths]


def _places(counts: list[int], token_N: Tensor | None) -> Sequence[Tensor | slice]:
    """Where the tokens of each expert are: anywhere, or one expert's after the other's."""
    if token_N is not None:
        return token_N.split(counts)
    return [slice(end - count, end) for count, end in zip(counts, accumulate(counts), strict=True)]


def _gather(x_TH: Tensor, place: Tensor | slice, out_nH: Tensor) -> Tensor:
    """An expert's rows: a view where they are together, otherwise copied to ``out_nH``."""
    return x_TH[place] if isinstance(place, slice) else torch.index_select(x_TH, 0, place, out=out_nH)


def _add(total_TH: Tensor, place: Tensor | slice, part_nH: Tensor) -> None:
    if isinstance(place, slice):
        total_TH[place] = part_nH
    else:
        total_TH.index_add_(0, place, part_nH)
