"""The parts of a batch under context parallelism: together they are the batch, each computes what its rows need."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llada_kernels import interval_attention

from llada_mega.data.batch import Batch, build_batch
from llada_mega.data.context import RankWork, key_exchange, shard_batch
from llada_mega.data.sample import Sample
from llada_mega.diffusion.objectives import DiffusionObjective
from llada_mega.diffusion.schedule import get_schedule

LINEAR = get_schedule("linear")
LOGIT_ROWS = ("labels_R", "weights_R", "noise_levels_R", "row_sample_R", "row_position_R")


@st.composite
def batches(draw: st.DrawFn) -> tuple[Batch, int]:
    """A batch of any layout and a number of ranks that divides its positions, though not always its noisy half."""
    ranks = draw(st.integers(1, 4))
    documents = st.lists(st.tuples(st.integers(1, 24), st.booleans()), min_size=1, max_size=5)
    samples = []
    for index in range(draw(st.integers(1, 3))):
        lengths, padding = zip(*draw(documents), strict=True)
        real = torch.repeat_interleave(~torch.tensor(padding), torch.tensor(lengths))
        tokens = (torch.arange(len(real)) * 7 + 31 * index) % 90 + 1
        samples.append(Sample(tokens * real, list(lengths), list(padding), real, index))
    batch = build_batch(
        samples,
        layout=draw(st.sampled_from(["bdlm", "mdlm", "ar"])),
        block_size=draw(st.sampled_from([1, 3, 8])),
        objective=DiffusionObjective("elbo", LINEAR),
        schedule=LINEAR,
        seed=11,
        mask_token_id=99,
        pad_token_id=98,
        clean_tokens=draw(st.sampled_from(["needed", "all"])),
        length_multiple=ranks * draw(st.sampled_from([1, 8])),
        row_multiple=8,
    )
    return batch, ranks


@settings(max_examples=150, deadline=None, derandomize=True)
@given(batches())
def test_the_parts_are_the_batch(case: tuple[Batch, int]) -> None:
    batch, ranks = case
    parts = [shard_batch(batch, rank, ranks, row_multiple=4) for rank in range(ranks)]
    rows_RN = key_exchange(batch, ranks).partition.rows_RN
    assert rows_RN.flatten().sort().values.tolist() == list(range(len(batch.input_ids_S)))
    seen = []
    for part, rows_N in zip(parts, rows_RN, strict=True):
        for name in ("input_ids_S", "position_ids_S", "padding_S"):
            assert torch.equal(getattr(part, name), getattr(batch, name)[rows_N])
        assert part.num_noisy == int((rows_N < batch.num_noisy).sum())
        n, size = part.num_rows, len(part.logit_rows_R)
        assert size == len(batch.logit_rows_R) if ranks == 1 else size % 4 == 0 and n <= size and size - n <= 4
        values = [getattr(part, name) for name in LOGIT_ROWS]
        assert all(len(value) == size and not value[n:].any() for value in (part.logit_rows_R, *values))
        seen += list(zip(rows_N[part.logit_rows_R[:n]].tolist(), *(v[:n].tolist() for v in values), strict=True))
    n = batch.num_rows
    whole = [getattr(batch, name)[:n].tolist() for name in ("logit_rows_R", *LOGIT_ROWS)]
    assert sorted(seen) == sorted(zip(*whole, strict=True))
    assert sum(part.denominator for part in parts) == batch.denominator
    assert sum(part.num_tokens for part in parts) == batch.num_tokens
    work = RankWork.of(batch, ranks)
    assert work.pairs_R.tolist() == [part.mask.area() for part in parts]
    assert work.positions_R.tolist() == [int((~part.padding_S).sum()) for part in parts]
    assert (work + work).pair_imbalance == work.pair_imbalance >= 1.0


@settings(max_examples=100, deadline=None, derandomize=True)
@given(batches())
def test_attention_of_a_part_is_that_of_its_rows(case: tuple[Batch, int]) -> None:
    """With the keys put where ``key_exchange`` says; without one, with the rank's own keys."""
    batch, ranks = case
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(1, len(batch.input_ids_S), 2, 4, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    expected = interval_attention(query, key, value, batch.mask)
    parts = [shard_batch(batch, rank, ranks) for rank in range(ranks)]
    rows_RN = key_exchange(batch, ranks).partition.rows_RN
    for part, rows_N in zip(parts, rows_RN, strict=True):
        keys = rows_N
        if part.key_exchange is not None:
            sent = part.key_exchange.num_sent
            arrived = torch.cat((rows_N[: len(rows_N) - sent], rows_RN[:, len(rows_N) - sent :].flatten()))
            keys = torch.empty_like(arrived).index_copy_(0, part.key_exchange.places_K, arrived)
        actual = interval_attention(query[:, rows_N], key[:, keys], value[:, keys], part.mask)
        torch.testing.assert_close(actual, expected[:, rows_N], rtol=1e-12, atol=1e-12)


def test_one_rank_has_the_batch_itself_and_uneven_positions_are_refused() -> None:
    real = torch.ones(10, dtype=torch.bool)
    batch = build_batch(
        [Sample(torch.arange(10), [10], [False], real, 0)],
        layout="ar",
        block_size=1,
        objective=DiffusionObjective("elbo", LINEAR),
        schedule=LINEAR,
        seed=1,
        mask_token_id=99,
        pad_token_id=98,
        length_multiple=1,
    )
    assert shard_batch(batch, 0, 1) is batch
    with pytest.raises(ValueError, match="10 rows cannot be split evenly over 4 ranks"):
        shard_batch(batch, 0, 4)


def test_a_part_of_a_pinned_batch_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choosing rows makes new tensors, which the loader did not see."""
    batch = build_batch(
        [Sample(torch.arange(1, 17), [16], [False], torch.ones(16, dtype=torch.bool), 0)],
        layout="bdlm",
        block_size=4,
        objective=DiffusionObjective("elbo", LINEAR),
        schedule=LINEAR,
        seed=11,
        mask_token_id=99,
        pad_token_id=98,
    )
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    part = shard_batch(batch, 0, 2)
    assert not pinned
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor is batch.input_ids_S)
    part = shard_batch(batch, 0, 2)
    tensors = [value for value in vars(part).values() if torch.is_tensor(value)]
    assert all(any(tensor is one for one in pinned) for tensor in [*tensors, part.mask.endpoints])
