"""Context parallelism of a micro-batch: the part of it that one rank computes.

Every rank builds the whole batch on the host and keeps its rows: which ones is a pure function of the mask, so nothing
is sent. Tokens keep their positions, noise levels and weights, and sums over the parts are those of the whole batch.

Legend: R ranks, S positions of the whole batch, N = S / R positions of a rank, L logit rows of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from llada_kernels.exchange import KeyExchange
from llada_kernels.partition import TILE, RowPartition
from torch import Tensor

from llada_mega.config.run import ParallelConfig
from llada_mega.data.batch import ROW_MULTIPLE, Batch, extend, round_up

GPU = torch.device("cuda")
CPU_MULTIPLE = 8


def shard_batch(
    batch: Batch, rank: int, num_ranks: int, *, work_tile: int = 1, row_multiple: int = ROW_MULTIPLE
) -> Batch:
    """The part of ``batch`` that context-parallel rank ``rank`` computes.

    The fields of the whole batch, for N positions: logit rows count from the rank's first position, ``mask`` is over
    its rows and the keys that it has after ``key_exchange``. ``denominator`` and ``num_tokens`` stay with rank 0.

    Args:
        batch: the whole one, on the CPU; the same on all ranks. Returned as it is when there is one rank; of a batch
            in page-locked memory the part is, too.
        work_tile: what attention computes as a whole, as in ``RowPartition.balanced``: 1 on CPU, 128 on GPUs.
        row_multiple: logit rows are rounded up to a multiple of it.

    Raises:
        ValueError: the ranks do not divide S.
    """
    if num_ranks == 1:
        return batch
    exchange = key_exchange(batch, num_ranks, work_tile)
    partition = exchange.partition
    rows_N = partition.rows_RN[rank]
    logit_rows = batch.logit_rows_R[: batch.num_rows]
    mine_L = (partition.owner_S[logit_rows] == rank).nonzero().flatten()
    size = round_up(max(len(mine_L), 1), row_multiple)

    def rows(values_R: Tensor, fill: float = 0) -> Tensor:
        return extend(values_R[mine_L], size, fill)

    part = replace(
        batch,
        input_ids_S=batch.input_ids_S[rows_N],
        position_ids_S=batch.position_ids_S[rows_N],
        padding_S=batch.padding_S[rows_N],
        mask=exchange.local_mask(batch.mask, rank),
        logit_rows_R=rows(partition.inverse_S[logit_rows] - rank * partition.rows_per_rank),
        labels_R=rows(batch.labels_R),
        weights_R=rows(batch.weights_R),
        noise_levels_R=rows(batch.noise_levels_R),
        row_sample_R=rows(batch.row_sample_R),
        row_position_R=rows(batch.row_position_R),
        num_rows=len(mine_L),
        num_noisy=int((rows_N < batch.num_noisy).sum()),
        denominator=batch.denominator if rank == 0 else 0,
        num_tokens=batch.num_tokens if rank == 0 else 0,
        key_exchange=exchange.of_rank(rank) if exchange.num_sent else None,
    )
    return part.pin_memory() if batch.input_ids_S.is_pinned() else part


def length_multiple(parallel: ParallelConfig, device: torch.device = GPU) -> int:
    """What the positions of a batch are rounded up to, so that each rank's slice is whole tiles of ``device``."""
    return (TILE if device.type == "cuda" else CPU_MULTIPLE) * parallel.cp * _sequence_parts(parallel)


def logit_row_multiple(parallel: ParallelConfig, device: torch.device = GPU) -> int:
    """What the logit rows of a context-parallel rank are rounded up to; tensor-parallel ranks share them evenly."""
    parts = _sequence_parts(parallel)
    return round_up(ROW_MULTIPLE, parts) if device.type == "cuda" else CPU_MULTIPLE * parts


def _sequence_parts(parallel: ParallelConfig) -> int:
    return parallel.tp if parallel.sp else 1


def attention_tile(device: torch.device) -> int:
    """Rows that attention on ``device`` computes as a whole, by which context parallelism evens out its work."""
    return TILE if device.type == "cuda" else 1


def key_exchange(batch: Batch, num_ranks: int, work_tile: int = 1) -> KeyExchange:
    """Who owns which rows of a whole batch and whose keys cross; worked out once a batch, then kept with its mask."""
    name = ("context", num_ranks, work_tile)
    if name not in batch.mask.plans:
        partition = RowPartition.balanced(batch.mask, num_ranks, batch.num_noisy, work_tile)
        batch.mask.plans[name] = KeyExchange.exact(batch.mask, partition)
    return batch.mask.plans[name]


@dataclass(frozen=True)
class RankWork:
    """What the context-parallel ranks have to do in one micro-batch, or, added up, in several.

    Attributes:
        positions_R: int64, positions of each rank that are no padding; expert and linear layers cost this much.
        pairs_R: int64, visible (row, key) pairs of each rank; attention costs this much.
        keys_received: keys that a rank receives, per layer and forward pass.
    """

    positions_R: Tensor
    pairs_R: Tensor
    keys_received: int

    @classmethod
    def of(cls, batch: Batch, num_ranks: int, work_tile: int = 1) -> RankWork:
        """Count on the whole batch, hence the same on every rank without communication."""
        exchange = key_exchange(batch, num_ranks, work_tile)
        rows_RN = exchange.partition.rows_RN
        return cls(
            (~batch.padding_S)[rows_RN].sum(1), batch.mask.visible_counts()[rows_RN].sum(1), exchange.keys_received
        )

    def __add__(self, other: RankWork) -> RankWork:
        return RankWork(
            self.positions_R + other.positions_R, self.pairs_R + other.pairs_R, self.keys_received + other.keys_received
        )

    @property
    def position_imbalance(self) -> float:
        """Most over mean; 1 is even."""
        return _most_over_mean(self.positions_R)

    @property
    def pair_imbalance(self) -> float:
        """Most over mean; 1 is even."""
        return _most_over_mean(self.pairs_R)


def _most_over_mean(values_R: Tensor) -> float:
    total = int(values_R.sum())
    return int(values_R.max()) * len(values_R) / total if total else 1.0
