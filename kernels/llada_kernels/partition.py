"""Context parallelism: which rank computes which query rows, so that all have the same work.

Rows are dealt out in pieces of consecutive rows. Every rank gets the same number of rows, and the same number of noisy
rows: these alone have logits, which cost as much as several layers. Inside a rank rows keep their order, so that its
clean rows come last. A noisy row and the clean row of the same token need not have the same owner: nothing joins them
but the attention. Everything is a pure function of a mask on the host: ranks that hold the same mask agree without
talking to each other.

Pieces are dealt out heaviest first, each to the least loaded rank that still has room; then the most and the least
loaded rank swap single pieces. Long pieces are tried first, because fewer keys cross between them, and the first length
that is even enough is taken. So the causal mask of one document gives the zig-zag (of 2R chunks, rank r has r and
2R - 1 - r), a bidirectional mask gives consecutive chunks, and uneven documents get as short pieces as they need.
A tile is the least: shorter pieces are evener in pairs, but touch so many more tiles that the slowest rank is slower.

Legend: R ranks, S rows of the whole sequence, N = S / R rows of a rank, P pieces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from llada_kernels.interval_mask import IntervalMask
from llada_kernels.tiles import TileLists

TILE = 128
# Most over mean work at which no shorter pieces are tried.
EVEN_ENOUGH = 1.002
# Bounds the time; a rank that is far off is there after one or two.
MAX_SWAPS_PER_RANK = 4


@dataclass(frozen=True, eq=False)
class RowPartition:
    """Which rank owns which rows.

    Attributes:
        rows_RN: int64 ``[ranks, rows of a rank]`` on the CPU, increasing inside a rank; each row of the sequence once.
        num_noisy: how many rows, the first of the sequence, are noisy (all of them where there is one half).
        piece_size: rows in a noisy piece.
    """

    rows_RN: Tensor
    num_noisy: int
    piece_size: int

    @classmethod
    def balanced(
        cls, mask: IntervalMask, num_ranks: int, num_noisy: int | None = None, work_tile: int = 1
    ) -> RowPartition:
        """Deal out the rows of ``mask`` so that all ranks have about the same work.

        Rows should be padded to a multiple of 128 x ranks, so that pieces are whole tiles. Where they are not, and
        where a rank has less than two tiles, pieces are as long as what divides.

        Args:
            mask: over the rows and keys of one sequence: ``[noisy ; clean]`` or one half alone, then any padding.
            num_noisy: rows of the noisy half, default all rows. Where the ranks do not divide them, noisy and clean
                rows are dealt out as one, and ranks may have unequal numbers of noisy rows.
            work_tile: what attention computes as a whole: 1 evens out visible pairs (the CPU backend), 128 evens out
                the live tiles of 128 rows and keys (GPU kernels).

        Raises:
            ValueError: rows and keys differ in number, or the rows cannot be split evenly.
        """
        rows = mask.total_q
        num_noisy = rows if num_noisy is None else num_noisy
        if mask.total_k != rows:
            raise ValueError(f"a partition is for self-attention, got {rows} rows and {mask.total_k} keys")
        if num_ranks < 1 or rows < 1 or rows % num_ranks:
            raise ValueError(f"{rows} rows cannot be split evenly over {num_ranks} ranks; pad them to a multiple")
        if not 0 <= num_noisy <= rows:
            raise ValueError(f"num_noisy must lie in [0, {rows}], got {num_noisy}")
        work_S = _work(mask.host(), work_tile)
        even_enough = EVEN_ENOUGH * int(work_S.sum()) / num_ranks
        first_half = _first_half(num_noisy, rows, num_ranks)
        # The second half only evens out the first: its keys cross whatever its pieces are, so these are short.
        second_size = _shortest_piece((rows - first_half) // num_ranks)
        second_work = work_S[first_half:].view(-1, second_size).sum(1)
        best, best_load = None, math.inf
        for size in _piece_sizes(first_half // num_ranks):
            first_work = work_S[:first_half].view(-1, size).sum(1)
            half_P = torch.arange(2).repeat_interleave(torch.tensor((first_work.numel(), second_work.numel())))
            owner_P, load_R = _deal(torch.cat((first_work, second_work)), half_P, num_ranks)
            load = int(load_R.max())
            if load < best_load:
                owner_S = owner_P.repeat_interleave(torch.tensor((size, second_size))[half_P])
                best, best_load = cls(owner_S.argsort(stable=True).view(num_ranks, -1), num_noisy, size), load
            if load <= even_enough:
                break
        assert best is not None  # every share has a shortest piece
        return best

    @property
    def num_ranks(self) -> int:
        """R."""
        return self.rows_RN.shape[0]

    @property
    def rows_per_rank(self) -> int:
        """N."""
        return self.rows_RN.shape[1]

    @cached_property
    def inverse_S(self) -> Tensor:
        """Where each row is when the ranks' rows stand one rank after the other, int64 ``[S]``."""
        return self.rows_RN.flatten().argsort()

    @cached_property
    def owner_S(self) -> Tensor:
        """Rank of each row, int64 ``[S]``."""
        return self.inverse_S // self.rows_per_rank

    def shard(self, x: Tensor, rank: int, dim: int = 0) -> Tensor:
        """The rows of one rank of a tensor whose dimension ``dim`` is S."""
        return x.index_select(dim, self.rows_RN[rank].to(x.device))

    def unshard(self, x: Tensor, dim: int = 0) -> Tensor:
        """Undo :meth:`shard`: from the shards one rank after the other (what an all-gather gives) to the sequence."""
        return x.index_select(dim, self.inverse_S.to(x.device))


