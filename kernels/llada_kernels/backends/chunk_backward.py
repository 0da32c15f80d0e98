"""Tiles of the backward pass of the CPU backend.

Once the log-sum-exp of every row is known, the gradient of attention is a plain sum over (row, key) pairs, so any set
of rectangles that covers the visible pairs once will do. Large ones are fast, and so are many equal ones at a constant
distance, which one call serves as a batch of views. Under a staircase (keys that grow with the row: causal masks, clean
prefixes) the cut is dyadic: one square of half the size, two of a quarter, four of an eighth, each size one batch.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import accumulate, groupby, pairwise
from operator import lt, mul, sub

import torch
from torch import Tensor

from llada_kernels.backends.chunk_tiles import MASKED_PAIR, MAX_MASKED_ROWS, Cost, Tile, batches, run_starts

# A rectangle that all rows share is cut out when it is at least this wide and not much narrower than tall.
MIN_SHARED_KEYS = 16
# With more invisible pairs than so many tiles cost, a tile is cut without asking what that costs: cutting a staircase
# saves half of them for two further tiles.
TOO_MUCH_WASTE = 8
# Keys of a tile: with more, the kernel's workspace outgrows a core's L2 cache (3 % slower). Rows: more gains nothing
# and only needs memory.
MAX_TILE_KEYS = 256
MAX_TILE_ROWS = 1024


def backward_tiles(endpoints: Tensor, cost: Cost) -> tuple[Tile, ...]:
    """Tiles of one interval that hold each visible pair of ``endpoints`` ``[nfunc, rows]`` once."""
    found: list[Tile] = []
    zero = torch.zeros_like(endpoints[:1])
    for column in torch.cat((zero, endpoints)).unflatten(0, (-1, 2)):
        runs = _Runs(column)
        for first, last in runs.segments():
            found += _cover(runs, first, last, 0, sys.maxsize, cost)[1]
    return tuple(batches([piece for tile in found for piece in _pieces(tile)]))


class _Runs:
    """Runs of rows that see the same interval of keys, from one interval a row (int ``[2, rows]``)."""

    def __init__(self, column: Tensor) -> None:
        first_rows = run_starts(column)
        self.low, self.high = low, high = column[:, first_rows].tolist()
        self.rows = [*first_rows.tolist(), column.shape[1]]  # run i is of the rows [rows[i], rows[i + 1])
        # Places where neighbours share no key: between documents, between blocks. A run that sees nothing and starts
        # where its neighbour does is the first step of the same staircase.
        self.gaps = [
            i
            for i in range(1, len(low))
            if low[i] != low[i - 1] and max(low[i], low[i - 1]) >= min(high[i], high[i - 1])
        ]

    def segments(self) -> Iterator[tuple[int, int]]:
        """Runs [first, last), without stretches that see nothing, except for first steps of staircases."""
        low, high = self.low, self.high
        starts = [None, *(a if b > a else None for a, b in zip(low, high, strict=True)), None]
        kept = [b > a or a in (starts[i], starts[i + 2]) for i, (a, b) in enumerate(zip(low, high, strict=True))]
        for keep, group in groupby(range(len(kept)), key=kept.__getitem__):
            if keep:
                first, *others = group
                yield first, first + 1 + len(others)

    def middle(self, first: int, last: int) -> int:
        """Where to cut the runs [first, last): after the largest power of two of gaps, or of runs if there is no gap.

        So equal staircases are cut into equal tiles.
        """
        places = self.gaps[bisect_right(self.gaps, first) : bisect_left(self.gaps, last)] or range(first + 1, last)
        return places[(1 << (len(places).bit_length() - 1)) - 1]


def _cover(runs: _Runs, first: int, last: int, start: int, end: int, cost: Cost) -> tuple[float, list[Tile]]:
    """Tiles for the keys [start, end) of the runs [first, last), and what they cost."""
    lows, highs = _clip(runs.low[first:last], start, end), _clip(runs.high[first:last], start, end)
    skip, stop = 0, last - first  # what sees nothing at either end
    while skip < stop and lows[skip] == highs[skip]:
        skip += 1
    while skip < stop and lows[stop - 1] == highs[stop - 1]:
        stop -= 1
    if skip == stop:
        return 0.0, []
    lows, highs, rows = lows[skip:stop], highs[skip:stop], runs.rows[first + skip : first + stop + 1]
    low, shared_low, shared_high, high = min(lows), max(lows), min(highs), max(highs)
    num_rows, num_keys = rows[-1] - rows[0], high - low
    pairs, overhead = num_rows * num_keys, cost.fixed + cost.line * (num_rows + num_keys)
    if (low, high) == (shared_low, shared_high):
        return overhead + pairs, [Tile(rows[0], num_rows, ((low, high),))]

    one_price = math.inf  # of one tile with a mask
    if num_rows <= MAX_MASKED_ROWS:
        counts = [after - before for before, after in pairwise(rows)]
        waste = pairs - sum(map(mul, counts, map(sub, highs, lows)))
        if waste <= TOO_MUCH_WASTE * cost.fixed and _connected(lows, highs):
            one_price = overhead + MASKED_PAIR * pairs

    def one_tile() -> tuple[float, list[Tile]]:
        pattern = tuple((n, ((a - low, b - low),)) for n, a, b in zip(counts, lows, highs, strict=True))
        return one_price, [Tile(rows[0], num_rows, ((low, high),), pattern)]

    if one_price < math.inf and waste <= cost.fixed:  # cutting would save less than a tile costs
        return one_tile()

    shared = shared_high - shared_low
    if (skip, stop) == (0, last - first) and shared >= max(MIN_SHARED_KEYS, num_rows // 2):
        tile = Tile(rows[0], num_rows, ((shared_low, shared_high),))
        covers = [(cost.fixed + cost.line * (num_rows + shared) + num_rows * shared, [tile])]
        covers += [_cover(runs, first, last, start, shared_low, cost)] if low < shared_low else []
        covers += [_cover(runs, first, last, shared_high, end, cost)] if high > shared_high else []
    else:  # what sees nothing is not left out: the cuts of equal staircases would no longer be the same
        middle = runs.middle(first, last)
        covers = [_cover(runs, first, middle, start, end, cost), _cover(runs, middle, last, start, end, cost)]
    price = sum(part_price for part_price, _ in covers)
    return one_tile() if one_price <= price else (price, [tile for _, found in covers for tile in found])


def _clip(keys: list[int], start: int, end: int) -> list[int]:
    return [start if key < start else end if key > end else key for key in keys]


def _connected(lows: list[int], highs: list[int]) -> bool:
    """Whether every run sees something and the keys that are seen follow each other without a gap."""
    ordered = sorted(zip(lows, highs, strict=True))
    reach = accumulate((high for _, high in ordered), max)
    gap = any(low > end for (low, _), end in zip(ordered[1:], reach, strict=False))
    return not gap and all(map(lt, lows, highs))


def _pieces(tile: Tile) -> Iterator[Tile]:
    """The tile in pieces of at most ``MAX_TILE_ROWS`` rows and ``MAX_TILE_KEYS`` keys, unless it needs a mask."""
    if tile.pattern is not None:
        yield tile
        return
    for first_row, num_rows in _even(tile.first_row, tile.num_rows, MAX_TILE_ROWS):
        for first_key, num_keys in _even(tile.keys[0][0], tile.num_keys, MAX_TILE_KEYS):
            yield Tile(first_row, num_rows, ((first_key, first_key + num_keys),))


def _even(first: int, size: int, limit: int) -> Iterator[tuple[int, int]]:
    """Equal stretches (first, size), none longer than ``limit``."""
    count = -(-size // limit)
    bounds = [first + i * size // count for i in range(count + 1)]
    yield from ((low, high - low) for low, high in pairwise(bounds))
