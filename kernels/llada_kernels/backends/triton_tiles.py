"""The Triton backend: own kernels over the live tiles of a mask (``tiles.py``, ``triton_kernels.py``).

No GPU has run these kernels yet. They are checked in Triton's interpreter, and compiled for compute capabilities 8.0,
9.0 and 10.0 (``triton_compile.py``): there nothing spills, and all products of tiles are HMMA, HGMMA (warp groups) and
UTCHMMA (tensor memory) instructions.

Legend: B batch, S query rows, K keys, Hq query heads, Hk key heads, D head dim.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llada_kernels.backends.strides import unit_stride
from llada_kernels.interval_mask import IntervalMask
from llada_kernels.tiles import TileLists

SUMMARY = "Triton kernels over live tiles"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
PADDED_ROWS = 128  # the backward reads statistics of whole row tiles, which must divide this
STATISTICS_ROWS = 32


@dataclass(frozen=True)
class Launch:
    """How one kernel is compiled: rows and keys of its tiles, warps of a program, stages of its software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Launches:
    """The launches of the forward, dQ, and dK with dV."""

    forward: Launch
    query: Launch
    key_value: Launch


# Chosen so that nothing spills in 16 bits and the stages fit into shared memory, as ``triton_compile`` shows; not yet
# timed. The key is the largest head dim. AMPERE also fits the 99 KiB of the smaller GPUs (8.6, 8.9, 12.0).
AMPERE = {
    64: Launches(Launch(128, 64, 8, 2), Launch(128, 64, 8, 2), Launch(64, 64, 8, 2)),
    128: Launches(Launch(64, 64, 8, 2), Launch(64, 64, 8, 2), Launch(64, 64, 8, 2)),
    256: Launches(Launch(64, 32, 8, 1), Launch(64, 32, 8, 1), Launch(32, 32, 8, 1)),
}
HOPPER = {
    64: Launches(Launch(128, 128, 8, 3), Launch(128, 128, 8, 2), Launch(64, 128, 8, 3)),
    128: Launches(Launch(128, 64, 8, 3), Launch(128, 64, 8, 3), Launch(32, 128, 8, 2)),
    256: Launches(Launch(64, 64, 8, 2), Launch(64, 32, 8, 2), Launch(32, 32, 8, 2)),
}
BLACKWELL = {
    64: Launches(Launch(128, 128, 8, 3), Launch(128, 64, 8, 2), Launch(64, 128, 4, 3)),
    128: Launches(Launch(128, 64, 8, 3), Launch(128, 64, 8, 2), Launch(64, 128, 8, 2)),
    256: Launches(Launch(64, 32, 8, 2), Launch(64, 32, 8, 2), Launch(32, 64, 8, 2)),
}
BY_MAJOR_CAPABILITY = {9: HOPPER, 10: BLACKWELL}
# Exact float32 products run outside the matrix units, from registers: for comparisons, not for speed.
FLOAT32 = Launches(Launch(16, 16, 8, 1), Launch(16, 16, 8, 1), Launch(16, 16, 8, 1))
INTERPRETED = Launches(Launch(16, 32, 4, 1), Launch(32, 16, 4, 1), Launch(16, 32, 4, 1))


def choose_launches(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> Launches:
    """The launches for a compute capability."""
    if dtype == torch.float32:
        return FLOAT32
    table = BY_MAJOR_CAPABILITY.get(capability[0], AMPERE)
    return next(launches for largest, launches in table.items() if head_dim <= largest)


def obstacle(device: torch.device, dtype: torch.dtype | None, head_dim: int | None) -> str | None:
    """It runs on NVIDIA GPUs of compute capability 8.0 and later, and in Triton's interpreter on the CPU."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():
        if device.type != "cpu":
            return f"TRITON_INTERPRET=1 is set, and the interpreter does not run on {device.type}"
        if dtype == torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 wrongly"  # seen with 3.8.0 and 3.9.0
    elif device.type != "cuda":
        return f"it does not run on {device.type} (on the CPU: in the interpreter, TRITON_INTERPRET=1)"
    elif not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    elif torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs an NVIDIA GPU of compute capability 8.0 or later"
    if dtype is not None and dtype not in DTYPES:
        return f"it does not compute in {dtype}"
    if head_dim is not None and head_dim > MAX_HEAD_DIM:
        return f"head dim {head_dim} is above {MAX_HEAD_DIM}"
    return None


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, which it decides when they are defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def attention(
    query_BSHD: Tensor,
    key_BKHD: Tensor,
    value_BKHD: Tensor,
    mask: IntervalMask,
    scale: float,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention that computes live tiles only; float32, bfloat16 and float16, accumulated in float32; memory O(S).

    Always deterministic. float32 products are exact float32 (no TF32).

    Returns:
        Output ``[B, S, Hq, D]``, log-sum-exp float32 ``[B, S, Hq]``.
    """
    return _TileAttention.apply(query_BSHD, key_BKHD, value_BKHD, mask, scale)


class _TileAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: IntervalMask, scale: float) -> Any:
        query, key, value = (unit_stride(x) for x in (query, key, value))
        ctx.mask, ctx.scale = mask, scale
        output, lse = forward(query, key, value, mask, scale, _launches(query).forward)
        ctx.save_for_backward(query, key, value, output, lse)
        return output, lse.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> Any:
        query, key, value, output, lse = ctx.saved_tensors
        grads = backward(
            query,
            key,
            value,
            output,
            lse,
            unit_stride(grad_output),
            grad_lse,
            ctx.mask,
            ctx.scale,
            _launches(query),
        )
        return *grads, None, None


