"""The routed experts of a rank as a few grouped matrix products, for GPUs.

:class:`~llada_mega.models.experts.FusedExperts` reads the number of each expert's tokens on the host and runs one
expert after the other: on a GPU that is a wait and a hundred small kernels a layer. Here one kernel multiplies all
experts' tokens, told on the device where an expert's begin, so the host neither waits nor launches more for more
experts, and every shape follows from the number of tokens and of experts a token. Parameters, names, checkpoints and
roundings are those of ``FusedExperts``; the sum over a token's experts is taken in fp32 and in the order of experts,
so it is the same in every run.

Legend: T tokens, N routes (a token and one of its experts, sorted by expert), K experts a token (N = T * K), H hidden
size, F width of an expert (/etp), E local experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor
from torch.autograd.function import once_differentiable

from llada_mega.models.swiglu import swiglu_gradient_

ALIGNMENT = 16  # bytes: rows of both factors start at a multiple of it


def can_group(config: TransformerConfig) -> bool:
    """True where torch has a grouped product for these experts: bf16, a GPU of compute capability 8 or more."""
    width = (config.moe_ffn_hidden_size or 0) // config.expert_tensor_parallel_size
    return (
        hasattr(F, "grouped_mm")
        and config.params_dtype == torch.bfloat16
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= (8, 0)
        and all(size * config.params_dtype.itemsize % ALIGNMENT == 0 for size in (config.hidden_size, width))
    )


class DeviceRoutes(NamedTuple):
    """Which tokens go to which local expert, all on the device.

    Attributes:
        ends_E: int32, the number of routes to each expert and those before it.
        token_N: int64, the token of each route.
        order_TK: int64, the routes of each token, by expert.
    """

    ends_E: Tensor
    token_N: Tensor
    order_TK: Tensor


def device_routes(routing_map_TE: Tensor, experts_a_token: int) -> tuple[DeviceRoutes, Tensor]:
    """Routes, and where each is in the transposed and flattened map (int64 [N]: e * T + t).

    Args:
        routing_map_TE: bool, ``experts_a_token`` of each row are True. Nothing checks that: it would have to wait.
    """
    tokens = len(routing_map_TE)
    by_expert_N = torch.nonzero_static(routing_map_TE.t().flatten(), size=tokens * experts_a_token).squeeze(1)
    token_N = by_expert_N % tokens
    ends_E = routing_map_TE.sum(dim=0).cumsum(0).to(torch.int32)
    order_TK = token_N.argsort(stable=True).view(tokens, experts_a_token)
    return DeviceRoutes(ends_E, token_N, order_TK), by_expert_N


class GroupedExperts(SequentialMLP):
    """SwiGLU experts without biases, built like ``FusedExperts``; their weights lie together until they are moved."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for linears in ("linear_fc1", "linear_fc2"):
            weights = [getattr(expert, linears).weight for expert in self.local_experts]
            for weight, place in zip(weights, torch.stack([weight.data for weight in weights]), strict=True):
                weight.data = place

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor | DeviceRoutes, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Outputs of the experts times shares, and no bias.

        Args:
            permuted_local_hidden_states: tokens ``[N, H]`` sorted by expert; with :class:`DeviceRoutes`, ``[T, H]``.
            tokens_per_expert: int64 ``[E]`` on any device, from Megatron's dispatchers, or routes, from ours.
            permuted_probs: shares ``[N]``.

        Returns:
            ``[N, H]``; with routes ``[T, H]``, the sum over each token's experts.
        """
        # called, not read: hooks wait for the parameters there
        first = [expert.linear_fc1() for expert in self.local_experts]
        second = [expert.linear_fc2() for expert in self.local_experts]
        x, routes = permuted_local_hidden_states, tokens_per_expert
        if not isinstance(routes, DeviceRoutes):
            ends_E = routes.to(x.device, non_blocking=True).cumsum(0).to(torch.int32)
            return _GroupedExperts.apply(x, permuted_probs, ends_E, None, None, *first, *second), None
        return _GroupedExperts.apply(x, permuted_probs, *routes, *first, *second), None


class _GroupedExperts(torch.autograd.Function):
    """y = (share * silu(gate) * up) W2', [gate; up] = x W1', with the weights of each route's expert.

    Of the intermediates only the output of the first layer is kept; the gathered tokens and the activations are made
    again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        share_N: Tensor,
        ends_E: Tensor,
        token_N: Tensor | None,
        order_TK: Tensor | None,
        *weights: Tensor,
    ) -> Tensor:
        first_E2FH, second_EHF = _together(weights)
        inner_N2F = F.grouped_mm(_gather(x_TH, token_N), first_E2FH.transpose(1, 2), offs=ends_E)
        gate_NF, up_NF = inner_N2F.chunk(2, dim=1)
        active_NF = F.silu(gate_NF).mul_(up_NF).mul_(share_N[:, None])
        ctx.save_for_backward(x_TH, share_N, ends_E, token_N, order_TK, inner_N2F, *weights)
        return _sum(F.grouped_mm(active_NF, second_EHF.transpose(1, 2), offs=ends_E), order_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, share_N, ends_E, token_N, order_TK, inner_N2F, *weights = ctx.saved_tensors
        first_E2FH, second_EHF = _together(weights)
        grad_NH = _gather(grad_TH.contiguous(), token_N)
        gate_NF, up_NF = inner_N2F.chunk(2, dim=1)
        silu_NF = F.silu(gate_NF)
        active_NF = silu_NF * up_NF
        grad_active_NF = F.grouped_mm(grad_NH, second_EHF, offs=ends_E)
        grad_share_N = (grad_active_NF * active_NF.to(share_N.dtype)).sum(dim=1)
        grad_second_EHF = F.grouped_mm(grad_NH.t(), active_NF.mul_(share_N[:, None]), offs=ends_E)

        grad_active_NF.mul_(share_N[:, None])
        grad_inner_N2F = torch.empty_like(inner_N2F)
        swiglu_gradient_(silu_NF, grad_active_NF, inner_N2F, grad_inner_N2F)
        grad_first_E2FH = F.grouped_mm(grad_inner_N2F.t(), _gather(x_TH, token_N), offs=ends_E)
        grad_x_TH = _sum(F.grouped_mm(grad_inner_N2F, first_E2FH, offs=ends_E), order_TK)
        return grad_x_TH, grad_share_N, None, None, None, *grad_first_E2FH.unbind(), *grad_second_EHF.unbind()


def _gather(x_TH: Tensor, token_N: Tensor | None) -> Tensor:
    """The row of each route's token ``[N, H]``; without routes the rows are those already."""
    return x_TH if token_N is None else x_TH.index_select(0, token_N)


def _sum(y_NH: Tensor, order_TK: Tensor | None) -> Tensor:
    """The sum over each token's routes ``[T, H]``, in fp32 at least and in the order of experts."""
    if order_TK is None:
        return y_NH
    wide = torch.promote_types(y_NH.dtype, torch.float32)
    y_TKH = y_NH.index_select(0, order_TK.flatten()).unflatten(0, order_TK.shape)
    return y_TKH.sum(dim=1, dtype=wide).to(y_NH.dtype)


def _together(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The experts' first and second layers as one tensor each."""
    middle = len(weights) // 2
    return _stack(weights[:middle]), _stack(weights[middle:])


def _stack(weights: Sequence[Tensor]) -> Tensor:
    """``torch.stack`` that copies nothing where the weights lie at equal distances in one storage.

    They do as built. The distributed optimizer moves them to buffers of its own, in the reverse order; then it copies.
    """
    offsets = [weight.storage_offset() for weight in weights]
    steps = {later - earlier for earlier, later in pairwise(offsets)}
    storages = {weight.untyped_storage().data_ptr() for weight in weights}
    if len(storages) > 1 or len(steps) > 1 or min(steps, default=0) < 0 or not weights[0].is_contiguous():
        return torch.stack(list(weights))
    step = steps.pop() if steps else weights[0].numel()
    return weights[0].as_strided((len(weights), *weights[0].shape), (step, *weights[0].stride()), offsets[0])
