"""The routed experts of a rank as one autograd function, in place of Megatron's loop over modules.

``SequentialMLP`` runs each expert as modules of its own, splits and concatenates around them, and keeps every
intermediate tensor. Here a few experts' tokens are gathered, go through them and are added to the output while they are
in the cache, and of the intermediates only the output of the first layer is kept. Parameters, their names and
checkpoints are Megatron's, which still builds them; so are the products and their roundings.

Legend: T tokens, N routes (a token and one of its experts, sorted by expert), n routes of a group of experts, H hidden
size, F width of an expert (/etp), E local experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, islice
from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor
from torch.autograd.function import once_differentiable

from llada_mega.models.swiglu import swiglu_gradient_

GROUP_ROUTES = 1024  # more no longer fit a core's cache, fewer are too little work for an operation


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

    Experts with few tokens share all but the products (:func:`_groups`). What a group needs for a moment lives in
    scratch rows that the next one writes over while they are in the cache.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, share_N: Tensor, counts: list[int], token_N: Tensor | None, *weights: Tensor
    ) -> Tensor:
        first_weights, second_weights = (iter(half) for half in _halves(weights))
        inner_N2F = x_TH.new_empty(sum(counts), len(weights[0]))
        output_TH = torch.zeros_like(x_TH)
        groups, sizes = _groups(counts)
        scratch = _scratch(x_TH, sizes, x_TH.shape[1], weights[-1].shape[1])
        for group, size, place, share_n1, inner_n2F in zip(
            groups,
            sizes,
            _places(sizes, token_N),
            share_N[:, None].split(sizes),
            inner_N2F.split(sizes),
            strict=True,
        ):
            row_nH, active_nF = (rows[:size] for rows in scratch)
            _multiply(
                group, _gather(x_TH, place, row_nH), (w.t() for w in islice(first_weights, len(group))), inner_n2F
            )
            gate_nF, up_nF = inner_n2F.chunk(2, dim=1)
            torch.ops.aten.silu.out(gate_nF, out=active_nF).mul_(up_nF).mul_(share_n1)
            _multiply(group, active_nF, (w.t() for w in islice(second_weights, len(group))), row_nH)
            _add(output_TH, place, row_nH)
        ctx.counts, ctx.has_routes = counts, token_N is not None
        ctx.save_for_backward(x_TH, share_N, inner_N2F, *weights, *([] if token_N is None else [token_N]))
        return output_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, share_N, inner_N2F, *weights = ctx.saved_tensors
        token_N = weights.pop() if ctx.has_routes else None
        first_weights, second_weights = (iter(half) for half in _halves(weights))
        grad_x_TH, grad_share_N = torch.zeros_like(x_TH), torch.empty_like(share_N)
        first_grads: list[Tensor] = []
        second_grads: list[Tensor] = []
        groups, sizes = _groups(ctx.counts)
        width = weights[-1].shape[1]
        scratch = _scratch(x_TH, sizes, x_TH.shape[1], width, width, width, 2 * width)
        for group, size, place, share_n1, inner_n2F, grad_share_n in zip(
            groups,
            sizes,
            _places(sizes, token_N),
            share_N[:, None].split(sizes),
            inner_N2F.split(sizes),
            grad_share_N.split(sizes),
            strict=True,
        ):
            row_nH, silu_nF, active_nF, grad_active_nF, grad_inner_n2F = (rows[:size] for rows in scratch)
            gate_nF, up_nF = inner_n2F.chunk(2, dim=1)
            torch.ops.aten.silu.out(gate_nF, out=silu_nF)
            torch.mul(silu_nF, up_nF, out=active_nF)
            grad_nH = _gather(grad_TH, place, row_nH)
            _multiply(group, grad_nH, islice(second_weights, len(group)), grad_active_nF)
            torch.sum(grad_active_nF * active_nF.to(share_N.dtype), dim=1, out=grad_share_n)
            second_grads += _weight_gradients(group, grad_nH, active_nF.mul_(share_n1))

            grad_active_nF.mul_(share_n1)
            swiglu_gradient_(silu_nF, grad_active_nF, inner_n2F, grad_inner_n2F)
            first_grads += _weight_gradients(group, grad_inner_n2F, _gather(x_TH, place, row_nH))
            _multiply(group, grad_inner_n2F, islice(first_weights, len(group)), row_nH)
            _add(grad_x_TH, place, row_nH)
        return grad_x_TH, grad_share_N, None, None, *first_grads, *second_grads


def _groups(counts: list[int]) -> tuple[list[list[int]], list[int]]:
    """Consecutive experts, by their numbers of routes, until a group has ``GROUP_ROUTES``; and the groups' sums."""
    groups: list[list[int]] = []
    for count in counts:
        if groups and sum(groups[-1]) + count <= GROUP_ROUTES:
            groups[-1].append(count)
        else:
            groups.append([count])
    return groups, [sum(group) for group in groups]


def _multiply(counts: list[int], x_nK: Tensor, weights: Iterable[Tensor], out_nM: Tensor) -> None:
    """The rows of each expert of a group times its weight ``[K, M]``."""
    for x, weight, out in zip(x_nK.split(counts), weights, out_nM.split(counts), strict=True):
        torch.mm(x, weight, out=out)


def _weight_gradients(counts: list[int], grad_nM: Tensor, x_nK: Tensor) -> list[Tensor]:
    """``[M, K]`` of each expert of a group."""
    return [grad.t().mm(x) for grad, x in zip(grad_nM.split(counts), x_nK.split(counts), strict=True)]


def _halves(weights: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The weights of the experts' first and of their second layers."""
    middle = len(weights) // 2
    return weights[:middle], weights[middle:]


def _scratch(x_TH: Tensor, sizes: list[int], *widths: int) -> list[Tensor]:
    """Uninitialised rows for the largest group, of each width."""
    return [x_TH.new_empty(max(sizes), width) for width in widths]


def _places(sizes: list[int], token_N: Tensor | None) -> Sequence[Tensor | slice]:
    """Where the tokens of each group are: anywhere, or one group's after the other's."""
    if token_N is not None:
        return token_N.split(sizes)
    return [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]


def _gather(x_TH: Tensor, place: Tensor | slice, out_nH: Tensor) -> Tensor:
    """A group's rows: a view where they are together, otherwise copied to ``out_nH``."""
    return x_TH[place] if isinstance(place, slice) else torch.index_select(x_TH, 0, place, out=out_nH)


def _add(total_TH: Tensor, place: Tensor | slice, part_nH: Tensor) -> None:
    if isinstance(place, slice):
        total_TH[place] = part_nH
    else:
        total_TH.index_add_(0, place, part_nH)
