"""Keys and values across context-parallel ranks, with gradients.

One all-gather brings the keys and values of every rank's last rows to all ranks; the gradients go back the same way and
are summed where they come from. The sum is an all-to-all and a local addition rather than a reduce-scatter: the same
bytes, but added in fp32 and in the order of ranks, so that it neither rounds bf16 at every hop nor depends on the
network. Attention wants keys in sequence order; they are put there while they are copied out of the buffers.

Legend: R ranks, N rows of a rank, M rows of which the keys are sent, K keys after the exchange (N - M + R x M),
B batch, H key heads, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from llada_kernels.exchange import RankExchange
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup


def gather_keys(
    key_NBHD: Tensor, value_NBHD: Tensor, exchange: RankExchange, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """The keys and values that this rank's rows may see, ``[K, B, H, D]`` each, in the order of its mask's keys.

    A collective of ``group``, and so is its backward pass.

    Args:
        key_NBHD, value_NBHD: of this rank's rows; same shape and dtype.
        exchange: this rank's part of an exchange over all ranks of ``group``.
        group: the context-parallel ranks.
    """
    key_KBHD, value_KBHD = _GatherKeys.apply(key_NBHD, value_NBHD, exchange, group)
    return key_KBHD, value_KBHD


class _GatherKeys(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, exchange: RankExchange, group: ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        num_kept, shape = key.shape[0] - exchange.num_sent, key.shape[1:]
        places_K = exchange.places_on(key.device)
        sent = torch.stack((key[num_kept:], value[num_kept:]), dim=1)
        arrived = key.new_empty(group.size() * exchange.num_sent, 2, *shape)
        dist.all_gather_into_tensor(arrived, sent, group=group)
        gathered = []
        for own, others in ((key, arrived[:, 0]), (value, arrived[:, 1])):
            target = own.new_empty(len(places_K), *shape)
            target.index_copy_(0, places_K[:num_kept], own[:num_kept])
            target.index_copy_(0, places_K[num_kept:], others)
            gathered.append(target)
        ctx.exchange, ctx.group, ctx.num_kept = exchange, group, num_kept
        return gathered[0], gathered[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        exchange, num_kept, shape = ctx.exchange, ctx.num_kept, gradients[0].shape[1:]
        places_K = exchange.places_on(gradients[0].device)
        ranks = ctx.group.size()
        sent = torch.stack([gradient.index_select(0, places_K[num_kept:]) for gradient in gradients], dim=1)
        arrived = torch.empty_like(sent)
        dist.all_to_all_single(arrived, sent, group=ctx.group)
        wide = torch.promote_types(sent.dtype, torch.float32)
        total = arrived.view(ranks, exchange.num_sent, 2, *shape).sum(0, dtype=wide)
        results = []
        for half, gradient in enumerate(gradients):
            result = gradient.new_empty(num_kept + exchange.num_sent, *shape)
            torch.index_select(gradient, 0, places_K[:num_kept], out=result[:num_kept])
            result[num_kept:] = total[:, half]
            results.append(result)
        return *results, None, None
