"""The CPU backend's plan covers exactly the visible pairs, wastes little, needs few calls and little memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llada_kernels import IntervalMask
from llada_kernels.backends import chunk_backward, chunk_plan, chunk_tiles
from llada_kernels.backends.chunk_forward import refills
from llada_kernels.backends.chunk_plan import ChunkPlan, visited_pairs
from llada_kernels.backends.chunk_tiles import Cost, Interval, Tile
from torch import Tensor

from tests.kernels.cases import any_masks

COSTS = [Cost(0, 0), Cost(20, 2), Cost(300, 6), Cost(10**9, 0)]
FORWARD_COST, BACKWARD_COST = Cost(1172, 2), Cost(293, 6)  # 8 heads of 64


def seen(plan: ChunkPlan, tile: Tile) -> Tensor:
    """The visible pairs of a tile, int64 ``[rows, keys]``; every row sees something and every key is seen."""
    visible = torch.ones(tile.num_rows, tile.num_keys)
    bias = plan.bias(tile)
    if bias is not None:
        visible[:, tile.shared_keys :] = bias.exp()
        assert not visible.all()
    assert visible.any(0).all() and visible.any(1).all()  # so nothing enters that nobody sees
    return visible.long()


@settings(max_examples=400, derandomize=True, deadline=None)
@given(any_masks(), st.sampled_from(COSTS), st.sampled_from([1, 40, 1024]))
def test_forward_tiles_cover_the_mask_and_the_buffer_holds_their_keys(
    mask: IntervalMask, cost: Cost, limit: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk_tiles, "MAX_BATCH_LINES", limit)
        plan = ChunkPlan.build(mask, cost, BACKWARD_COST)
    covered = torch.zeros(mask.total_q, mask.total_k, dtype=torch.int64)
    buffer = torch.full((mask.total_k,), -1)
    held: tuple[Interval, ...] = ()
    for tile in plan.forward:
        keys = torch.cat([torch.arange(low, high) for low, high in tile.keys])
        for position, first, count in refills(held, tile.keys):
            buffer[position : position + count] = torch.arange(first, first + count)
        held = tile.keys
        assert torch.equal(buffer[: tile.num_keys], keys)
        assert tile.count == 1 or tile.count * max(tile.num_rows, tile.num_keys) <= limit
        for i in range(tile.count):
            row = tile.first_row + i * tile.row_step
            covered[torch.arange(row, row + tile.num_rows)[:, None], keys + i * tile.key_step] += seen(plan, tile)
    assert torch.equal(covered, mask.dense().long())
    rows = [tile.first_row + i * tile.row_step for tile in plan.forward for i in range(tile.count)]
    assert len(set(rows)) == len(rows)  # one tile holds all keys of a row
    assert sum(tile.count * tile.num_rows for tile in plan.forward) == int(mask.dense().any(1).sum())
    assert plan.all_rows_see == mask.dense().any(1).all()


@settings(max_examples=400, derandomize=True, deadline=None)
@given(any_masks(), st.sampled_from(COSTS), st.sampled_from([1, 4, 512]))
def test_backward_tiles_cover_the_mask_and_batches_do_not_overlap(mask: IntervalMask, cost: Cost, limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk_tiles, "MAX_BATCH_LINES", limit)
        for name in ("MAX_TILE_ROWS", "MAX_TILE_KEYS", "MIN_SHARED_KEYS"):
            patch.setattr(chunk_backward, name, limit)
        plan = ChunkPlan.build(mask, FORWARD_COST, cost)
    covered = torch.zeros(mask.total_q, mask.total_k, dtype=torch.int64)
    for tile in plan.backward:
        assert len(tile.keys) == 1 and tile.shared_keys == 0
        assert tile.count == 1 or (tile.row_step >= tile.num_rows and tile.key_step >= tile.num_keys)
        assert tile.count == 1 or tile.count * max(tile.num_rows, tile.num_keys) <= limit
        for i in range(tile.count):
            row, key = tile.first_row + i * tile.row_step, tile.keys[0][0] + i * tile.key_step
            covered[row : row + tile.num_rows, key : key + tile.num_keys] += seen(plan, tile)
    assert torch.equal(covered, mask.dense().long())


def test_waste_is_small_where_it_matters() -> None:
    for mask in (
        IntervalMask.block_diffusion([1024], 1),
        IntervalMask.block_diffusion([1024], 32),
        IntervalMask.block_diffusion([1024], 4096),
        IntervalMask.block_diffusion([700, 1348], 8),
        IntervalMask.causal([2048]),
        IntervalMask.mdlm([1000, 24, 1000]),
    ):
        plan = ChunkPlan.build(mask, FORWARD_COST, BACKWARD_COST)
        assert max(visited_pairs(plan.forward), visited_pairs(plan.backward)) < 1.15 * mask.area()
        assert len(plan.forward) < 110 and len(plan.backward) < 110


def test_equal_blocks_and_documents_share_calls() -> None:
    whole = ChunkPlan.build(IntervalMask.mdlm([256]), FORWARD_COST, BACKWARD_COST)
    assert whole.forward == whole.backward == (Tile(0, 256, ((0, 256),)),)
    for mask, forward, backward in (
        (IntervalMask.block_diffusion([1024], 32), 64, 20),
        (IntervalMask.block_diffusion([128] * 8, 32), 8, 8),
        (IntervalMask.block_diffusion([20] * 50, 32), 4, 4),
        (IntervalMask.causal([1024]), 32, 16),
    ):
        plan = ChunkPlan.build(mask, FORWARD_COST, BACKWARD_COST)
        assert len(plan.forward) <= forward and len(plan.backward) <= backward


def test_many_short_documents_waste_little() -> None:
    mask = IntervalMask.block_diffusion([20, 21] * 250, 32)
    plan = ChunkPlan.build(mask, Cost(chunk_plan.CHUNK_COST_FLOPS // 64, 2), BACKWARD_COST)
    assert len(plan.forward) < 500
    assert max(visited_pairs(plan.forward), visited_pairs(plan.backward)) < mask.total_q * mask.total_k / 100


def test_additive_masks_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = IntervalMask.block_diffusion([512, 3584], 4)
    plan = ChunkPlan.build(mask, FORWARD_COST, BACKWARD_COST)
    masked = [tile for tile in plan.forward + plan.backward if tile.pattern is not None]
    assert masked and plan.keep_biases
    for tile in masked:
        plan.bias(tile)
    # O(rows), although most tiles of the forward pass read thousands of keys: what all rows see takes no mask.
    assert 0 < sum(bias.numel() for bias in plan.biases.values()) < 256 * mask.total_q

    monkeypatch.setattr(chunk_plan, "CACHED_BIAS_ELEMENTS", 1000)
    plan = ChunkPlan.build(mask, FORWARD_COST, BACKWARD_COST)
    plan.bias(masked[0])
    assert not plan.biases  # too much to keep with the plan
    tall = ChunkPlan.build(mask, Cost(10**12, 0), Cost(10**12, 0))
    assert max(tile.num_rows for tile in tall.forward + tall.backward if tile.pattern) <= chunk_tiles.MAX_MASKED_ROWS
