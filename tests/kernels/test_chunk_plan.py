"""The CPU backend's plan covers exactly the visible pairs, wastes little, and is built once a mask."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llada_kernels import IntervalMask
from llada_kernels.backends.chunk_plan import ChunkPlan

from tests.kernels.cases import any_masks


@settings(max_examples=400, derandomize=True, deadline=None)
@given(any_masks(), st.sampled_from([0, 20, 300, 10**9]), st.sampled_from([0, 3]))
def test_chunks_cover_the_mask_and_the_buffer_holds_their_keys(mask: IntervalMask, cost: int, key_cost: int) -> None:
    plan = ChunkPlan.build(mask, cost, key_cost)
    order = torch.arange(mask.total_q) if plan.order is None else plan.order
    covered = torch.zeros(mask.total_q, mask.total_k, dtype=torch.int64)
    buffer = torch.full((plan.buffer_keys,), -1)
    next_row = 0
    for chunk in plan.chunks:
        keys = torch.cat([torch.arange(low, high) for low, high in chunk.keys])
        if len(chunk.keys) > 1:
            for position, start, count in chunk.refills:
                buffer[position : position + count] = torch.arange(start, start + count)
            assert torch.equal(buffer[: chunk.num_keys], keys)
        bias = plan.bias(chunk, torch.float32)
        visible = torch.ones(chunk.num_rows, chunk.num_keys) if bias is None else bias[0, 0].exp()
        assert visible.any(0).all() and visible.any(1).all()
        assert chunk.first_row == next_row
        next_row += chunk.num_rows
        covered[order[chunk.first_row : next_row, None], keys] += visible.long()
    assert torch.equal(covered, mask.dense().long())
    assert plan.visited_pairs() >= mask.area()


def test_waste_is_small_where_it_matters() -> None:
    cost, key_cost = 280_000 // (8 * 64), 6
    for mask in (
        IntervalMask.block_diffusion([1024], 1),
        IntervalMask.block_diffusion([1024], 32),
        IntervalMask.block_diffusion([1024], 4096),
        IntervalMask.block_diffusion([700, 1348], 8),
        IntervalMask.causal([2048]),
        IntervalMask.mdlm([1000, 24, 1000]),
    ):
        plan = ChunkPlan.build(mask, cost, key_cost)
        assert plan.visited_pairs() < 1.15 * mask.area()
        assert len(plan.chunks) < 80
    whole = ChunkPlan.build(IntervalMask.mdlm([1024]), cost, key_cost)
    assert len(whole.chunks) == 1 and whole.chunks[0].full and whole.order is None and whole.buffer_keys == 0


def test_many_short_documents_share_chunks_and_memory_follows_the_rows() -> None:
    mask = IntervalMask.block_diffusion([20] * 500, 32)
    plan = ChunkPlan.build(mask, 280_000 // 64, 6)
    assert len(plan.chunks) < 300
    assert plan.visited_pairs() < mask.total_q * mask.total_k / 100
    assert plan.buffer_keys < 500


def test_additive_masks_stay_small() -> None:
    plan = ChunkPlan.build(IntervalMask.block_diffusion([512, 3584], 32), 10**12, 6)
    assert max(chunk.num_rows for chunk in plan.chunks if not chunk.full) <= 256
    for chunk in plan.chunks:
        plan.bias(chunk, torch.float32)
    assert not plan.biases  # too much to keep with the plan
    whole = ChunkPlan.build(IntervalMask.mdlm([3000, 5]), 10**6, 6)
    assert [chunk.full for chunk in whole.chunks] == [True, True]
