"""The CPU backend: aten's fused CPU attention, called on the chunks of a plan that hold visible pairs only.

Legend: B batch, S rows, K keys, H heads, D head dim; kernels see ``[B, H, S, D]`` views of ``[B, S, H, D]`` tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import pad

from llada_kernels.chunk_plan import Chunk, ChunkPlan
from llada_kernels.interval_mask import IntervalMask
from llada_kernels.reference import reference_attention

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def cpu_attention(
    query_BSHD: Tensor, key_BKHD: Tensor, value_BKHD: Tensor, mask: IntervalMask, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention that computes little more than the visible pairs; memory O(S), contract as ``reference_attention``.

    float32, bfloat16 and float16 run fused with float32 accumulation; any other dtype runs the reference.
    """
    if query_BSHD.dtype not in FUSED_DTYPES:
        return reference_attention(query_BSHD, key_BKHD, value_BKHD, mask, scale)
    batch, _, heads, head_dim = query_BSHD.shape
    plan = ChunkPlan.of(mask, batch, heads, key_BKHD.shape[2], head_dim)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    return _ChunkedAttention.apply(query_BSHD, key_BKHD, value_BKHD, plan, scale)


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: ChunkPlan, scale: float) -> Any:
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.scale, ctx.rows = plan, scale, query.shape[1]
        query, key, value = (_gather(query, plan), *map(_unit_stride, (key, value)))
        outputs, lses = [], []
        for chunk, q, k, v in _walk(plan, query, key, value):
            output, lse = _forward(q, k, v, 0.0, False, attn_mask=plan.bias(chunk, q.dtype), scale=scale)
            outputs.append(output.transpose(1, 2))
            lses.append(lse.transpose(1, 2))
        output = torch.cat(outputs, 1) if outputs else query
        lse = torch.cat(lses, 1) if lses else query[..., 0].float()
        ctx.save_for_backward(query, key, value, output, lse)
        return _scatter(output, plan, ctx.rows, 0.0), _scatter(lse, plan, ctx.rows, -math.inf)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> Any:
        plan: ChunkPlan = ctx.plan
        query, key, value, output, lse = ctx.saved_tensors
        head_dim = query.shape[-1]
        grad = torch.zeros_like(output) if grad_output is None else _gather(grad_output, plan)
        if grad_lse is not None:
            # The kernel takes no gradient of the lse. Its softmax gradient is P * (dO . V - dO . O); with one more
            # feature, V = 0, O = 1 and dO = -dlse there, the last term becomes dO . O - dlse, which is what is wanted.
            grad = torch.cat((grad, -_gather(grad_lse, plan)[..., None].to(grad.dtype)), -1)
            output = pad(output, (0, 1), value=1.0)
            query, key, value = (pad(x, (0, 1)) for x in (query, key, value))
        grad_key, grad_value = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))
        grad_queries = []
        row_counts = [chunk.num_rows for chunk in plan.chunks]
        per_row = zip(*(x.transpose(1, 2).split(row_counts, 2) for x in (grad, output)), lse.split(row_counts, 1))
        for (chunk, q, k, v), (g, o, l) in zip(_walk(plan, query, key, value), per_row, strict=True):
            grad_q, grad_k, grad_v = _backward(
                g, q, k, v, o, l.transpose(1, 2), 0.0, False, attn_mask=plan.bias(chunk, q.dtype), scale=ctx.scale
            )
            grad_queries.append(grad_q.transpose(1, 2))
            position = 0
            for low, high in chunk.keys:
                grad_key[:, low:high] += grad_k[:, :, position : position + high - low].transpose(1, 2)
                grad_value[:, low:high] += grad_v[:, :, position : position + high - low].transpose(1, 2)
                position += high - low
        grad_query = torch.cat(grad_queries, 1) if grad_queries else query
        grads = (_scatter(grad_query, plan, ctx.rows, 0.0), grad_key.to(key.dtype), grad_value.to(key.dtype))
        return *(x[..., :head_dim] for x in grads), None, None


def _walk(plan: ChunkPlan, query: Tensor, key: Tensor, value: Tensor) -> Iterator[tuple[Chunk, Tensor, Tensor, Tensor]]:
    """Each chunk with its queries, keys and values as ``[B, H, rows or keys, D]``.

    A chunk that reads one interval of keys gets a view. One that reads several gets them side by side in a buffer that
    is refilled only where it differs from what the chunk before left there, so copying costs O(K) in all.
    """
    buffers = [x.new_empty(x.shape[0], plan.buffer_keys, *x.shape[2:]) for x in (key, value)]
    queries = query.transpose(1, 2).split([chunk.num_rows for chunk in plan.chunks], 2) if plan.chunks else ()
    for chunk, q in zip(plan.chunks, queries, strict=True):
        if len(chunk.keys) == 1:
            low, high = chunk.keys[0]
            yield chunk, q, key[:, low:high].transpose(1, 2), value[:, low:high].transpose(1, 2)
            continue
        for position, start, count in chunk.refills:
            for buffer, x in zip(buffers, (key, value), strict=True):
                buffer[:, position : position + count] = x[:, start : start + count]
        k, v = (buffer[:, : chunk.num_keys].transpose(1, 2) for buffer in buffers)
        yield chunk, q, k, v


def _gather(x: Tensor, plan: ChunkPlan) -> Tensor:
    """Rows in plan order."""
    return _unit_stride(x) if plan.order is None else x.index_select(1, plan.order)


def _scatter(x: Tensor, plan: ChunkPlan, rows: int, blind: float) -> Tensor:
    """Rows back in the mask's order; rows that see nothing get ``blind``."""
    if plan.order is None:
        return x
    shape = (x.shape[0], rows, *x.shape[2:])
    result = x.new_empty(shape) if plan.order.numel() == rows else x.new_full(shape, blind)
    return result.index_copy_(1, plan.order, x)


def _unit_stride(x: Tensor) -> Tensor:
    """The kernels need features side by side in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()
