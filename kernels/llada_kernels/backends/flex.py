"""The FlexAttention backend: PyTorch's own compiler of block-sparse attention, for GPUs where nothing better runs.

The tiles to visit are ours, from the endpoints; the mask inside partial tiles is a function that reads the endpoints.
Nothing of the size rows x keys exists, and one compilation serves all masks with the same number of intervals.

Legend: B batch, S rows, K keys, H heads, D head dim; FlexAttention takes ``[B, H, S, D]`` views.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask

from llada_kernels.interval_mask import IntervalMask
from llada_kernels.tiles import TileList, TileLists

SUMMARY = "torch flex_attention, compiled"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MIN_HEAD_DIM = 16  # of the Triton template
TILE = 128  # what BlockMask is made of by default, and what the template's own tiles divide
RETURNS_AUX = hasattr(torch_flex, "AuxRequest")  # since PyTorch 2.9; before, return_lse
MAX_GRAPHS = 64

# Short queries would go to a decoding kernel that groups heads in powers of two only.
KERNEL_OPTIONS = {"FORCE_USE_FLEX_ATTENTION": True}


def obstacle(device: torch.device, dtype: torch.dtype | None, head_dim: int | None) -> str | None:
    """It runs on GPUs of compute capability 8.0 and later. On the CPU, PyTorch has no backward pass of it."""
    if device.type != "cuda":
        return f"torch has no backward pass of it on {device.type}"
    if not torch.cuda.is_available():
        return "CUDA is not available"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 or later"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype is not None and dtype not in DTYPES:
        return f"it does not compute in {dtype}"
    if head_dim is not None and head_dim < MIN_HEAD_DIM:
        return f"head dim {head_dim} is below {MIN_HEAD_DIM}"
    return None


def attention(
    query_BSHD: Tensor,
    key_BKHD: Tensor,
    value_BKHD: Tensor,
    mask: IntervalMask,
    scale: float,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention that visits live tiles only; deterministic, with float32 accumulation."""
    plan = FlexPlan.of(mask)
    query, key, value = (x.transpose(1, 2) for x in (query_BSHD, key_BKHD, value_BKHD))
    # Not the usual scale as a number: a second one, for another head dim, would be compiled as a variable.
    given_scale = None if scale == 1 / math.sqrt(query.shape[-1]) else scale
    output_BHSD, lse_BHS = _compiled()(query, key, value, plan.block_mask, given_scale)
    if plan.blind_S is not None:
        # These are their values already. The fills keep what arrives in the backward pass, NaN included, from going on.
        output_BHSD = output_BHSD.masked_fill(plan.blind_S[:, None], 0.0)
        lse_BHS = lse_BHS.masked_fill(plan.blind_S, -math.inf)
    return output_BHSD.transpose(1, 2), lse_BHS.transpose(1, 2)


@dataclass(frozen=True, eq=False)
class FlexPlan:
    """What FlexAttention needs of a mask, on its device: a ``BlockMask``, and bool ``[S]`` where rows see nothing."""

    block_mask: BlockMask
    blind_S: Tensor | None  # None when there is no such row

    @classmethod
    def of(cls, mask: IntervalMask) -> FlexPlan:
        """The plan of ``mask``, built on first use and kept on the mask."""
        if "flex" not in mask.plans:
            mask.plans["flex"] = cls.build(mask)
        return mask.plans["flex"]

    @classmethod
    def build(cls, mask: IntervalMask) -> FlexPlan:
        """Build a plan; the device does not wait for the host, nor the host for it."""
        tiles = TileLists.of(mask, TILE, TILE)
        block_mask = BlockMask.from_kv_blocks(
            *_block_lists(tiles.row_partial, tiles.key_tiles),
            *_block_lists(tiles.row_full, tiles.key_tiles),
            BLOCK_SIZE=(TILE, TILE),
            mask_mod=_mask_mod(mask.endpoints),
            seq_lengths=(mask.total_q, mask.total_k),
        )
        blind_S = mask.host().visible_counts() == 0
        return cls(block_mask, blind_S.to(mask.endpoints.device) if bool(blind_S.any()) else None)


def _block_lists(tiles: TileList, width: int) -> tuple[Tensor, Tensor]:
    """Number and indices of key tiles for each row tile, int32 ``[1, 1, tiles]`` and ``[1, 1, tiles, width]``.

    As wide as there are key tiles: the transpose that ``BlockMask`` makes counts columns by it, and a width that does
    not depend on the data does not make the compiler start again.
    """
    return tiles.counts()[None, None], tiles.padded(width)[None, None]


def _mask_mod(endpoints: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether a row sees a key, from the endpoints."""
    first, *bounds = endpoints.unbind()
    # Tensors in a tuple: a number of intervals, or a range, would be taken for something dynamic when it changes.
    intervals = tuple(zip(bounds[::2], bounds[1::2], strict=True))

    def visible(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        sees = key < first[row]
        for low, high in intervals:
            sees = sees | ((key >= low[row]) & (key < high[row]))
        return sees

    return visible


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    """Compiled on first use. Whole, or it fails: run as it stands, FlexAttention would make all scores at once."""
    # One graph for each dtype, head layout and number of intervals, with and without gradients, and for lengths that
    # vary; PyTorch stops at 8 by default.
    config = torch._dynamo.config  # imported here: it takes seconds
    config.cache_size_limit = max(config.cache_size_limit, MAX_GRAPHS)
    return torch.compile(_attention_with_lse, fullgraph=True)


def _attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scale: float | None
) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {"scale": scale, "enable_gqa": True, "kernel_options": KERNEL_OPTIONS}
    if RETURNS_AUX:
        output, aux = torch_flex.flex_attention(
            query, key, value, block_mask=block_mask, return_aux=torch_flex.AuxRequest(lse=True), **options
        )
        return output, aux.lse
    return torch_flex.flex_attention(query, key, value, block_mask=block_mask, return_lse=True, **options)
