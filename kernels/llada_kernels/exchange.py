"""Context parallelism: which keys and values cross ranks, and what attention costs each rank after that.

Legend: R ranks, S rows and keys of the whole sequence, N rows of a rank, M rows of which a rank sends the keys.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from llada_kernels.interval_mask import IntervalMask
from llada_kernels.partition import TILE, RowPartition, shortest_piece
from llada_kernels.tiles import TileLists


@dataclass(frozen=True, eq=False)
class RankExchange:
    """One rank's part of a :class:`KeyExchange`, all that a layer needs.

    Attributes:
        num_sent: how many of its rows, the last, it sends the keys and values of.
        places_K: int64 on the CPU; where the keys go that it has then, first those of its own rows that are not sent,
            then the sent ones of all ranks, rank after rank, so that they stand in the order of its mask's keys.
    """

    num_sent: int
    places_K: Tensor
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def places_on(self, device: torch.device) -> Tensor:
        """``places_K`` on ``device``, copied once."""
        if device not in self._copies:
            self._copies[device] = self.places_K.to(device, non_blocking=device.type != "cpu")
        return self._copies[device]


@dataclass(frozen=True, eq=False)
class KeyExchange:
    """Every rank sends the keys and values of its last ``num_sent`` rows to all others: a slice, all-gathered.

    Clean rows come last in a rank, so a suffix is what is needed: none, the clean keys, or all.
    """

    partition: RowPartition
    num_sent: int

    @classmethod
    def exact(cls, mask: IntervalMask, partition: RowPartition) -> KeyExchange:
        """The shortest exchange, in whole tiles, after which every row has the keys that it sees."""
        from_end_N = torch.arange(partition.rows_per_rank, 0, -1)
        longest = int((crossing_keys(mask, partition)[partition.rows_RN] * from_end_N).max())
        return cls(partition, min(-(-longest // TILE) * TILE, partition.rows_per_rank))

    @property
    def halves(self) -> str:
        """Whose keys cross: "none", "clean" or "all"."""
        if not self.num_sent:
            return "none"
        return "clean" if int(self._split()[1].min()) >= self.partition.num_noisy else "all"

    @property
    def keys_received(self) -> int:
        """Keys (and as many values) that a rank receives from the others, per layer and forward pass."""
        return (self.partition.num_ranks - 1) * self.num_sent

    def bytes_received(self, key_heads: int, head_dim: int, element_size: int = 2) -> int:
        """Bytes of keys and values that a rank receives, per layer and forward pass; dK and dV go back the same way."""
        return 2 * self.keys_received * key_heads * head_dim * element_size

    def keys(self, rank: int) -> Tensor:
        """Positions in the sequence of the keys that ``rank`` has after the exchange: int64, increasing."""
        return self._arrived(rank).sort().values

    def order(self, rank: int) -> Tensor:
        """How to bring the keys of ``rank`` into the order of :meth:`keys`.

        Returns:
            int64 indices into its own rows that are not sent, followed by the sent rows of all ranks, rank after rank.
        """
        return self._arrived(rank).argsort()

    def of_rank(self, rank: int) -> RankExchange:
        """What ``rank`` has to do."""
        return RankExchange(self.num_sent, self.order(rank).argsort())

    def local_mask(self, mask: IntervalMask, rank: int) -> IntervalMask:
        """The mask of the rows of ``rank`` over the keys that it has."""
        return mask.select_rows(self.partition.rows_RN[rank]).select_keys(self.keys(rank))

    def _split(self) -> tuple[Tensor, Tensor]:
        """Rows whose keys stay and rows whose keys are sent, ``[R, N - M]`` and ``[R, M]``."""
        kept_RK, sent_RM = self.partition.rows_RN.tensor_split([self.partition.rows_per_rank - self.num_sent], 1)
        return kept_RK, sent_RM

    def _arrived(self, rank: int) -> Tensor:
        kept_RK, sent_RM = self._split()
        return torch.cat((kept_RK[rank], sent_RM.flatten()))


def crossing_keys(mask: IntervalMask, partition: RowPartition) -> Tensor:
    """Which keys are seen by a row of another rank than their own: bool ``[S]``. O((nfunc + ranks) x S)."""
    bound, owner_S, keys = mask.host().endpoints.long(), partition.owner_S, mask.total_k
    # A difference array for each rank: it sees a key where more intervals of its rows have begun than ended.
    change = torch.zeros(partition.num_ranks * (keys + 1), dtype=torch.int64)
    starts, ends = torch.cat((torch.zeros_like(bound[:1]), bound[1::2])), bound[::2]
    for edges, sign in ((starts, 1), (ends, -1)):
        place = (owner_S * (keys + 1) + edges).flatten()
        change.index_add_(0, place, torch.full_like(place, sign))
    seen_RS = change.view(-1, keys + 1).cumsum(1)[:, :-1] > 0
    seen_RS[owner_S, torch.arange(keys)] = False
    return seen_RS.any(0)


def static_exchange(block_size: int, document_alignment: int, num_noisy: int, num_rows: int, num_ranks: int) -> str:
    """Whose keys may cross, "clean" or "all", whatever the documents are: for planning, before there is data.

    No noisy row needs another rank's noisy key when no block is cut, that is when blocks start at multiples of their
    size and pieces do too. :meth:`KeyExchange.exact` says what crosses in one micro-batch.

    Args:
        block_size: L_B; blocks are counted from the start of the document or of the sample.
        document_alignment: every document, and so every sample, starts at a multiple of it.
        num_noisy, num_rows: rows of the noisy half and of both.
    """
    starts = math.gcd(document_alignment, shortest_piece(num_noisy, num_rows, num_ranks))
    return "clean" if starts % block_size == 0 and num_noisy < num_rows else "all"


@dataclass(frozen=True)
class Balance:
    """What one attention layer costs each rank, counted, not estimated.

    Attributes:
        rows: rows of a rank.
        noisy_rows: of them, for each rank.
        piece_size: rows in a noisy piece.
        live_pairs: visible (row, key) pairs of each rank.
        live_tiles: tiles of 128 x 128 with a visible pair, of each rank's local mask.
        undivided_tiles: the same of the whole mask on one rank; more in the sum of the ranks is what cutting costs.
        halves: whose keys cross: "none", "clean" or "all".
        keys_needed: keys that a row of another rank sees.
        keys_received: keys that a rank receives; equal shapes and whole tiles make it more than it needs.
    """

    rows: int
    noisy_rows: tuple[int, ...]
    piece_size: int
    live_pairs: tuple[int, ...]
    live_tiles: tuple[int, ...]
    undivided_tiles: int
    halves: str
    keys_needed: int
    keys_received: int

    @classmethod
    def of(cls, mask: IntervalMask, exchange: KeyExchange) -> Balance:
        """Count the work of every rank."""
        partition, mask = exchange.partition, mask.host()
        ranks = range(partition.num_ranks)
        tiles = [TileLists.of(exchange.local_mask(mask, rank), TILE, TILE).live_tiles for rank in ranks]
        return cls(
            rows=partition.rows_per_rank,
            noisy_rows=tuple((partition.rows_RN < partition.num_noisy).sum(1).tolist()),
            piece_size=partition.piece_size,
            live_pairs=tuple(mask.visible_counts()[partition.rows_RN].sum(1).tolist()),
            live_tiles=tuple(tiles),
            undivided_tiles=TileLists.of(mask, TILE, TILE).live_tiles,
            halves=exchange.halves,
            keys_needed=int(crossing_keys(mask, partition).sum()),
            keys_received=exchange.keys_received,
        )

    @property
    def pair_imbalance(self) -> float:
        """Most over mean visible pairs; 1 is even."""
        return _most_over_mean(self.live_pairs)

    @property
    def tile_imbalance(self) -> float:
        """Most over mean live tiles; 1 is even."""
        return _most_over_mean(self.live_tiles)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "pair_imbalance": self.pair_imbalance, "tile_imbalance": self.tile_imbalance}

    def text(self) -> str:
        """A few lines for people."""
        noisy = " to ".join(f"{number:,}" for number in sorted({min(self.noisy_rows), max(self.noisy_rows)}))
        cut = sum(self.live_tiles) - self.undivided_tiles
        return (
            f"{len(self.live_pairs)} ranks with {self.rows:,} rows each, {noisy} noisy, pieces of {self.piece_size:,}\n"
            f"live pairs most/mean {self.pair_imbalance:.4f}: {_numbers(self.live_pairs)}\n"
            f"{TILE}-tiles most/mean {self.tile_imbalance:.4f}: {_numbers(self.live_tiles)} ({cut:+,} by cutting)\n"
            f"keys that cross ranks: {self.halves}; {self.keys_needed:,} are needed elsewhere, "
            f"a rank receives {self.keys_received:,}"
        )


def _numbers(values: tuple[int, ...]) -> str:
    return " ".join(f"{value:,}" for value in values)


def _most_over_mean(values: tuple[int, ...]) -> float:
    return max(values) * len(values) / sum(values) if sum(values) else 1.0
