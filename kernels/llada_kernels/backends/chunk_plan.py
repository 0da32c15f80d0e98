"""Cut an interval mask into few rectangles of query rows and keys that waste little: the plan of the CPU backend.

Rows are first put into an order in which neighbours see almost the same keys (for block diffusion: the clean rows of
block j - 1 next to the noisy rows of block j, which share the clean prefix), then cut where going on would waste more
on pairs nobody sees than a further chunk costs. Rows that see nothing and keys nobody sees appear in no chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from llada_kernels.interval_mask import IntervalMask, visible_keys

Interval = tuple[int, int]

# What a chunk costs beyond its pairs, forward and backward together, in pairs of one row and one key. Measured on one
# core (AVX-512, torch 2.13): about 45 us a chunk, against 14 FLOPs x heads x head dim a pair at 90 GFLOP/s.
CHUNK_COST_FLOPS = 280_000
# Accumulating the gradient of one key and value, in pairs, when each query head has its own key head.
KEY_COST_ROWS = 6
# Rows of a chunk that needs an additive mask: bounds that mask, and so the memory, by O(keys).
MAX_MIXED_ROWS = 256
# Additive masks are kept with the plan up to this many elements (4 MiB in float32: a caller may hold dozens of masks),
# and rebuilt each time beyond it, which costs about 5 %.
CACHED_BIAS_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of the plan's order times the keys that any of them sees."""

    first_row: int
    num_rows: int
    keys: tuple[Interval, ...]  # disjoint [start, end), in the order in which the chunk reads them
    num_keys: int
    full: bool  # every row sees every key: no additive mask
    refills: tuple[tuple[int, int, int], ...]  # (position in the key buffer, first key, count) not yet there


@dataclass(frozen=True, eq=False)
class ChunkPlan:
    """Chunks that cover exactly the visible pairs of a mask, plus some invisible ones.

    Attributes:
        endpoints: int32 ``[nfunc, rows]`` of the rows that see something, in plan order.
        order: int64 ``[rows]``, the mask's row of each plan row; None when it is the identity over all rows.
        chunks: in the order in which they must run (the key buffer is refilled step by step).
        buffer_keys: size of the key buffer, 0 when every chunk reads one slice of keys.
    """

    built: ClassVar[int] = 0  # plans built in this process; tests read it

    endpoints: Tensor
    order: Tensor | None
    chunks: tuple[Chunk, ...]
    buffer_keys: int
    keep_biases: bool
    biases: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, mask: IntervalMask, batch: int, heads: int, key_heads: int, head_dim: int) -> ChunkPlan:
        """The plan of ``mask`` for attention of this shape, built on first use and kept on the mask."""
        costs = (CHUNK_COST_FLOPS // (batch * heads * head_dim), KEY_COST_ROWS * key_heads // heads)
        key = ("cpu", costs)
        if key not in mask.plans:
            mask.plans[key] = cls.build(mask, *costs)
        return mask.plans[key]

    @classmethod
    def build(cls, mask: IntervalMask, chunk_cost: int, key_cost: int) -> ChunkPlan:
        """Build a plan; costs in pairs, see the constants above. O(rows).

        Raises:
            ValueError: the endpoints are no valid mask.
        """
        mask.validate()
        cls.built += 1
        order = _order(mask)
        endpoints = mask.endpoints[:, order]
        chunks = tuple(_chunks(endpoints, chunk_cost, key_cost))
        identity = order.numel() == mask.total_q and bool((order[1:] > order[:-1]).all())
        return cls(
            endpoints=endpoints,
            order=None if identity else order,
            chunks=chunks,
            buffer_keys=max((chunk.num_keys for chunk in chunks if len(chunk.keys) > 1), default=0),
            keep_biases=sum(c.num_rows * c.num_keys for c in chunks if not c.full) <= CACHED_BIAS_ELEMENTS,
        )

    def bias(self, chunk: Chunk, dtype: torch.dtype) -> Tensor | None:
        """Additive mask ``[1, 1, rows, keys]``, 0 or -inf; None when the chunk needs none."""
        if chunk.full:
            return None
        key = (chunk.first_row, dtype)
        bias = self.biases.get(key)
        if bias is None:
            rows = self.endpoints[:, chunk.first_row : chunk.first_row + chunk.num_rows]
            visible = visible_keys(rows, torch.cat([torch.arange(*interval) for interval in chunk.keys]))
            bias = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)[None, None]
            if self.keep_biases:
                self.biases[key] = bias
        return bias

    def visited_pairs(self) -> int:
        """Number of (row, key) pairs that the chunks compute; at least the mask's area."""
        return sum(chunk.num_rows * chunk.num_keys for chunk in self.chunks)


