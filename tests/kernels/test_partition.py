"""Context parallelism: partitions are exact and even, and what crosses ranks is what the dense mask says."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llada_kernels import IntervalMask, interval_attention
from llada_kernels.exchange import Balance, KeyExchange, crossing_keys, static_exchange
from llada_kernels.partition import TILE, RowPartition

from tests.kernels.cases import any_masks, make_inputs

LENGTH = 16384


def uneven_documents(total: int, number: int = 17, seed: int = 0, alignment: int = 32) -> list[int]:
    """Log-normal lengths, multiples of ``alignment``, that add up to ``total``."""
    draw = random.Random(seed)
    weights = [draw.lognormvariate(0, 1) for _ in range(number)]
    lengths = [max(1, round(w / sum(weights) * total / alignment)) * alignment for w in weights]
    lengths[lengths.index(max(lengths))] += total - sum(lengths)
    return lengths


def training_mask(documents: Sequence[int], block_size: int, multiple: int, *, needed: bool = True) -> IntervalMask:
    """``[noisy ; clean]`` without the clean copies of last blocks, rounded up, as the data path lays it out."""
    mask, length = IntervalMask.block_diffusion(documents, block_size), sum(documents)
    if needed:
        kept = list(range(length))
        start = 0
        for document in documents:
            kept += range(length + start, length + start + (document - 1) // block_size * block_size)
            start += document
        mask = mask.select_rows(kept).select_keys(kept)
    total = -(-mask.total_q // multiple) * multiple
    return mask.pad(total, total)


@st.composite
def partitions(draw: st.DrawFn) -> tuple[IntervalMask, RowPartition]:
    """Square masks of any kind, padded or not to whole tiles, and their partition."""
    mask = draw(any_masks(max_rows=60))
    ranks = draw(st.integers(1, 5))
    multiple = draw(st.sampled_from([1, 2, 8, TILE])) * ranks
    total = max(-(-max(mask.total_q, mask.total_k) // multiple), 1) * multiple
    num_noisy = draw(st.none() | st.integers(0, total))
    mask = mask.pad(total, total)
    return mask, RowPartition.balanced(mask, ranks, num_noisy, draw(st.sampled_from([1, 1, TILE, 7])))


@settings(max_examples=200, derandomize=True, deadline=None)
@given(partitions())
def test_every_row_has_one_owner_and_shards_come_back(case: tuple[IntervalMask, RowPartition]) -> None:
    mask, partition = case
    ranks, total = partition.num_ranks, mask.total_q
    assert partition.rows_RN.shape == (ranks, total // ranks) and partition.rows_RN.dtype == torch.int64
    assert partition.rows_RN.flatten().sort().values.tolist() == list(range(total))
    assert (partition.rows_RN.diff(dim=1) > 0).all()
    assert torch.equal(partition.rows_RN.flatten()[partition.inverse_S], torch.arange(total))
    for rank in range(ranks):
        assert (partition.owner_S[partition.rows_RN[rank]] == rank).all()
    x = torch.randn(2, total, 3)
    shards = [partition.shard(x, rank, 1) for rank in range(ranks)]
    assert all(torch.equal(shard, x[:, partition.rows_RN[rank]]) for rank, shard in enumerate(shards))
    assert torch.equal(partition.unshard(torch.cat(shards, 1), 1), x)
    if partition.num_noisy % ranks == 0:
        assert ((partition.rows_RN < partition.num_noisy).sum(1) == partition.num_noisy // ranks).all()
    again = RowPartition.balanced(IntervalMask(mask.endpoints.clone(), mask.total_k), ranks, partition.num_noisy)
    same = RowPartition.balanced(IntervalMask(mask.endpoints.clone(), mask.total_k), ranks, partition.num_noisy)
    assert torch.equal(again.rows_RN, same.rows_RN)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(partitions())
def test_what_crosses_is_what_the_dense_mask_says(case: tuple[IntervalMask, RowPartition]) -> None:
    mask, partition = case
    dense, crosses = mask.dense(), set()
    owner = partition.owner_S.tolist()
    for row, key in dense.nonzero().tolist():
        if owner[row] != owner[key]:
            crosses.add(key)
    assert set(crossing_keys(mask, partition).nonzero().flatten().tolist()) == crosses
    exchange = KeyExchange.exact(mask, partition)
    sent = partition.rows_RN[:, partition.rows_per_rank - exchange.num_sent :]
    assert crosses <= set(sent.flatten().tolist())
    assert exchange.num_sent % TILE == 0 or exchange.num_sent == partition.rows_per_rank
    if exchange.num_sent >= TILE:  # a tile less would not do
        assert crosses & set(sent[:, :TILE].flatten().tolist())
    assert exchange.halves == ("none" if not crosses else "all" if int(sent.min()) < partition.num_noisy else "clean")


@settings(max_examples=150, derandomize=True, deadline=None)
@given(partitions(), st.booleans())
def test_local_masks_make_up_the_whole(case: tuple[IntervalMask, RowPartition], everything: bool) -> None:
    mask, partition = case
    exchange = KeyExchange.exact(mask, partition)
    if everything:
        exchange = KeyExchange(partition, partition.rows_per_rank)
    dense, seen = mask.dense(), torch.zeros(mask.total_q, mask.total_k, dtype=torch.bool)
    positions = torch.arange(mask.total_k)
    gathered = torch.cat([partition.shard(positions, r)[partition.rows_per_rank - exchange.num_sent :]
                          for r in range(partition.num_ranks)])  # fmt: skip
    for rank in range(partition.num_ranks):
        keys, local = exchange.keys(rank), exchange.local_mask(mask, rank)
        local.validate()
        own = partition.shard(positions, rank)[: partition.rows_per_rank - exchange.num_sent]
        assert torch.equal(torch.cat((own, gathered))[exchange.order(rank)], keys)
        seen[partition.rows_RN[rank][:, None], keys] = local.dense()
        assert exchange.keys_received == keys.numel() - partition.rows_per_rank
    assert torch.equal(seen, dense)


def test_attention_of_the_shards_is_attention_of_the_whole() -> None:
    mask = training_mask([100, 28, 384], 32, TILE * 2)
    partition = RowPartition.balanced(mask, 2, 512)
    exchange = KeyExchange.exact(mask, partition)
    query, key, value = make_inputs(mask, 4, 2)
    parts = [
        interval_attention(partition.shard(query, rank, 1), key[:, exchange.keys(rank)], value[:, exchange.keys(rank)],
                           exchange.local_mask(mask, rank))
        for rank in range(2)
    ]  # fmt: skip
    whole = interval_attention(query, key, value, mask)
    torch.testing.assert_close(partition.unshard(torch.cat(parts, 1), 1), whole)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("block_size", [1, 4, 32, LENGTH])
def test_one_document_is_even(ranks: int, block_size: int) -> None:
    mask = training_mask([LENGTH], block_size, TILE * ranks)
    for half_rows, mask_ in (
        (LENGTH, mask),
        (None, IntervalMask.causal([LENGTH])),
        (None, IntervalMask.mdlm([LENGTH])),
    ):
        balance = balance_of(mask_, ranks, half_rows)
        assert balance.pair_imbalance <= 1.005
        assert sum(balance.live_tiles) == balance.undivided_tiles
        assert len(set(balance.noisy_rows)) == 1


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_seventeen_uneven_documents_are_even(ranks: int, seed: int) -> None:
    documents = uneven_documents(LENGTH, seed=seed)
    cases: list[tuple[int | None, IntervalMask]] = [
        (LENGTH, training_mask(documents, b, TILE * ranks)) for b in (1, 4, 32)
    ]
    cases += [(LENGTH, training_mask(documents, LENGTH, TILE * ranks, needed=False))]
    cases += [(None, IntervalMask.causal(documents)), (None, IntervalMask.mdlm(documents))]
    for half_rows, mask in cases:
        balance = balance_of(mask, ranks, half_rows)
        assert balance.pair_imbalance <= 1.01
        assert sum(balance.live_tiles) <= 1.01 * balance.undivided_tiles
        assert len(set(balance.noisy_rows)) == 1
        assert balance_of(mask, ranks, half_rows, work_tile=TILE).tile_imbalance <= 1.01


def balance_of(mask: IntervalMask, ranks: int, num_noisy: int | None, work_tile: int = 1) -> Balance:
    return Balance.of(mask, KeyExchange.exact(mask, RowPartition.balanced(mask, ranks, num_noisy, work_tile)))


def test_the_shapes_that_people_know_come_out() -> None:
    chunk = torch.arange(2048).view(8, 256)
    zigzag = RowPartition.balanced(IntervalMask.causal([2048]), 4)
    assert [set(rows.tolist()) for rows in zigzag.rows_RN] == [
        set(chunk[r].tolist() + chunk[7 - r].tolist()) for r in range(4)
    ]
    consecutive = RowPartition.balanced(IntervalMask.mdlm([2048]), 4)
    assert torch.equal(consecutive.rows_RN, torch.arange(2048).view(4, 512))
    short = RowPartition.balanced(IntervalMask.causal([512]), 4)  # one tile a rank: pieces are half tiles
    assert short.piece_size == 64
    one = RowPartition.balanced(IntervalMask.causal([96]), 1)
    assert torch.equal(one.rows_RN, torch.arange(96)[None])


@pytest.mark.parametrize("block_size", [1, 4, 32, 64, 128, 256])
@pytest.mark.parametrize("origin", ["document", "sequence"])
def test_the_static_answer_is_safe(block_size: int, origin: str) -> None:
    for alignment, ranks, seed in ((32, 2, 0), (128, 4, 1), (64, 8, 2)):
        documents = uneven_documents(2048, 5, seed, alignment)
        mask = IntervalMask.block_diffusion(documents, block_size, block_origin=origin)
        exact = KeyExchange.exact(mask, RowPartition.balanced(mask, ranks, 2048))
        static = static_exchange(block_size, alignment, 2048, 4096, ranks)
        assert static == "all" or exact.halves in ("none", "clean")
        assert (static == "clean") == (block_size <= min(alignment, TILE))
    assert static_exchange(1, 32, 2048, 2048, 2) == "all"
    assert static_exchange(32, 32, 2048 + 16, 4096, 2) == "all"


def test_documents_that_stay_whole_need_no_exchange() -> None:
    mask = IntervalMask.mdlm([512, 512])
    exchange = KeyExchange.exact(mask, RowPartition.balanced(mask, 2))
    assert (exchange.num_sent, exchange.halves, exchange.keys_received) == (0, "none", 0)
    assert exchange.local_mask(mask, 1).area() == 512 * 512


def test_long_pieces_keep_large_blocks_whole() -> None:
    mask = training_mask([LENGTH], 1024, TILE * 8)
    exchange = KeyExchange.exact(mask, RowPartition.balanced(mask, 8, LENGTH))
    assert exchange.halves == "clean" and exchange.num_sent * 8 < 1.01 * (LENGTH - 1024 + TILE * 8)


def test_balance_counts_against_the_dense_mask() -> None:
    mask = training_mask([700, 68, 256], 32, TILE * 4)
    partition = RowPartition.balanced(mask, 4, 1024)
    exchange = KeyExchange.exact(mask, partition)
    balance, dense = Balance.of(mask, exchange), mask.dense()
    assert balance.live_pairs == tuple(int(dense[rows].sum()) for rows in partition.rows_RN)
    tiles = []
    for rank in range(4):
        local = dense[partition.rows_RN[rank]][:, exchange.keys(rank)]
        local = torch.nn.functional.pad(local, (0, -local.shape[1] % TILE, 0, -local.shape[0] % TILE))
        tiles.append(int(local.view(-(-local.shape[0] // TILE), TILE, -1, TILE).any(3).any(1).sum()))
    assert balance.live_tiles == tuple(tiles)
    assert balance.keys_needed == int(crossing_keys(mask, partition).sum()) <= 4 * exchange.num_sent
    assert exchange.bytes_received(key_heads=4, head_dim=128) == 3 * exchange.num_sent * 2 * 4 * 128 * 2
    assert json.loads(json.dumps(balance.to_dict()))["pair_imbalance"] == balance.pair_imbalance
    for part in ("4 ranks", f"{balance.pair_imbalance:.4f}", f"{balance.live_tiles[0]:,}", "clean"):
        assert part in balance.text()


def test_a_long_sequence_is_quick() -> None:
    mask = training_mask(uneven_documents(65536), 32, TILE * 8)
    times = []
    for _ in range(3):
        start = time.process_time()
        KeyExchange.exact(mask, RowPartition.balanced(mask, 8, 65536))
        times.append(time.process_time() - start)
    assert min(times) < 0.2  # 0.02 on an idle core


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RowPartition.balanced(IntervalMask.mdlm([6]), 4), "6 rows cannot be split evenly over 4 ranks"),
        (lambda: RowPartition.balanced(IntervalMask.mdlm([6]), 0), "over 0 ranks"),
        (lambda: RowPartition.balanced(IntervalMask.mdlm([6]).pad(8, 6), 2), "8 rows and 6 keys"),
        (lambda: RowPartition.balanced(IntervalMask.mdlm([6]), 2, 7), r"num_noisy must lie in \[0, 6\], got 7"),
    ],
)
def test_what_cannot_be_split_is_refused(build: Callable[[], RowPartition], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
