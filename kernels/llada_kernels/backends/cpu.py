"""The CPU backend: aten's fused CPU attention, called on the chunks of a plan that hold visible pairs only.

Legend: B batch, S rows, K keys, H heads, D head dim, N batch of a call: B, or the rectangles of a tile if B is 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from llada_kernels.backends import reference
from llada_kernels.backends.chunk_forward import refills
from llada_kernels.backends.chunk_plan import ChunkPlan
from llada_kernels.backends.chunk_tiles import Interval, Tile
from llada_kernels.backends.strides import unit_stride
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
    query, key, value = (unit_stride(x) for x in (query_BSHD, key_BKHD, value_BKHD))
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
        for tile, k, v, bias in _walk(plan, key, value):
            part, part_lse = _forward(_rows(query, tile).float(), k, v, 0.0, False, attn_mask=bias, scale=scale)
            _rows(output, tile).copy_(part)
            _rows(lse, tile).copy_(part_lse)
        ctx.save_for_backward(query, key, value, output, lse)
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> Any:
        query, key, value, output, lse = ctx.saved_tensors
        dtype, head_dim = query.dtype, query.shape[-1]
        grad_output = torch.zeros_like(output) if grad_output is None else unit_stride(grad_output)
        if grad_lse is not None:
            # The kernel takes no gradient of the lse. Its softmax gradient is P * (dO . V - dO . O); with one more
            # feature, V = 0, O = 1 and dO = -dlse there, the last term becomes dO . O - dlse, which is what is wanted.
            grad_output = torch.cat((grad_output.float(), -grad_lse[..., None]), -1)
            output = pad(output, (0, 1), value=1.0)
            query, key, value = pad(query, (0, 1)), pad(key, (0, 1)), pad(value, (0, 1))
        totals = [torch.zeros_like(x, dtype=torch.float32) for x in (query, key, value)]
        for tile in ctx.plan.backward:
            q, o, lse_, grad = (_rows(x, tile).float() for x in (query, output, lse, grad_output))
            k, v = (_keys(x, tile).float() for x in (key, value))
            bias = ctx.plan.bias(tile)
            parts = _backward(grad, q, k, v, o, lse_, 0.0, False, attn_mask=bias, scale=ctx.scale)
            for total, part, cut in zip(totals, parts, (_rows, _keys, _keys), strict=True):
                cut(total, tile).add_(part)
        grads = []
        while totals:  # each float32 sum goes when its gradient is there
            grads.append(totals.pop(0)[..., :head_dim].to(dtype))
        return *grads, None, None


def _walk(plan: ChunkPlan, key: Tensor, value: Tensor) -> Iterator[tuple[Tile, Tensor, Tensor, Tensor | None]]:
    """Each tile of the forward pass with its keys and values, float32 ``[N, H, keys, D]``, and additive mask.

    A tile that reads one interval of float32 keys gets views. Others get their keys side by side in a buffer that is
    refilled only where it differs from what the tile before left there. In descending order prefixes shrink, so nearly
    all of it stays.
    """
    zeros = key.new_zeros(1, 1, plan.masked_rows, plan.masked_keys, dtype=torch.float32)
    for (count, _, step), group in groupby(
        reversed(plan.forward), lambda tile: (tile.count, tile.row_step, tile.key_step)
    ):
        tiles = list(group)
        copied = [len(tile.keys) > 1 or key.dtype != torch.float32 for tile in tiles]
        capacity = max((tile.num_keys for tile, copy in zip(tiles, copied, strict=True) if copy), default=0)
        shape = (key.shape[0] * count, key.shape[2], capacity, key.shape[3])
        buffers = [x.new_empty(shape, dtype=torch.float32) for x in (key, value)]
        held: tuple[Interval, ...] = ()
        for tile, copy in zip(tiles, copied, strict=True):
            if copy:
                for position, first, size in refills(held, tile.keys):
                    for buffer, x in zip(buffers, (key, value), strict=True):
                        buffer.narrow(2, position, size).copy_(_windows(x, first, size, step, count))
                held = tile.keys
                k, v = (buffer.narrow(2, 0, tile.num_keys) for buffer in buffers)
            else:
                k, v = (_keys(x, tile) for x in (key, value))
            bias = plan.bias(tile)
            if bias is None:
                yield tile, k, v, None
                continue
            # Right-aligned, so that the zeros over the keys that all rows see are written once for all tiles.
            padded = zeros[:, :, : tile.num_rows, -tile.num_keys :]
            unshared = padded.narrow(3, tile.shared_keys, bias.shape[1]).copy_(bias)
            yield tile, k, v, padded
            unshared.zero_()


def _rows(x: Tensor, tile: Tile) -> Tensor:
    """Views of a tile's rows of ``[B, S, H, ...]``, as ``[N, H, rows, ...]``."""
    return _windows(x, tile.first_row, tile.num_rows, tile.row_step, tile.count)


def _keys(x: Tensor, tile: Tile) -> Tensor:
    """Views of the one interval of a tile's keys of ``[B, K, H, ...]``, as ``[N, H, keys, ...]``."""
    return _windows(x, tile.keys[0][0], tile.num_keys, tile.key_step, tile.count)


def _windows(x: Tensor, first: int, size: int, step: int, count: int) -> Tensor:
    """``count`` stretches of dim 1, ``step`` apart, with the heads before them; N is the batch if ``count`` is 1."""
    batch, _, heads, *rest = x.shape
    of_batch, of_row, of_head, *of_rest = x.stride()
    outer, of_outer = (batch, of_batch) if count == 1 else (count, step * of_row)
    strides = (of_outer, of_head, of_row, *of_rest)
    return x.as_strided((outer, heads, size, *rest), strides, x.storage_offset() + first * of_row)
