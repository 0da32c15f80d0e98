"""The plan of the CPU backend: an interval mask cut into tiles, once for the forward and once for the backward pass.

Rows that see nothing and keys nobody sees appear in no tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from llada_kernels.backends.chunk_backward import backward_tiles
from llada_kernels.backends.chunk_forward import forward_tiles
from llada_kernels.backends.chunk_tiles import Cost, Pattern, Tile
from llada_kernels.interval_mask import IntervalMask

# What a tile costs beyond its pairs, tuned on one core (AVX-512, torch 2.13; twice as much hardly matters): itself, in
# heads x head dim x pairs, and each of its keys (backward also rows), in pairs. Backward, more tiles share a call.
CHUNK_COST_FLOPS = 600_000
KEY_COST_ROWS = 2
TILE_COST_FLOPS = 150_000
LINE_COST_PAIRS = 6
# Additive masks are kept with the plan up to this many elements (4 MiB in float32: a caller may hold dozens of masks),
# and rebuilt each time beyond it.
CACHED_BIAS_ELEMENTS = 1 << 20


@dataclass(frozen=True, eq=False)
class ChunkPlan:
    """Tiles that cover exactly the visible pairs of a mask, plus some invisible ones.

    Attributes:
        forward: tiles that hold all keys of their rows; neighbours read almost the same keys.
        backward: tiles of one interval of keys.
        all_rows_see: no row is blind.
        masked_rows, masked_keys: the most rows and keys of a forward tile that needs an additive mask.
        keep_biases: additive masks are small enough to be kept.
    """

    built: ClassVar[int] = 0  # plans built in this process; tests read it

    forward: tuple[Tile, ...]
    backward: tuple[Tile, ...]
    all_rows_see: bool
    masked_rows: int
    masked_keys: int
    keep_biases: bool
    biases: dict[tuple[Pattern, int], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, mask: IntervalMask, batch: int, heads: int, head_dim: int) -> ChunkPlan:
        """The plan of ``mask`` for attention of this shape, built on first use and kept on the mask."""
        features = batch * heads * head_dim
        forward_cost = Cost(CHUNK_COST_FLOPS // features, KEY_COST_ROWS)
        backward_cost = Cost(TILE_COST_FLOPS // features, LINE_COST_PAIRS)
        key = ("cpu", forward_cost, backward_cost, batch == 1)
        if key not in mask.plans:
            mask.plans[key] = cls.build(mask, forward_cost, backward_cost, batched=batch == 1)
        return mask.plans[key]

    @classmethod
    def build(cls, mask: IntervalMask, forward_cost: Cost, backward_cost: Cost, batched: bool = True) -> ChunkPlan:
        """Build a plan, in a time that grows with runs of equal rows x log(runs).

        Args:
            mask: to be covered.
            forward_cost, backward_cost: what tiles cost.
            batched: tiles may hold several rectangles; only for inputs with a batch of one.

        Raises:
            ValueError: the endpoints are no valid mask.
        """
        mask.validate()
        cls.built += 1
        forward, backward = forward_tiles(mask.endpoints, forward_cost), backward_tiles(mask.endpoints, backward_cost)
        if not batched:
            forward, backward = (tuple(s for tile in tiles for s in tile.singles()) for tiles in (forward, backward))
        masked = [tile for tile in forward if tile.pattern is not None]
        bias_elements = {
            (tile.pattern, tile.shared_keys): tile.num_rows * (tile.num_keys - tile.shared_keys)
            for tile in forward + backward
            if tile.pattern is not None
        }
        return cls(
            forward=forward,
            backward=backward,
            all_rows_see=sum(tile.count * tile.num_rows for tile in forward) == mask.total_q,
            masked_rows=max((tile.num_rows for tile in masked), default=0),
            masked_keys=max((tile.num_keys for tile in masked), default=0),
            keep_biases=sum(bias_elements.values()) <= CACHED_BIAS_ELEMENTS,
        )

    def bias(self, tile: Tile) -> Tensor | None:
        """Additive mask of a tile: float32 ``[rows, keys - shared keys]``, 0 or -inf; None when it needs none."""
        if tile.pattern is None:
            return None
        key = (tile.pattern, tile.shared_keys)
        bias = self.biases.get(key)
        if bias is None:
            visible = tile.visible()
            bias = torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)
            if self.keep_biases:
                self.biases[key] = bias
        return bias


def visited_pairs(tiles: Sequence[Tile]) -> int:
    """Number of (row, key) pairs that the tiles compute; at least the mask's area."""
    return sum(tile.count * tile.num_rows * tile.num_keys for tile in tiles)