def shortest_piece(num_noisy: int, num_rows: int, num_ranks: int) -> int:
    """What divides the length of every noisy piece that :meth:`RowPartition.balanced` may choose, whatever the mask."""
    return _shortest_piece(_first_half(num_noisy, num_rows, num_ranks) // num_ranks)


def _first_half(num_noisy: int, num_rows: int, num_ranks: int) -> int:
    """Rows that are dealt out evenly by themselves: the noisy half where that can be, else everything."""
    return num_noisy if num_noisy and num_noisy % num_ranks == 0 else num_rows


def _shortest_piece(share: int) -> int:
    """A tile, or what divides a rank's share of rows; half of the share where that would be a single piece."""
    piece = math.gcd(TILE, share)
    return piece if piece < share else max(piece // 2, 1)


def _piece_sizes(share: int) -> Iterator[int]:
    """Sizes that divide a rank's share of rows and are multiples of the shortest one, long ones first."""
    shortest = _shortest_piece(share)
    return (share // number for number in range(1, share // shortest + 1) if share % (number * shortest) == 0)


def _work(mask: IntervalMask, tile: int) -> Tensor:
    """Keys that each row costs, int64 ``[S]``: those it sees, or those in the live tiles of its row tile."""
    if tile == 1:
        return mask.visible_counts()
    lists = TileLists.of(mask, tile, tile)
    live = lists.row_partial.counts() + lists.row_full.counts()
    return (live.long() * tile).repeat_interleave(tile)[: mask.total_q]


def _deal(work_P: Tensor, half_P: Tensor, num_ranks: int) -> tuple[Tensor, Tensor]:
    """Owner of each piece (int64 ``[P]``) and work of each rank (int64 ``[R]``).

    Each rank gets equally many pieces of each half. Equal pieces go by position, equally loaded ranks by number.
    """
    work, half = work_P.tolist(), half_P.tolist()
    room = [[half.count(h) // num_ranks] * num_ranks for h in (0, 1)]
    load, owner = [0] * num_ranks, [0] * len(work)
    for piece in sorted(range(len(work)), key=lambda piece: -work[piece]):
        free = room[half[piece]]
        rank = min((rank for rank in range(num_ranks) if free[rank]), key=load.__getitem__)
        owner[piece] = rank
        free[rank] -= 1
        load[rank] += work[piece]
    owner_P, load_R = torch.tensor(owner), torch.tensor(load)
    _swap(work_P, half_P, owner_P, load_R)
    return owner_P, load_R


def _swap(work_P: Tensor, half_P: Tensor, owner_P: Tensor, load_R: Tensor) -> None:
    """In place: the most loaded rank swaps a piece for a lighter one of the least loaded, while that evens them out."""
    for _ in range(MAX_SWAPS_PER_RANK * load_R.numel()):
        most, least = load_R.argmax(), load_R.argmin()
        gap = load_R[most] - load_R[least]
        heavy, light = (owner_P == most).nonzero(), (owner_P == least).nonzero()[:, 0]
        moved = work_P[heavy] - work_P[light]
        useful = (moved > 0) & (moved < gap) & (half_P[heavy] == half_P[light])
        if not useful.any():
            return
        best = int((2 * moved - gap).abs().masked_fill(~useful, int(gap)).argmin())
        heavy_piece, light_piece = heavy[best // light.numel(), 0], light[best % light.numel()]
        owner_P[heavy_piece], owner_P[light_piece] = least, most
        load_R[most] -= moved.flatten()[best]
        load_R[least] += moved.flatten()[best]
