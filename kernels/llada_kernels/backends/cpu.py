"""The CPU backend: aten's fused CPU attention, called on the chunks of a plan that hold visible pairs only.

Legend: B batch, S rows, K keys, H heads, D head dim; kernels see ``[B, H, S, D]`` views of ``[B, S, H, D]`` tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from llada_kernels.backends import reference
from llada_kernels.backends.chunk_plan import Chunk, ChunkPlan, Interval, refills
from llada_kernels.backends.chunk_tiles import Tile
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

    float32, bfloat16 and float16 run fused in float32 (small half-precision products are slower, not faster, on a CPU);
    any other dtype runs the reference.
    """
    if query_BSHD.dtype not in FUSED_DTYPES:
        return reference.attention(query_BSHD, key_BKHD, value_BKHD, mask, scale, deterministic)
    batch, _, heads, head_dim = query_BSHD.shape
    if not GROUPED_HEADS:
        repeats = heads // key_BKHD.shape[2]
        key_BKHD, value_BKHD = (x.repeat_interleave(repeats, 2) for x in (key_BKHD, value_BKHD))
    plan = ChunkPlan.of(mask, batch, heads, head_dim)
    query, key, value = (_unit_stride(x) for x in (query_BSHD, key_BKHD, value_BKHD))
    return _ChunkedAttention.apply(query, key, value, plan, scale)


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: ChunkPlan, scale: float) -> Any:
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.scale = plan, scale
        output = query.new_empty(query.shape)
        lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
        if not plan.all_rows_see:
            output.zero_()
            lse.fill_(-math.inf)
        for chunk, k, v, bias in _walk(plan, key, value):
            q = query.narrow(1, chunk.first_row, chunk.num_rows).transpose(1, 2).float()
            part, part_lse = _forward(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
            output.narrow(1, chunk.first_row, chunk.num_rows).copy_(part.transpose(1, 2))
            lse.narrow(1, chunk.first_row, chunk.num_rows).copy_(part_lse.transpose(1, 2))
        ctx.save_for_backward(query, key, value, output, lse)
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> Any:
        query, key, value, output, lse = ctx.saved_tensors
        dtype, head_dim = query.dtype, query.shape[-1]
        grad_output = torch.zeros_like(output) if grad_output is None else _unit_stride(grad_output)
        if grad_lse is not None:
            # The kernel takes no gradient of the lse. Its softmax gradient is P * (dO . V - dO . O); with one more
            # feature, V = 0, O = 1 and dO = -dlse there, the last term becomes dO . O - dlse, which is what is wanted.
            grad_output = torch.cat((grad_output.float(), -grad_lse[..., None]), -1)
            output = pad(output, (0, 1), value=1.0)
            query, key, value = pad(query, (0, 1)), pad(key, (0, 1)), pad(value, (0, 1))
        totals = [torch.zeros_like(x, dtype=torch.float32) for x in (query, key, value)]
        for tile in ctx.plan.tiles:
            q, o, lse_, grad = (_rows(x, tile).flatten(0, 1).float() for x in (query, output, lse, grad_output))
            k, v = (_keys(x, tile).flatten(0, 1).float() for x in (key, value))
            bias = ctx.plan.tile_bias(tile)
            parts = _backward(grad, q, k, v, o, lse_, 0.0, False, attn_mask=bias, scale=ctx.scale)
            for total, part, cut in zip(totals, parts, (_rows, _keys, _keys), strict=True):
                views = cut(total, tile)
                views.add_(part.unflatten(0, views.shape[:2]))
        grads = []
        while totals:  # each float32 sum goes when its gradient is there
            grads.append(totals.pop(0)[..., :head_dim].to(dtype))
        return *grads, None, None


def _walk(plan: ChunkPlan, key: Tensor, value: Tensor) -> Iterator[tuple[Chunk, Tensor, Tensor, Tensor | None]]:
    """Each chunk with its keys and values, float32 ``[B, H, keys, D]``, and its additive mask.

    A chunk that reads one interval of float32 keys gets a view. Others get their keys side by side in a buffer that is
    refilled only where it differs from what the last such chunk left there, so copying costs O(K) in all.
    """
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    batch, heads, _, head_dim = key.shape
    buffered = {chunk for chunk in plan.chunks if len(chunk.keys) > 1 or key.dtype != torch.float32}
    shape = (batch, heads, max((chunk.num_keys for chunk in buffered), default=0), head_dim)
    key_buffer, value_buffer = (x.new_empty(shape, dtype=torch.float32) for x in (key, value))
    bias_buffer = key.new_zeros(1, 1, plan.bias_rows, plan.bias_keys, dtype=torch.float32)
    held: tuple[Interval, ...] = ()
    for chunk in plan.chunks:
        if chunk in buffered:
            for position, first, count in refills(held, chunk.keys):
                key_buffer.narrow(2, position, count).copy_(key.narrow(2, first, count))
                value_buffer.narrow(2, position, count).copy_(value.narrow(2, first, count))
            held = chunk.keys
            k, v = (x.narrow(2, 0, chunk.num_keys) for x in (key_buffer, value_buffer))
        else:
            k, v = (x.narrow(2, chunk.keys[0][0], chunk.num_keys) for x in (key, value))
        if chunk.full:
            yield chunk, k, v, None
            continue
        # Right-aligned, so that the zeros over the keys that all rows see are written once for all chunks.
        bias = bias_buffer[:, :, : chunk.num_rows, -chunk.num_keys :]
        unshared = bias[..., chunk.shared_keys :].copy_(plan.chunk_bias(chunk))
        yield chunk, k, v, bias
        unshared.zero_()


def _rows(x: Tensor, tile: Tile) -> Tensor:
    """Views of a tile's rows of ``[B, S, H, ...]``, as ``[B, count, H, rows, ...]``."""
    return _windows(x, tile.first_row, tile.num_rows, tile.row_step, tile.count)


def _keys(x: Tensor, tile: Tile) -> Tensor:
    """Views of a tile's keys of ``[B, K, H, ...]``, as ``[B, count, H, keys, ...]``."""
    return _windows(x, tile.first_key, tile.num_keys, tile.key_step, tile.count)


def _windows(x: Tensor, first: int, size: int, step: int, count: int) -> Tensor:
    batch, _, heads, *rest = x.shape
    of_batch, of_row, of_head, *of_rest = x.stride()
    strides = (of_batch, step * of_row, of_head, of_row, *of_rest)
    return x.as_strided((batch, count, heads, size, *rest), strides, x.storage_offset() + first * of_row)


def _unit_stride(x: Tensor) -> Tensor:
    """The kernels need features side by side in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()
