"""Cut an interval mask into few rectangles that waste little: the plan of the CPU backend.

The forward pass needs all keys of a row at once. Its chunks are consecutive rows times the keys that any of them sees,
cut where going on would waste more on pairs nobody sees than a further chunk costs. The backward pass is a sum over
pairs and is cut freely, see ``chunk_tiles``. Rows that see nothing and keys nobody sees appear nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from llada_kernels.backends.chunk_tiles import (
    LINE_COST_PAIRS,
    MASKED_PAIR,
    MAX_MASKED_ROWS,
    TILE_COST_FLOPS,
    Cost,
    Pattern,
    Tile,
    run_starts,
    tiles,
)
from llada_kernels.interval_mask import IntervalMask, visible_keys

Interval = tuple[int, int]

# What a chunk costs beyond its pairs, tuned on one core (AVX-512, torch 2.13; twice as much hardly matters): itself, in
# heads x head dim x pairs, and each of its keys, in pairs.
CHUNK_COST_FLOPS = 600_000
KEY_COST_ROWS = 2
# Additive masks are kept with the plan up to this many elements (4 MiB in float32: a caller may hold dozens of masks),
# and rebuilt each time beyond it.
CACHED_BIAS_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of the mask times the keys that any of them sees."""

    first_row: int
    num_rows: int
    keys: tuple[Interval, ...]  # disjoint [start, end), in the order in which the chunk reads them
    num_keys: int
    shared_keys: int  # the first so many keys are seen by all rows: only the others need an additive mask

    @property
    def full(self) -> bool:
        """Every row sees every key."""
        return self.shared_keys == self.num_keys


