"""Tile lists against tiles cut out of the dense mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llada_kernels import IntervalMask
from llada_kernels.tiles import TileList, TileLists
from torch import Tensor
from torch.nn.functional import pad

from tests.kernels.cases import any_masks


def dense_tiles(mask: IntervalMask, block_m: int, block_n: int) -> tuple[Tensor, Tensor]:
    """Live and full, bool [row tiles, key tiles], from the dense mask: missing rows see all, missing keys are dark."""
    rows, keys = -mask.total_q % block_m, -mask.total_k % block_n

    def cut(missing_row: bool) -> Tensor:
        padded = pad(pad(mask.dense(), (0, 0, 0, rows), value=missing_row), (0, keys), value=False)
        if missing_row and rows:
            padded[-rows:] = True
            padded[:, mask.total_k :] = False
        return padded.unflatten(1, (-1, block_n)).unflatten(0, (-1, block_m))

    return cut(False).any(3).any(1), cut(True).all(3).all(1)


def as_dense(tiles: TileList, others: int) -> Tensor:
    """bool [tiles, others] from lists, which must be increasing."""
    dense = torch.zeros(tiles.offsets.numel() - 1, others, dtype=torch.bool)
    for i, part in enumerate(tiles.indices.long().tensor_split(tiles.offsets[1:-1].long())):
        assert (part.diff() > 0).all()
        dense[i, part] = True
    return dense


@settings(max_examples=300, derandomize=True, deadline=None)
@given(any_masks(), st.integers(1, 9), st.integers(1, 9))
def test_tile_lists_equal_the_dense_mask(mask: IntervalMask, block_m: int, block_n: int) -> None:
    tiles = TileLists.of(mask, block_m, block_n)
    live, full = dense_tiles(mask, block_m, block_n)
    row_tiles, key_tiles = live.shape
    assert (tiles.row_tiles, tiles.key_tiles) == (row_tiles, key_tiles)
    assert torch.equal(as_dense(tiles.row_full, key_tiles), full)
    assert torch.equal(as_dense(tiles.row_partial, key_tiles), live & ~full)
    assert torch.equal(as_dense(tiles.key_full, row_tiles), full.T)
    assert torch.equal(as_dense(tiles.key_partial, row_tiles), (live & ~full).T)
    for order, work in ((tiles.row_order, live.sum(1)), (tiles.key_order, live.sum(0))):
        assert torch.equal(order.sort().values, torch.arange(order.numel(), dtype=torch.int32))
        assert (work[order.long()].diff() <= 0).all()
    assert tiles.live_tiles == int(live.sum())
    assert tiles.live_share() == pytest.approx(float(live.double().mean()))
    assert tiles.visited_pairs() >= mask.area()


@settings(max_examples=50, derandomize=True, deadline=None)
@given(any_masks(), st.integers(1, 9))
def test_padded_lists(mask: IntervalMask, block: int) -> None:
    tiles = TileLists.of(mask, block, block)
    for part, width in ((tiles.row_partial, tiles.key_tiles), (tiles.key_full, tiles.row_tiles)):
        padded = part.padded(width)
        assert padded.dtype == torch.int32 and padded.shape == (part.counts().numel(), width)
        for row, count, listed in zip(
            padded, part.counts(), part.indices.tensor_split(part.offsets[1:-1].long()), strict=True
        ):
            assert torch.equal(row[:count], listed) and (row[count:] == 0).all()


def test_a_known_mask() -> None:
    """[noisy 8 ; clean 8], block 4, tiles of 4: noisy blocks see themselves and earlier clean ones, clean is causal."""
    tiles = TileLists.of(IntervalMask.block_diffusion([8], 4), 4, 4)
    assert [part.tolist() for part in tiles.row_full.indices.tensor_split([1, 3, 4])] == [[0], [1, 2], [2], [2, 3]]
    assert tiles.row_partial.indices.numel() == 0 and tiles.row_order.tolist() == [1, 3, 0, 2]
    assert (tiles.live_tiles, tiles.visited_pairs(), tiles.live_share()) == (6, 96, 6 / 16)


def test_large_masks_stay_sparse() -> None:
    """A million rows: a boolean per row and key tile would take 8 GiB."""
    mask = IntervalMask.block_diffusion([256] * 2048, 32)
    tiles = TileLists.build(mask, 128, 128)
    assert mask.total_q == 1 << 20 and tiles.row_tiles == 8192
    # A document is 2 noisy and 2 clean row tiles: they touch 1, 3 noisy-or-clean and 1, 2 clean key tiles.
    assert tiles.live_tiles == 2048 * (2 + 3 + 1 + 2)


def test_built_once_and_on_the_masks_device() -> None:
    mask = IntervalMask.block_diffusion([90, 38], 8)
    built = TileLists.built
    first = TileLists.of(mask, 16, 32)
    assert TileLists.of(mask, 16, 32) is first and TileLists.built == built + 1
    assert TileLists.of(mask, 32, 16) is not first and TileLists.built == built + 2
    assert first.to("cpu") is first
    elsewhere = TileLists.of(mask.to("meta"), 16, 32)
    assert elsewhere.row_full.indices.is_meta and elsewhere.key_order.shape == first.key_order.shape
    assert elsewhere.key_partial.indices.shape == first.key_partial.indices.shape


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("keys", [0, 7])
def test_masks_without_pairs(rows: int, keys: int) -> None:
    tiles = TileLists.build(IntervalMask(torch.zeros(3, rows, dtype=torch.int32), keys), 4, 4)
    assert tiles.live_tiles == 0 and tiles.live_share() == 0
    assert tiles.row_full.counts().tolist() == [0] * tiles.row_tiles == [0] * -(-rows // 4)
    assert tiles.key_order.tolist() == list(range(-(-keys // 4)))


def test_impossible_requests_are_refused() -> None:
    mask = IntervalMask.mdlm([4, 3])
    with pytest.raises(ValueError, match="got 0 x 4"):
        TileLists.of(mask, 0, 4)
    with pytest.raises(ValueError, match="does not fit into width 0"):
        TileLists.of(mask, 2, 2).row_partial.padded(0)
    with pytest.raises(ValueError, match="row 0 decrease"):
        TileLists.of(IntervalMask(torch.tensor([[0], [3], [2]], dtype=torch.int32), 4), 2, 2)