def _order(mask: IntervalMask) -> Tensor:
    """Rows that see something, sorted by their last interval (int64 [rows])."""
    bound = mask.endpoints.long()
    low, high = torch.zeros_like(bound[0]), bound[0]
    for start, end in zip(bound[1::2], bound[2::2], strict=True):
        low, high = torch.where(end > start, start, low), torch.where(end > start, end, high)
    rows = (high > low).nonzero()[:, 0]
    return rows[(low * (mask.total_k + 1) + high)[rows].argsort(stable=True)]


def _runs(endpoints: Tensor) -> Iterator[tuple[int, list[Interval]]]:
    """Maximal runs of equal rows: how many, and the intervals they see."""
    columns, counts = torch.unique_consecutive(endpoints, dim=1, return_counts=True)
    for column, count in zip(columns.T.tolist(), counts.tolist(), strict=True):
        bounds = [0, *column]
        yield count, [(low, high) for low, high in zip(bounds[::2], bounds[1::2], strict=True) if high > low]


def _chunks(endpoints: Tensor, chunk_cost: int, key_cost: int) -> Iterator[Chunk]:
    """Cut the rows greedily; a chunk ends when its invisible pairs outweigh its own fixed cost."""
    first = rows = area = size = 0
    union: list[Interval] = []
    buffer: tuple[Interval, ...] = ()

    def close() -> Chunk:
        nonlocal buffer
        keys = tuple(reversed(union))  # the shared clean prefix first, so that the buffer keeps it
        refills: tuple[tuple[int, int, int], ...] = ()
        if len(keys) > 1:
            refills, buffer = _refills(buffer, keys), keys
        return Chunk(first, rows, keys, size, area == rows * size, refills)

    for run_rows, run in _runs(endpoints):
        run_size = _size(run)
        merged = _union(union, run)
        merged_size = _size(merged)
        pairs, merged_area = (rows + run_rows) * merged_size, area + run_rows * run_size
        fixed = chunk_cost + key_cost * merged_size
        apart = rows * size + run_rows * run_size + chunk_cost + key_cost * (size + run_size - merged_size)
        too_tall = pairs > merged_area and rows + run_rows > MAX_MIXED_ROWS
        if rows and (pairs - merged_area > fixed or pairs > apart or too_tall):
            yield close()
            first, rows, area = first + rows, 0, 0
            merged, merged_size, merged_area = run, run_size, run_rows * run_size
        union, size, area, rows = merged, merged_size, merged_area, rows + run_rows
    if rows:
        yield close()


def _refills(held: tuple[Interval, ...], wanted: tuple[Interval, ...]) -> tuple[tuple[int, int, int], ...]:
    """Copies that turn a buffer that holds the keys ``held`` into one that holds ``wanted``; a common start stays."""
    kept = 0
    for (low, high), (old_low, old_high) in zip(wanted, held, strict=False):
        if low == old_low:
            kept += min(high, old_high) - low
        if (low, high) != (old_low, old_high):
            break
    copies, position = [], 0
    for low, high in wanted:
        skip = min(max(kept - position, 0), high - low)
        if high - low > skip:
            copies.append((position + skip, low + skip, high - low - skip))
        position += high - low
    return tuple(copies)


def _union(a: list[Interval], b: list[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for low, high in sorted(a + b):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return merged


def _size(intervals: list[Interval]) -> int:
    return sum(high - low for low, high in intervals)