def forward(
    query: Tensor, key: Tensor, value: Tensor, mask: IntervalMask, scale: float, launch: Launch
) -> tuple[Tensor, Tensor]:
    """Output ``[B, S, Hq, D]`` and log-sum-exp float32 ``[B, Hq, S]``."""
    from llada_kernels.backends.triton_kernels import forward_kernel

    batch, rows, heads, _ = query.shape
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=query.device)
    endpoints = mask.endpoints.contiguous()
    tiles = TileLists.of(mask, launch.block_m, launch.block_n)
    with torch.cuda.device_of(query):
        forward_kernel[batch * heads, tiles.row_tiles](
            query,
            key,
            value,
            output,
            lse,
            endpoints,
            *_row_lists(tiles),
            scale,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            mask.total_q,
            mask.total_k,
            **_constants(query, key, mask, launch),
        )
    return output, lse


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor,
    mask: IntervalMask,
    scale: float,
    launches: Launches,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous, in their dtype."""
    from llada_kernels.backends import triton_kernels as kernels

    batch, rows, heads, head_dim = query.shape
    grad_query, grad_key, grad_value = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)
    )
    padded = -(-rows // PADDED_ROWS) * PADDED_ROWS
    lse_2, delta = torch.empty(2, batch, heads, padded, dtype=torch.float32, device=query.device)
    inputs = (query, key, value, grad_output, lse_2, delta)
    strides = tuple(stride for x in (query, key, value, grad_output) for stride in x.stride()[:3])
    sizes = (rows, padded, mask.total_k)
    endpoints = mask.endpoints.contiguous()
    by_query, by_key = launches.query, launches.key_value
    tiles = TileLists.of(mask, by_query.block_m, by_query.block_n)
    with torch.cuda.device_of(query):
        kernels.statistics_kernel[batch * heads, padded // STATISTICS_ROWS](
            output,
            grad_output,
            lse,
            grad_lse,
            lse_2,
            delta,
            *grad_output.stride()[:3],
            *grad_lse.stride(),
            rows,
            padded,
            HEADS=heads,
            BLOCK_M=STATISTICS_ROWS,
            BLOCK_D=_block_d(head_dim),
            HEAD_DIM=head_dim,
            enable_fp_fusion=True,
        )
        kernels.query_gradient_kernel[batch * heads, tiles.row_tiles](
            *inputs,
            grad_query,
            endpoints,
            *_row_lists(tiles),
            scale,
            *strides,
            *sizes,
            **_constants(query, key, mask, by_query),
        )
        tiles = TileLists.of(mask, by_key.block_m, by_key.block_n)
        kernels.key_value_gradient_kernel[batch * key.shape[2], tiles.key_tiles](
            *inputs,
            grad_key,
            grad_value,
            endpoints,
            *_key_lists(tiles),
            scale,
            *strides,
            *sizes,
            **_constants(query, key, mask, by_key),
        )
    return grad_query, grad_key, grad_value


def _block_d(head_dim: int) -> int:
    """The head dim of tiles: a power of two, at least the 16 that a matrix product takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _launches(query: Tensor) -> Launches:
    if query.device.type == "cpu":
        return INTERPRETED
    return choose_launches(torch.cuda.get_device_capability(query.device), query.dtype, query.shape[-1])


def _constants(query: Tensor, key: Tensor, mask: IntervalMask, launch: Launch) -> dict[str, Any]:
    return {
        "HEADS": query.shape[2],
        "GROUP": query.shape[2] // key.shape[2],
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_D": _block_d(query.shape[3]),
        "HEAD_DIM": query.shape[3],
        "NFUNC": mask.endpoints.shape[0],
        "PRECISION": "ieee",
        "enable_fp_fusion": True,  # fused multiply-adds
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


def _row_lists(tiles: TileLists) -> tuple[Tensor, ...]:
    full, partial = tiles.row_full, tiles.row_partial
    return tiles.row_order, full.offsets, full.indices, partial.offsets, partial.indices


def _key_lists(tiles: TileLists) -> tuple[Tensor, ...]:
    full, partial = tiles.key_full, tiles.key_partial
    return tiles.key_order, full.offsets, full.indices, partial.offsets, partial.indices