@dataclass(frozen=True, eq=False)
class ChunkPlan:
    """Rectangles that cover exactly the visible pairs of a mask, plus some invisible ones.

    Attributes:
        endpoints: of the mask, int32 ``[nfunc, total_q]``.
        chunks: of the forward pass, ordered so that neighbours read almost the same keys.
        tiles: of the backward pass.
        all_rows_see: no row is blind.
        bias_rows, bias_keys: the most rows and keys of a chunk that needs an additive mask.
        keep_biases: additive masks are small enough to be kept.
    """

    built: ClassVar[int] = 0  # plans built in this process; tests read it

    endpoints: Tensor
    chunks: tuple[Chunk, ...]
    tiles: tuple[Tile, ...]
    all_rows_see: bool
    bias_rows: int
    bias_keys: int
    keep_biases: bool
    biases: dict[int | Pattern, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, mask: IntervalMask, batch: int, heads: int, head_dim: int) -> ChunkPlan:
        """The plan of ``mask`` for attention of this shape, built on first use and kept on the mask."""
        pair_flops = batch * heads * head_dim
        chunk_cost = Cost(CHUNK_COST_FLOPS // pair_flops, KEY_COST_ROWS)
        tile_cost = Cost(TILE_COST_FLOPS // pair_flops, LINE_COST_PAIRS)
        key = ("cpu", chunk_cost, tile_cost)
        if key not in mask.plans:
            mask.plans[key] = cls.build(mask, chunk_cost, tile_cost)
        return mask.plans[key]

    @classmethod
    def build(cls, mask: IntervalMask, chunk_cost: Cost, tile_cost: Cost) -> ChunkPlan:
        """Build a plan. O(rows log rows), most of it per run of equal rows.

        Raises:
            ValueError: the endpoints are no valid mask.
        """
        mask.validate()
        cls.built += 1
        chunks, backward = tuple(_chunks(mask.endpoints, chunk_cost)), tiles(mask.endpoints, tile_cost)
        masked = [chunk for chunk in chunks if not chunk.full]
        patterns = {tile.pattern: tile.num_rows * tile.num_keys for tile in backward if tile.pattern is not None}
        bias_elements = sum(chunk.num_rows * (chunk.num_keys - chunk.shared_keys) for chunk in masked)
        return cls(
            endpoints=mask.endpoints,
            chunks=chunks,
            tiles=backward,
            all_rows_see=sum(chunk.num_rows for chunk in chunks) == mask.total_q,
            bias_rows=max((chunk.num_rows for chunk in masked), default=0),
            bias_keys=max((chunk.num_keys for chunk in masked), default=0),
            keep_biases=bias_elements + sum(patterns.values()) <= CACHED_BIAS_ELEMENTS,
        )

    def chunk_bias(self, chunk: Chunk) -> Tensor:
        """Additive mask of the keys that not all rows see: float32 ``[rows, keys - shared keys]``, 0 or -inf."""
        bias = self.biases.get(chunk.first_row)
        if bias is None:
            rows = self.endpoints[:, chunk.first_row : chunk.first_row + chunk.num_rows]
            keys = torch.cat([torch.arange(*interval) for interval in chunk.keys])[chunk.shared_keys :]
            bias = self._keep(chunk.first_row, visible_keys(rows, keys))
        return bias

    def tile_bias(self, tile: Tile) -> Tensor | None:
        """Additive mask of one rectangle of a tile: float32 ``[rows, keys]``, 0 or -inf; None when it needs none."""
        if tile.pattern is None:
            return None
        bias = self.biases.get(tile.pattern)
        return self._keep(tile.pattern, tile.visible()) if bias is None else bias

    def _keep(self, key: int | Pattern, visible: Tensor) -> Tensor:
        bias = torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)
        if self.keep_biases:
            self.biases[key] = bias
        return bias

    def visited_pairs(self) -> tuple[int, int]:
        """Number of (row, key) pairs that the forward and the backward pass compute; at least the mask's area."""
        return (
            sum(chunk.num_rows * chunk.num_keys for chunk in self.chunks),
            sum(tile.count * tile.num_rows * tile.num_keys for tile in self.tiles),
        )


def _runs(endpoints: Tensor) -> Iterator[tuple[int, int, list[Interval]]]:
    """Maximal runs of equal rows that see something: first row, how many, and the intervals they see."""
    starts = run_starts(endpoints)
    rows = [*starts.tolist(), endpoints.shape[1]]
    for first, end, column in zip(rows, rows[1:], endpoints[:, starts].T.tolist(), strict=False):
        bounds = [0, *column]
        intervals = [(low, high) for low, high in zip(bounds[::2], bounds[1::2], strict=True) if high > low]
        if intervals:
            yield first, end - first, intervals


def _chunks(endpoints: Tensor, cost: Cost) -> Iterator[Chunk]:
    """Cut the rows greedily; a chunk ends when its invisible pairs outweigh its own fixed cost."""
    first = rows = area = size = 0
    union: list[Interval] = []
    runs: list[list[Interval]] = []

    def close() -> Chunk:
        keys = tuple(reversed(union))  # the shared clean prefix first: chunk after chunk starts with it
        return Chunk(first, rows, keys, size, size if area == rows * size else _shared(runs, keys))

    for run_first, run_rows, run in _runs(endpoints):
        run_size = _size(run)
        merged = _union(union, run)
        merged_size = _size(merged)
        pairs, merged_area = (rows + run_rows) * merged_size, area + run_rows * run_size
        price = pairs if pairs == merged_area else int(MASKED_PAIR * pairs)
        fixed = cost.fixed + cost.line * merged_size
        apart = rows * size + run_rows * run_size + cost.fixed + cost.line * (size + run_size - merged_size)
        too_tall = pairs > merged_area and rows + run_rows > MAX_MASKED_ROWS
        if rows and (run_first > first + rows or pairs - merged_area > fixed or price > apart or too_tall):
            yield close()
            rows = area = 0
            merged, merged_size, merged_area, runs = _union([], run), run_size, run_rows * run_size, []
        if not rows:
            first = run_first
        union, size, area, rows = merged, merged_size, merged_area, rows + run_rows
        runs.append(run)
    if rows:
        yield close()


def _shared(runs: Sequence[list[Interval]], keys: tuple[Interval, ...]) -> int:
    """How many of the first ``keys`` all runs see."""
    shared = 0
    for low, high in keys:
        seen = min(next((end for start, end in run if start <= low < end), low) for run in runs)
        shared += min(seen, high) - low
        if seen < high:
            break
    return shared


def refills(held: tuple[Interval, ...], wanted: tuple[Interval, ...]) -> Iterator[tuple[int, int, int]]:
    """Copies that turn a buffer of the keys ``held`` into one of the keys ``wanted``; a common start stays.

    Yields:
        Position in the buffer, first key, number of keys.
    """
    kept = 0
    for (low, high), (old_low, old_high) in zip(wanted, held, strict=False):
        if low == old_low:
            kept += min(high, old_high) - low
        if (low, high) != (old_low, old_high):
            break
    position = 0
    for low, high in wanted:
        skip = min(max(kept - position, 0), high - low)
        if high - low > skip:
            yield position + skip, low + skip, high - low - skip
        position += high - low


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
