"""Which tiles of an interval mask have to be computed, and which of those need no mask: what the GPU kernels walk.

A tile is ``block_m`` query rows times ``block_n`` keys. It is *live* when some of its pairs is visible, *full* when all
of them are, *partial* when it is live and not full. Rows beyond the last do not count, keys beyond the last count as
invisible: a full tile needs neither a mask nor a bound on its keys.

The work is a sweep over the ends of the intervals: O(rows x intervals) for the mask, sorted, and O(live tiles) for the
lists. Nothing of the size rows x keys, or rows x key tiles, is ever made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llada_kernels.interval_mask import IntervalMask


@dataclass(frozen=True, eq=False)
class TileList:
    """For each tile of one side, tiles of the other side: ``indices[offsets[i] : offsets[i + 1]]``, increasing.

    Attributes:
        offsets: int32 ``[tiles + 1]``.
        indices: int32 ``[offsets[-1]]``.
    """

    offsets: Tensor
    indices: Tensor

    def counts(self) -> Tensor:
        """How many tiles are listed for each tile, int32 ``[tiles]``."""
        return self.offsets.diff()

    def padded(self, width: int) -> Tensor:
        """The lists as rows, int32 ``[tiles, width]``; unused places are 0. This is what a torch ``BlockMask`` takes.

        Raises:
            ValueError: a list is longer than ``width``.
        """
        count = self.counts().long()
        if count.numel() and int(count.max()) > width:
            raise ValueError(f"a list of {int(count.max())} tiles does not fit into width {width}")
        rows = torch.repeat_interleave(count)
        columns = torch.arange(rows.numel(), device=rows.device) - self.offsets.long()[rows]
        result = self.indices.new_zeros(count.numel(), width)
        result[rows, columns] = self.indices
        return result


@dataclass(frozen=True, eq=False)
class TileLists:
    """The live tiles of a mask, by row tile and by key tile.

    Attributes:
        block_m, block_n: query rows and keys of a tile.
        row_partial, row_full: for each of the ``ceil(total_q / block_m)`` row tiles its key tiles.
        key_partial, key_full: for each of the ``ceil(total_k / block_n)`` key tiles its row tiles (the transpose).
        row_order, key_order: int32, the row tiles and the key tiles with the most live tiles first; kernels start
            them in this order, so that no long one is left for the end.
    """

    built: ClassVar[int] = 0  # tile lists built in this process; tests read it

    block_m: int
    block_n: int
    row_partial: TileList
    row_full: TileList
    key_partial: TileList
    key_full: TileList
    row_order: Tensor
    key_order: Tensor

    @classmethod
    def of(cls, mask: IntervalMask, block_m: int, block_n: int) -> TileLists:
        """The tile lists of ``mask`` on its device, built on the CPU on first use and kept on the mask.

        Raises:
            ValueError: the endpoints are no valid mask, or a tile size is not positive.
        """
        key = ("tiles", block_m, block_n)
        if key not in mask.plans:
            host = mask.host()
            built = cls.build(mask, block_m, block_n) if host is mask else cls.of(host, block_m, block_n)
            mask.plans[key] = built.to(mask.endpoints.device)
        return mask.plans[key]

    @classmethod
    def build(cls, mask: IntervalMask, block_m: int, block_n: int) -> TileLists:
        """Build the lists of a mask on the CPU; errors as in :meth:`of`."""
        if block_m < 1 or block_n < 1:
            raise ValueError(f"tiles must have at least one row and one key, got {block_m} x {block_n}")
        mask.validate()
        cls.built += 1
        row_tiles, key_tiles = -(-mask.total_q // block_m), -(-mask.total_k // block_n)
        row, key, pairs = _live_tiles(mask, block_m, block_n)
        rows_in_tile = (mask.total_q - row * block_m).clamp(max=block_m)
        full = pairs == rows_in_tile * block_n
        transposed = key.argsort(stable=True)
        t_row, t_key, t_full = row[transposed], key[transposed], full[transposed]
        return cls(
            block_m=block_m,
            block_n=block_n,
            row_partial=_tile_list(row[~full], key[~full], row_tiles),
            row_full=_tile_list(row[full], key[full], row_tiles),
            key_partial=_tile_list(t_key[~t_full], t_row[~t_full], key_tiles),
            key_full=_tile_list(t_key[t_full], t_row[t_full], key_tiles),
            row_order=_most_first(row, row_tiles),
            key_order=_most_first(key, key_tiles),
        )

    def to(self, device: torch.device | str) -> TileLists:
        """The same lists on ``device``, sent in one copy that the host does not wait for."""
        device = torch.device(device)
        if device == self.row_order.device:
            return self
        lists = (self.row_partial, self.row_full, self.key_partial, self.key_full)
        tensors = [x for part in lists for x in (part.offsets, part.indices)] + [self.row_order, self.key_order]
        packed = torch.cat(tensors)
        packed = (packed.pin_memory() if device.type == "cuda" else packed).to(device, non_blocking=True)
        sent = packed.split([x.numel() for x in tensors])
        row_partial, row_full, key_partial, key_full = (TileList(*sent[i : i + 2]) for i in range(0, 8, 2))
        return TileLists(
            self.block_m,
            self.block_n,
            row_partial,
            row_full,
            key_partial,
            key_full,
            row_order=sent[8],
            key_order=sent[9],
        )

    @property
    def row_tiles(self) -> int:
        """Number of row tiles."""
        return self.row_order.numel()

    @property
    def key_tiles(self) -> int:
        """Number of key tiles."""
        return self.key_order.numel()

    @property
    def live_tiles(self) -> int:
        """Number of tiles that are computed."""
        return self.row_partial.indices.numel() + self.row_full.indices.numel()

    def visited_pairs(self) -> int:
        """Number of (row, key) pairs that a kernel computes, overhang at the edges included."""
        return self.live_tiles * self.block_m * self.block_n

    def live_share(self) -> float:
        """Live tiles over all tiles; 0 for an empty mask."""
        return self.live_tiles / max(self.row_tiles * self.key_tiles, 1)


def _live_tiles(mask: IntervalMask, block_m: int, block_n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row tile, key tile and number of visible pairs of each live tile (int64), by row tile, then key tile.

    Along the key tiles of one row tile, an interval ``[low, high)`` adds to the number of visible pairs a function that
    changes in at most four places: it rises in the tile of ``low`` and the next, and falls in the tile of ``high`` and
    the next. The running sum of all these changes is the number of pairs in each tile.
    """
    tile, bound, weight = _runs(mask, block_m)
    low, high = torch.cat((bound.new_zeros(1, tile.numel()), bound[1::2])), bound[::2]
    seen = high > low
    tile, weight = (x.expand(low.shape)[seen] for x in (tile, weight))
    low, high = low[seen], high[seen]

    line = -(-mask.total_k // block_n) + 2  # key tiles, and two places beyond them for the last falls
    place = tile * line
    enters, leaves = place + low // block_n, place + high // block_n
    before, inside = low % block_n, high % block_n
    places, event = torch.cat((enters, enters + 1, leaves, leaves + 1)).unique(return_inverse=True)
    change = torch.cat((block_n - before, before, inside - block_n, -inside)) * weight.repeat(4)
    pairs = torch.zeros_like(places).index_add_(0, event, change).cumsum(0)

    span = places.diff(append=places[-1:])  # tiles until the next change, all with the same number of pairs
    live = pairs > 0
    places, span, pairs = places[live], span[live], pairs[live]
    segment = torch.repeat_interleave(span)
    step = torch.arange(segment.numel()) - (span.cumsum(0) - span)[segment]
    live_place = places[segment] + step
    return live_place // line, live_place % line, pairs[segment]


def _runs(mask: IntervalMask, block_m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Runs of equal rows within a row tile: row tile ``[runs]``, endpoints ``[nfunc, runs]``, rows ``[runs]``."""
    row = torch.arange(mask.total_q)
    first = row % block_m == 0
    first[1:] |= (mask.endpoints[:, 1:] != mask.endpoints[:, :-1]).any(0)
    start = row[first]
    return start // block_m, mask.endpoints[:, start].long(), start.diff(append=torch.tensor([mask.total_q]))


def _tile_list(owner: Tensor, indices: Tensor, tiles: int) -> TileList:
    """Lists of tiles whose owners are sorted."""
    offsets = torch.zeros(tiles + 1, dtype=torch.int32)
    offsets[1:] = torch.bincount(owner, minlength=tiles).cumsum(0)
    return TileList(offsets, indices.to(torch.int32))


def _most_first(owner: Tensor, tiles: int) -> Tensor:
    work = torch.bincount(owner, minlength=tiles)
    return work.argsort(descending=True, stable=True).to(torch.int32)
