"""How large the micro-batches of a curriculum stage are, without reading data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from llada_kernels.partition import TILE
from llada_kernels.tiles import TileLists

from llada_mega.config.run import ParallelConfig
from llada_mega.config.schema import Config
from llada_mega.data.batch import ROW_MULTIPLE, round_up
from llada_mega.data.context import length_multiple
from llada_mega.diffusion.schedule import get_schedule
from llada_mega.diffusion.stages import ResolvedStage
from llada_mega.diffusion.visibility import build_visibility


@dataclass(frozen=True)
class Shape:
    """One micro-batch before it is rounded and split.

    Attributes:
        noisy, clean: positions of the two halves.
        visible_pairs: (row, key) pairs that attention needs; noisy_pairs: those of noisy rows.
        tile_pairs: pairs in the tiles of 128 x 128 that hold a visible one: what GPU kernels compute.
        rows: masked tokens expected; most_rows: at the highest noise level.
        exchanged: positions whose keys context-parallel ranks exchange.
    """

    noisy: int
    clean: int
    visible_pairs: int
    noisy_pairs: int
    tile_pairs: int
    rows: float
    most_rows: int
    exchanged: int

    def positions(self, parallel: ParallelConfig) -> int:
        """Positions of a context-parallel rank, rounding included."""
        return round_up(self.noisy + self.clean, length_multiple(parallel)) // parallel.cp

    def logit_rows(self, parallel: ParallelConfig, rows: float) -> int:
        """``rows`` of the whole micro-batch -> those of a context-parallel rank, rounding included."""
        return round_up(max(int(rows / parallel.cp), 1), ROW_MULTIPLE)

    @property
    def logit_pairs(self) -> float:
        """Visible pairs of the rows with logits, masked tokens being anywhere."""
        return self.noisy_pairs * self.rows / self.noisy

    def keys_sent(self, parallel: ParallelConfig) -> int:
        """Rows of which a context-parallel rank sends its keys, in whole tiles."""
        return round_up(self.exchanged // parallel.cp, TILE)


def shape_of_stage(config: Config, stage: ResolvedStage, document_length: int | None) -> Shape:
    """The shape of a stage's micro-batches if every document has ``document_length`` tokens (None: all of a sample)."""
    length, samples = stage.sequence_length, config.trainer.micro_batch_size
    lengths = _documents(length, document_length) * samples
    visibility = build_visibility(
        stage.layout,
        lengths,
        padding=[False] * len(lengths),
        block_size=stage.block_size,
        block_origin=config.data.block_origin,
        clean_tokens=config.data.clean_tokens,
        sequence_lengths=[length] * samples,
    )
    tiles = TileLists.of(visibility.mask, TILE, TILE)
    live = int(tiles.row_partial.counts().sum() + tiles.row_full.counts().sum())
    noisy, objective = length * samples, stage.objective
    pairs_S = visibility.mask.visible_counts()
    # The mean over the band of noise levels; a grid of midpoints is exact for the linear schedule.
    t = objective.t_min + (objective.t_max - objective.t_min) * (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    schedule = get_schedule(objective.schedule)
    clean = len(visibility.clean_positions)
    # Noisy keys stay where they are when no block lies on two ranks.
    whole_blocks = clean > 0 and TILE % stage.block_size == 0 and config.data.document_alignment % stage.block_size == 0
    most = float(schedule.mask_probability(torch.tensor(objective.t_max, dtype=torch.float64)))
    return Shape(
        noisy=noisy,
        clean=clean,
        visible_pairs=int(pairs_S.sum()),
        noisy_pairs=int(pairs_S[:noisy].sum()),
        tile_pairs=live * TILE * TILE,
        rows=noisy * float(schedule.mask_probability(t).mean()),
        most_rows=round(noisy * most),
        exchanged=clean if whole_blocks else noisy + clean,
    )


def _documents(length: int, document_length: int | None) -> list[int]:
    whole, rest = divmod(length, document_length or length)
    return [document_length or length] * whole + ([rest] if rest else [])
