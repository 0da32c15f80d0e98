from __future__ import annotations

import math

import pytest
import torch

from llada_mega.diffusion.random import Stream, _box_muller, normal, normal_channels, philox, random_words, uniform
from llada_mega.errors import ConfigError

# Published known answers of philox4x32-10 (Random123, kat_vectors).
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    key_0, key_1 = words(key)
    # a batch, so that the vectorised loop is what is tested
    lanes = [torch.full((37,), word, dtype=torch.int64) for word in words(counter)]
    outputs = philox((lanes[0], lanes[1], lanes[2], lanes[3]), (key_0, key_1))
    assert [lane.unique().tolist() for lane in outputs] == [[word] for word in words(expected)]


def test_counter_and_key_layout() -> None:
    """(position, channel group, sample low, sample high) under (seed, stream): each reaches its own word."""
    seed, sample, position, channel = 0x12_3456_789A, 0x1_0000_0007, 5, 11
    counter = tuple(torch.tensor(word) for word in (position, channel >> 2, 7, 1))
    key = (0x3456_789A, 0x12 << 8 | Stream.MASK)
    expected = philox(counter, key)  # type: ignore[arg-type]
    drawn = random_words(seed, Stream.MASK, sample, torch.tensor(position), channel >> 2)
    assert [int(word) for word in drawn] == [int(word) for word in expected]
    lane = uniform(seed, Stream.MASK, sample, torch.tensor(position), channel)
    assert float(lane) == (int(expected[channel % 4]) >> 8) / 2**24


def test_uniform_range_and_moments() -> None:
    draw = uniform(7, Stream.MASK, 3, torch.arange(400_000)).double()
    assert draw.min() >= 0 and draw.max() < 1
    scale = 1 / math.sqrt(len(draw))
    assert abs(draw.mean() - 1 / 2) < 5 * scale * math.sqrt(1 / 12)
    assert abs(draw.var() - 1 / 12) < 5 * scale * math.sqrt(1 / 180)
    counts = torch.histc(draw, bins=100, min=0, max=1)
    chi_squared = ((counts - 4000) ** 2 / 4000).sum()
    assert 50 < chi_squared < 165  # 99 degrees of freedom: about 4.7 standard deviations


def test_normal_moments_and_tail() -> None:
    draw = normal_channels(7, Stream.EMBEDDING, 3, torch.arange(1000), 400).double().flatten()
    count = len(draw)
    assert torch.isfinite(draw).all()
    assert abs(draw.mean()) < 5 / math.sqrt(count)
    assert abs(draw.var() - 1) < 5 * math.sqrt(2 / count)
    assert abs((draw**3).mean()) < 5 * math.sqrt(15 / count)
    assert abs((draw**4).mean() - 3) < 5 * math.sqrt(96 / count)
    beyond_three = (draw.abs() > 3).double().mean()
    assert abs(beyond_three - 0.0026998) < 5 * math.sqrt(0.0027 / count)


def test_normal_of_extreme_words_is_finite() -> None:
    zero, most = torch.tensor(0), torch.tensor(2**32 - 1)
    longest, *_, shortest = _box_muller((zero, zero, most, most))
    assert longest.item() == pytest.approx(math.sqrt(64 * math.log(2))) and shortest.item() == 0


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 8},
        {"seed": 7 + (1 << 32)},
        {"stream": Stream.MASK},
        {"sample_index": 4},
        {"sample_index": 3 + (1 << 32)},
        {"channel": 1},
        {"channel": 4},
    ],
    ids=str,
)
def test_streams_are_uncorrelated(other: dict[str, int]) -> None:
    base = {"seed": 7, "stream": Stream.EMBEDDING, "sample_index": 3, "position": torch.arange(100_000), "channel": 0}
    first, second = (uniform(**arguments).double() for arguments in (base, base | other))  # type: ignore[arg-type]
    correlation = torch.corrcoef(torch.stack((first, second)))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(len(first))


def test_neighbouring_positions_are_uncorrelated() -> None:
    draw = uniform(0, Stream.MASK, 0, torch.arange(100_001)).double()
    assert abs(torch.corrcoef(torch.stack((draw[1:], draw[:-1])))[0, 1]) < 5 / math.sqrt(100_000)


def test_a_draw_depends_on_its_own_counter_only() -> None:
    """Any subset, order, shape or dtype of the counters gives the same numbers."""
    position = torch.arange(50)
    whole = uniform(1, Stream.MASK, 9, position)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniform(1, Stream.MASK, 9, position[order].to(torch.int32)), whole[order])
    assert torch.equal(uniform(1, Stream.MASK, torch.full((5, 1), 9), position.view(5, 10)), whole.view(5, 10))


@pytest.mark.parametrize("num_channels", [1, 3, 4, 10, 64])
def test_channels_equal_single_draws(num_channels: int) -> None:
    sample_R = torch.tensor([0, 5, 5, 1 << 33])
    position_R = torch.tensor([0, 7, 8, 4095])
    together = normal_channels(3, Stream.EMBEDDING, sample_R, position_R, num_channels)
    assert together.shape == (4, num_channels) and together.dtype == torch.float32
    channel = torch.arange(num_channels)
    assert torch.equal(together, normal(3, Stream.EMBEDDING, sample_R[:, None], position_R[:, None], channel))
    for row in range(4):
        for lane in range(num_channels):
            single = normal(3, Stream.EMBEDDING, int(sample_R[row]), position_R[row], lane)
            assert single.item() == together[row, lane].item()


def test_channels_of_one_sample() -> None:
    rows = normal_channels(3, Stream.EMBEDDING, 5, torch.arange(6), 8)
    assert torch.equal(rows, normal(3, Stream.EMBEDDING, 5, torch.arange(6)[:, None], torch.arange(8)))


@pytest.mark.parametrize("seed", [-1, 1 << 56])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(ConfigError, match=r"seed=.* is out of range"):
        uniform(seed, Stream.MASK, 0, torch.arange(3))
