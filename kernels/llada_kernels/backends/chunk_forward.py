"""Tiles of the forward pass of the CPU backend.

A softmax needs all keys of its row, so a tile holds all keys that any of its rows sees. Rows are taken in order and cut
where going on would waste more on pairs nobody sees than a further tile costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from llada_kernels.backends.chunk_tiles import (
    MASKED_PAIR,
    MAX_MASKED_ROWS,
    Cost,
    Interval,
    Tile,
    batches,
    run_starts,
    size,
)

# Fewer equal tiles run one by one: in a batch they would not find the keys of their prefix in the buffer.
MIN_BATCH = 4


def forward_tiles(endpoints: Tensor, cost: Cost) -> tuple[Tile, ...]:
    """Tiles that hold each row of ``endpoints`` ``[nfunc, rows]`` that sees something once, with all that it sees.

    Batches of the same steps stand together, in the order of their rows: neighbours read almost the same keys.
    """
    found: list[Tile] = []
    for batch in batches(list(_cut(endpoints, cost))):
        found += [batch] if batch.count >= MIN_BATCH else batch.singles()
    return tuple(sorted(found, key=lambda tile: (tile.count, tile.row_step, tile.key_step, tile.first_row)))


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


def _cut(endpoints: Tensor, cost: Cost) -> Iterator[Tile]:
    """Cut the rows greedily; a tile ends when its invisible pairs outweigh its own fixed cost."""
    first = rows = area = num_keys = 0
    union: list[Interval] = []
    runs: list[tuple[int, list[Interval]]] = []

    def close() -> Tile:
        keys = tuple(reversed(union))  # the shared clean prefix first: tile after tile starts with it
        if area == rows * num_keys:
            return Tile(first, rows, keys)
        start = keys[0][0]
        pattern = tuple((count, tuple((low - start, high - start) for low, high in run)) for count, run in runs)
        return Tile(first, rows, keys, pattern, _shared([run for _, run in runs], keys))

    for run_first, run_rows, run in _runs(endpoints):
        run_keys = size(run)
        merged = _union(union, run)
        merged_keys = size(merged)
        pairs, merged_area = (rows + run_rows) * merged_keys, area + run_rows * run_keys
        price = pairs if pairs == merged_area else MASKED_PAIR * pairs
        fixed = cost.fixed + cost.line * merged_keys
        apart = rows * num_keys + run_rows * run_keys + cost.fixed + cost.line * (num_keys + run_keys - merged_keys)
        too_tall = pairs > merged_area and rows + run_rows > MAX_MASKED_ROWS
        if rows and (run_first > first + rows or pairs - merged_area > fixed or price > apart or too_tall):
            yield close()
            rows = 0
            merged, merged_keys, merged_area, runs = run, run_keys, run_rows * run_keys, []
        if not rows:
            first = run_first
        union, num_keys, area, rows = merged, merged_keys, merged_area, rows + run_rows
        runs.append((run_rows, run))
    if rows:
        yield close()


def _runs(endpoints: Tensor) -> Iterator[tuple[int, int, list[Interval]]]:
    """Maximal runs of equal rows that see something: first row, how many, and the intervals they see."""
    starts = run_starts(endpoints)
    columns = endpoints[:, starts].T.tolist()
    for (first, end), column in zip(pairwise([*starts.tolist(), endpoints.shape[1]]), columns, strict=True):
        bounds = [0, *column]
        intervals = [(low, high) for low, high in zip(bounds[::2], bounds[1::2], strict=True) if high > low]
        if intervals:
            yield first, end - first, _union([], intervals)


def _shared(runs: Sequence[list[Interval]], keys: tuple[Interval, ...]) -> int:
    """How many of the first ``keys`` all runs see."""
    shared = 0
    for low, high in keys:
        seen = min(next((end for start, end in run if start <= low < end), low) for run in runs)
        shared += min(seen, high) - low
        if seen < high:
            break
    return shared


def _union(a: list[Interval], b: list[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for low, high in sorted(a + b):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return merged
