from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llada_mega.diffusion.corruption import corrupt
from llada_mega.diffusion.schedule import get_schedule

MASK_ID = 99


def run(tokens_L: Tensor, supervised_L: Tensor, t: float, *, seed: int = 1, sample: int = 0, schedule: str = "linear"):
    t_L = torch.full(tokens_L.shape, t)
    return corrupt(
        tokens_L,
        supervised_L,
        t_L,
        seed=seed,
        sample_index=sample,
        mask_token_id=MASK_ID,
        schedule=get_schedule(schedule),
    )


@settings(max_examples=100, deadline=None)
@given(
    length=st.integers(1, 40),
    t=st.floats(0, 1),
    seed=st.integers(0, 1000),
    sample=st.integers(0, 2**40),
    data=st.data(),
)
def test_masks_supervised_tokens_and_nothing_else(length: int, t: float, seed: int, sample: int, data) -> None:
    tokens_L = torch.arange(length)
    supervised_L = torch.tensor(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    noisy_L, masked_L = run(tokens_L, supervised_L, t, seed=seed, sample=sample)
    assert masked_L.dtype == torch.bool and noisy_L.dtype == torch.int64
    assert not (masked_L & ~supervised_L).any()
    assert torch.equal(noisy_L[~masked_L], tokens_L[~masked_L])
    assert (noisy_L[masked_L] == MASK_ID).all()
    again_L, _ = run(tokens_L, supervised_L, t, seed=seed, sample=sample)
    assert torch.equal(noisy_L, again_L)
    # a token's mask depends on its own position only, not on what stands around it
    prefix_L, _ = run(tokens_L[: length // 2 + 1], supervised_L[: length // 2 + 1], t, seed=seed, sample=sample)
    assert torch.equal(prefix_L, noisy_L[: length // 2 + 1])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_rate_is_the_mask_probability(schedule: str, t: float) -> None:
    length = 50_000
    _, masked_L = run(
        torch.zeros(length, dtype=torch.int64), torch.ones(length, dtype=torch.bool), t, schedule=schedule
    )
    expected = t if schedule == "linear" else 1 - math.cos(math.pi * t / 2)
    assert abs(masked_L.float().mean() - expected) < 5 * math.sqrt(expected * (1 - expected) / length)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_everything_is_masked_at_one(schedule: str) -> None:
    _, masked_L = run(torch.arange(1000), torch.ones(1000, dtype=torch.bool), 1.0, schedule=schedule)
    assert masked_L.all()


def test_masks_of_samples_and_seeds_differ() -> None:
    tokens_L, supervised_L = torch.arange(64), torch.ones(64, dtype=torch.bool)
    masks = [run(tokens_L, supervised_L, 0.5, seed=seed, sample=sample)[1] for seed in (1, 2) for sample in (0, 1)]
    assert all(not torch.equal(masks[i], masks[j]) for i in range(4) for j in range(i))


def test_a_higher_level_masks_a_superset() -> None:
    """The draw does not depend on t, so the masks of one sample are nested."""
    tokens_L, supervised_L = torch.arange(500), torch.ones(500, dtype=torch.bool)
    low, high = (run(tokens_L, supervised_L, t)[1] for t in (0.3, 0.6))
    assert (low & ~high).sum() == 0 and low.sum() < high.sum()
