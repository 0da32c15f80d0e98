"""The CPU backend's plan covers exactly the visible pairs, wastes little, needs few calls and little memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llada_kernels import IntervalMask
from llada_kernels.backends import chunk_plan, chunk_tiles
from llada_kernels.backends.chunk_plan import ChunkPlan, Interval, refills
from llada_kernels.backends.chunk_tiles import Cost

from tests.kernels.cases import any_masks

COSTS = [Cost(0, 0), Cost(20, 2), Cost(300, 6), Cost(10**9, 0)]
CHUNK_COST, TILE_COST = Cost(1172, 2), Cost(293, 6)  # 8 heads of 64


@settings(max_examples=400, derandomize=True, deadline=None)
@given(any_masks(), st.sampled_from(COSTS))
def test_chunks_cover_the_mask_and_the_buffer_holds_their_keys(mask: IntervalMask, cost: Cost) -> None:
    plan = ChunkPlan.build(mask, cost, TILE_COST)
    covered = torch.zeros(mask.total_q, mask.total_k, dtype=torch.int64)
    buffer = torch.full((mask.total_k,), -1)
    held: tuple[Interval, ...] = ()
    for chunk in plan.chunks:
        keys = torch.cat([torch.arange(low, high) for low, high in chunk.keys])
        for position, first, count in refills(held, chunk.keys):
            buffer[position : position + count] = torch.arange(first, first + count)
        held = chunk.keys
        assert torch.equal(buffer[: chunk.num_keys], keys)
        visible = torch.ones(chunk.num_rows, chunk.num_keys)
        if not chunk.full:
            visible[:, chunk.shared_keys :] = plan.chunk_bias(chunk).exp()
        assert visible.any(0).all() and visible.any(1).all()
        covered[torch.arange(chunk.first_row, chunk.first_row + chunk.num_rows)[:, None], keys] += visible.long()
    assert torch.equal(covered, mask.dense().long())
    assert plan.visited_pairs()[0] >= mask.area()
    assert plan.all_rows_see == mask.dense().any(1).all()


@settings(max_examples=400, derandomize=True, deadline=None)
@given(any_masks(), st.sampled_from(COSTS), st.sampled_from([1, 4, 512]))
def test_tiles_cover_the_mask_and_batches_do_not_overlap(mask: IntervalMask, cost: Cost, limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MAX_BATCH_LINES", "MAX_TILE_ROWS", "MAX_TILE_KEYS", "MIN_SHARED_KEYS"):
            patch.setattr(chunk_tiles, name, limit)
        plan = ChunkPlan.build(mask, CHUNK_COST, cost)
    covered = torch.zeros(mask.total_q, mask.total_k, dtype=torch.int64)
    for tile in plan.tiles:
        bias = plan.tile_bias(tile)
        visible = torch.ones(tile.num_rows, tile.num_keys) if bias is None else bias.exp()
        assert visible.any(0).all() and visible.any(1).all()  # so nothing enters that nobody sees
        assert bias is None or not visible.all()
        assert tile.count == 1 or (tile.row_step >= tile.num_rows and tile.key_step >= tile.num_keys)
        assert tile.count == 1 or tile.count * max(tile.num_rows, tile.num_keys) <= limit
        for i in range(tile.count):
            row, key = tile.first_row + i * tile.row_step, tile.first_key + i * tile.key_step
            covered[row : row + tile.num_rows, key : key + tile.num_keys] += visible.long()
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
        plan = ChunkPlan.build(mask, CHUNK_COST, TILE_COST)
        assert max(plan.visited_pairs()) < 1.15 * mask.area()
        assert len(plan.chunks) < 110 and len(plan.tiles) < 110


def test_equal_blocks_and_documents_share_calls() -> None:
    whole = ChunkPlan.build(IntervalMask.mdlm([256]), CHUNK_COST, TILE_COST)
    assert [chunk.full for chunk in whole.chunks] == [True] and len(whole.tiles) == 1
    for mask, most in (
        (IntervalMask.block_diffusion([1024], 32), 24),
        (IntervalMask.block_diffusion([128] * 8, 32), 10),
        (IntervalMask.block_diffusion([20] * 50, 32), 10),
        (IntervalMask.causal([1024]), 16),
    ):
        assert len(ChunkPlan.build(mask, CHUNK_COST, TILE_COST).tiles) <= most


def test_many_short_documents_share_chunks() -> None:
    mask = IntervalMask.block_diffusion([20] * 500, 32)
    plan = ChunkPlan.build(mask, Cost(chunk_plan.CHUNK_COST_FLOPS // 64, 2), TILE_COST)
    assert len(plan.chunks) < 500
    assert max(plan.visited_pairs()) < mask.total_q * mask.total_k / 100


def test_additive_masks_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = IntervalMask.block_diffusion([512, 3584], 4)
    plan = ChunkPlan.build(mask, CHUNK_COST, TILE_COST)
    masked = [chunk for chunk in plan.chunks if not chunk.full]
    patterns = {tile.pattern for tile in plan.tiles if tile.pattern is not None}
    assert masked and patterns and plan.keep_biases
    for chunk in masked:
        plan.chunk_bias(chunk)
    for tile in plan.tiles:
        plan.tile_bias(tile)
    assert len(plan.biases) == len(masked) + len(patterns)
    # O(rows), although most chunks read thousands of keys: what all rows see takes no mask.
    assert sum(bias.numel() for bias in plan.biases.values()) < 256 * mask.total_q

    monkeypatch.setattr(chunk_plan, "CACHED_BIAS_ELEMENTS", 1000)
    plan = ChunkPlan.build(mask, CHUNK_COST, TILE_COST)
    plan.chunk_bias(masked[0])
    assert not plan.biases  # too much to keep with the plan
    tall = ChunkPlan.build(mask, Cost(10**12, 0), Cost(10**12, 0))
    assert max(chunk.num_rows for chunk in tall.chunks if not chunk.full) <= chunk_tiles.MAX_MASKED_ROWS
    assert max(tile.num_rows for tile in tall.tiles if tile.pattern) <= chunk_tiles.MAX_MASKED_ROWS
