"""The CPU backend: aten's fused CPU attention, called on the chunks of a plan that hold visible pairs only.

Legend: B batch, S rows, K keys, H heads, D head dim; kernels see ``[B, H, S, D]`` views of ``[B, S, H, D]`` tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from llada_kernels.backends import reference
from llada_kernels.backends.chunk_plan import Chunk, ChunkPlan
from llada_kernels.interval_mask import IntervalMask

SUMMARY = "fused chunks of visible pairs on the CPU"
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# aten's kernel groups query heads by key head since PyTorch 2.9 (pull request 157893); before, key heads are repeated.
GROUPED_HEADS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def obstacle(device: torch.device, dtype: torch.dtype | None, head_dim: int | None) -> str | None:
    """It runs on the CPU only."""
    return None if device.type == "cpu" else f"it does not run on {device.type}"


def attention(
    query_BSHD: Tensor,
    key_BKHD: Tensor,
    value_BKHD: Tensor,
    mask: IntervalMask,
    scale: float,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention that computes little more than the visible pairs; memory O(S).

    float32, bfloat16 and float16 run fused with float32 accumulation; any other dtype runs the reference.
    """
    if query_BSHD.dtype not in FUSED_DTYPES:
        return reference.attention(query_BSHD, key_BKHD, value_BKHD, mask, scale, deterministic)
    batch, _, heads, head_dim = query_BSHD.shape
    if not GROUPED_HEADS:
        repeats = heads // key_BKHD.shape[2]
        key_BKHD, value_BKHD = (x.repeat_interleave(repeats, 2) for x in (key_BKHD, value_BKHD))
    plan = ChunkPlan.of(mask, batch, heads, key_BKHD.shape[2], head_dim)
    return _ChunkedAttention.apply(query_BSHD, key_BKHD, value_BKHD, plan, scale)


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: ChunkPlan, scale: float) -> Any:
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.scale, ctx.rows = plan, scale, query.shape[1]
        query, key, value = _gather(query, plan), _unit_stride(key), _unit_stride(value)
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
        grad_output = torch.zeros_like(output) if grad_output is None else _gather(grad_output, plan)
        if grad_lse is not None:
            # The kernel takes no gradient of the lse. Its softmax gradient is P * (dO . V - dO . O); with one more
            # feature, V = 0, O = 1 and dO = -dlse there, the last term becomes dO . O - dlse, which is what is wanted.
            extra = -_gather(grad_lse, plan)[..., None].to(grad_output.dtype)
            grad_output, output = torch.cat((grad_output, extra), -1), pad(output, (0, 1), value=1.0)
            query, key, value = pad(query, (0, 1)), pad(key, (0, 1)), pad(value, (0, 1))
        grad_key, grad_value = (torch.zeros_like(x, dtype=torch.float32).transpose(1, 2) for x in (key, value))
        grad_queries = []
        rows = zip(_chunk_rows(plan, grad_output), _chunk_rows(plan, output), _chunk_rows(plan, lse), strict=True)
        for (chunk, q, k, v), (grad, out, lse_) in zip(_walk(plan, query, key, value), rows, strict=True):
            bias = plan.bias(chunk, q.dtype)
            grad_q, *grad_kv = _backward(grad, q, k, v, out, lse_, 0.0, False, attn_mask=bias, scale=ctx.scale)
            grad_queries.append(grad_q.transpose(1, 2))
            position = 0
            for low, high in chunk.keys:
                for total, part in zip((grad_key, grad_value), grad_kv, strict=True):
                    total.narrow(2, low, high - low).add_(part.narrow(2, position, high - low))
                position += high - low
        grad_query = _scatter(torch.cat(grad_queries, 1) if grad_queries else query, plan, ctx.rows, 0.0)
        grad_key, grad_value = (x.transpose(1, 2).to(key.dtype) for x in (grad_key, grad_value))
        return *(x[..., :head_dim] for x in (grad_query, grad_key, grad_value)), None, None


def _walk(plan: ChunkPlan, query: Tensor, key: Tensor, value: Tensor) -> Iterator[tuple[Chunk, Tensor, Tensor, Tensor]]:
    """Each chunk with its queries, keys and values as ``[B, H, rows or keys, D]``.

    A chunk that reads one interval of keys gets a view. One that reads several gets them side by side in a buffer that
    is refilled only where it differs from what the chunk before left there, so copying costs O(K) in all.
    """
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    batch, heads, _, head_dim = key.shape
    key_buffer, value_buffer = (
        x.new_empty(batch, plan.buffer_keys, heads, head_dim).transpose(1, 2) for x in (key, value)
    )
    for chunk, q in zip(plan.chunks, _chunk_rows(plan, query), strict=True):
        if len(chunk.keys) == 1:
            low, high = chunk.keys[0]
            yield chunk, q, key.narrow(2, low, high - low), value.narrow(2, low, high - low)
            continue
        for position, start, count in chunk.refills:
            key_buffer.narrow(2, position, count).copy_(key.narrow(2, start, count))
            value_buffer.narrow(2, position, count).copy_(value.narrow(2, start, count))
        yield chunk, q, key_buffer.narrow(2, 0, chunk.num_keys), value_buffer.narrow(2, 0, chunk.num_keys)


def _chunk_rows(plan: ChunkPlan, x: Tensor) -> Sequence[Tensor]:
    """Views of each chunk's rows of ``[B, rows, H, ...]`` in plan order, as ``[B, H, rows, ...]``."""
    return x.transpose(1, 2).split([chunk.num_rows for chunk in plan.chunks], 2) if plan.chunks else ()


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
