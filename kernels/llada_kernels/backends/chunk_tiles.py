"""A tile: rows of an interval mask times the keys that they see, or a batch of equal ones. The CPU backend's unit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from llada_kernels.interval_mask import visible_keys

# An additive mask makes a pair this much dearer.
MASKED_PAIR = 1.06
# Rows of a tile that needs an additive mask: bounds that mask, and so the memory, by O(keys).
MAX_MASKED_ROWS = 128
# Rows, and keys, of a batch: more gains nothing and only needs memory.
MAX_BATCH_LINES = 1024

Interval = tuple[int, int]
Pattern = tuple[tuple[int, tuple[Interval, ...]], ...]  # rows, and what they see, counted from the tile's first key


class Cost(NamedTuple):
    """What a tile costs beyond its pairs, in pairs: once, and for each of its keys (and rows, backward)."""

    fixed: int
    line: int


@dataclass(frozen=True)
class Tile:
    """Consecutive rows times intervals of keys; ``count`` of them, ``row_step`` and ``key_step`` apart."""

    first_row: int
    num_rows: int
    keys: tuple[Interval, ...]  # disjoint [start, end), in the order in which they are read
    pattern: Pattern | None = None  # who sees what; None: every row sees every key
    shared_keys: int = 0  # with a pattern: the first so many keys are known to be seen by all rows
    count: int = 1
    row_step: int = 0
    key_step: int = 0

    @cached_property
    def num_keys(self) -> int:
        """Keys of one of the rectangles."""
        return size(self.keys)

    def singles(self) -> Iterator[Tile]:
        """The rectangles one by one."""
        for i in range(self.count):
            keys = tuple((low + i * self.key_step, high + i * self.key_step) for low, high in self.keys)
            yield replace(
                self, first_row=self.first_row + i * self.row_step, keys=keys, count=1, row_step=0, key_step=0
            )

    def visible(self) -> Tensor:
        """The pairs of one of the rectangles without the shared keys: bool ``[rows, keys - shared keys]``."""
        first_key = self.keys[0][0]
        keys = torch.cat([torch.arange(low - first_key, high - first_key) for low, high in self.keys])[
            self.shared_keys :
        ]
        if self.pattern is None:
            return torch.ones(self.num_rows, keys.numel(), dtype=torch.bool)
        most = max(len(intervals) for _, intervals in self.pattern)
        nothing = int(keys.min())  # endpoints begin with an interval from the first key on
        runs = [[nothing, *sum(intervals, ()), *(0, 0) * (most - len(intervals))] for _, intervals in self.pattern]
        counts = torch.tensor([count for count, _ in self.pattern])
        return visible_keys(torch.tensor(runs).T, keys).repeat_interleave(counts, 0)


def batches(tiles: list[Tile]) -> Iterator[Tile]:
    """Equal tiles at constant distances become one."""

    def kind(tile: Tile) -> tuple[int, tuple[Interval, ...], Pattern]:
        first_key = tile.keys[0][0]
        keys = tuple((low - first_key, high - first_key) for low, high in tile.keys)
        return tile.num_rows, keys, tile.pattern or ()

    batch: Tile | None = None
    batch_kind = None
    kinds = {id(tile): kind(tile) for tile in tiles}
    for tile in sorted(tiles, key=lambda tile: (kinds[id(tile)], tile.first_row - tile.keys[0][0], tile.first_row)):
        joined = _join(batch, tile) if batch is not None and batch_kind == kinds[id(tile)] else None
        if batch is not None and joined is None:
            yield batch
        batch, batch_kind = joined or tile, kinds[id(tile)]
    if batch is not None:
        yield batch


def _join(batch: Tile, tile: Tile) -> Tile | None:
    """``batch`` with an equal tile after it; None when that is too large or no batch of disjoint views."""
    row_step = tile.first_row - batch.first_row - batch.row_step * (batch.count - 1)
    key_step = tile.keys[0][0] - batch.keys[0][0] - batch.key_step * (batch.count - 1)
    too_large = (batch.count + 1) * max(tile.num_rows, tile.num_keys) > MAX_BATCH_LINES
    overlap = row_step < tile.num_rows or key_step < max(high - low for low, high in tile.keys)
    irregular = batch.count > 1 and (row_step, key_step) != (batch.row_step, batch.key_step)
    if too_large or overlap or irregular:
        return None
    return replace(batch, count=batch.count + 1, row_step=row_step, key_step=key_step)


def run_starts(columns: Tensor) -> Tensor:
    """Where a column of ``columns`` ``[n, rows]`` differs from the one before, and 0: int64 ``[runs]``."""
    starts = columns.new_ones(columns.shape[1], dtype=torch.bool)
    starts[1:] = (columns[:, 1:] != columns[:, :-1]).any(0)
    return starts.nonzero()[:, 0]


def size(intervals: Sequence[Interval]) -> int:
    """Number of keys in disjoint intervals."""
    return sum(high - low for low, high in intervals)
