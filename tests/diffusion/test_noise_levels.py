from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_mega.diffusion.noise_levels import _into_band, draw_noise_levels
from llada_mega.errors import ConfigError


def levels(sample_index: int, seed: int = 5, lengths: tuple[int, ...] = (1,), **keys: object) -> torch.Tensor:
    arguments = {"block_size": 1, "level": "sequence", "t_min": 0.0, "t_max": 1.0} | keys
    return draw_noise_levels(seed, sample_index, lengths, **arguments)  # type: ignore[arg-type]


def star_discrepancy(points: torch.Tensor) -> float:
    points = points.double().sort().values
    count = len(points)
    rank = torch.arange(count, dtype=torch.float64)
    return float(torch.maximum(points - rank / count, (rank + 1) / count - points).max())


@pytest.mark.parametrize("start", [0, 12_345, 10**9, 10**15])
@pytest.mark.parametrize("count", [4, 16, 128, 1000])
def test_every_window_of_samples_is_evenly_covered(start: int, count: int) -> None:
    window = torch.cat([levels(start + i) for i in range(count)])
    # a golden-ratio sequence keeps count * discrepancy near log(count); random draws need about sqrt(count)
    assert count * star_discrepancy(window) < 1.5 + 0.4 * torch.tensor(float(count)).log()


@pytest.mark.parametrize("level", ["document", "block"])
def test_units_of_one_sample_and_of_a_window_are_evenly_covered(level: str) -> None:
    lengths, block_size = ((2,) * 64, 2) if level == "document" else ((128,), 2)
    window = torch.stack([levels(i, lengths=lengths, level=level, block_size=block_size)[::2] for i in range(64)])
    for points in (*window.T[:5], *window[:5]):
        assert 64 * star_discrepancy(points) < 2.5
    assert 4096 * star_discrepancy(window.flatten()) < 10  # random draws: about 60
    assert window.unique().numel() == 4096


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**56 - 1),
    sample_index=st.integers(0, 2**60),
    band=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).filter(lambda band: band[1] > 0),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    block_size=st.integers(1, 10),
    level=st.sampled_from(["sequence", "document", "block"]),
    block_origin=st.sampled_from(["document", "sequence"]),
)
def test_stays_in_the_band_and_is_constant_on_its_unit(
    seed: int, sample_index: int, band: list[float], lengths: list[int], block_size: int, level: str, block_origin: str
) -> None:
    t_min, t_max = band
    arguments = (seed, sample_index, lengths, block_size, level, t_min, t_max, block_origin)
    t_L = draw_noise_levels(*arguments)
    assert t_L.shape == (sum(lengths),) and t_L.dtype == torch.float32
    assert (t_L >= torch.tensor(t_min)).all() and (t_L <= torch.tensor(t_max)).all()
    assert torch.equal(t_L, draw_noise_levels(*arguments))
    units = []
    start = 0
    for document, length in enumerate(lengths):
        for position in range(start, start + length):
            block = (position - start if block_origin == "document" else position) // block_size
            units.append({"sequence": (), "document": (document,), "block": (document, block)}[level])
        start += length
    values = {unit: {float(t) for t, owner in zip(t_L, units, strict=True) if owner == unit} for unit in units}
    assert all(len(found) == 1 for found in values.values())
    if t_max - t_min > 0.1:
        assert len({float(t) for t in t_L}) == len(values)  # and no two units share one


def test_ends_of_the_band() -> None:
    """The extreme 64-bit fractions: never 0, whose weight is infinite, and never above the band."""
    smallest, largest = torch.tensor([0]), torch.tensor([-1])
    assert _into_band(smallest, 0.0, 1.0).item() == 1.0
    assert 0 < _into_band(largest, 0.0, 1.0).item() < 1e-15
    for t_min, t_max in ((0.3, 0.8), (0.1, 0.7), (0.7, 0.7)):
        assert _into_band(smallest, t_min, t_max).item() == torch.tensor(t_max).item()
        assert _into_band(largest, t_min, t_max).item() == torch.tensor(t_min).item()


def test_seeds_shift_the_sequence() -> None:
    assert levels(0, seed=1).item() != levels(0, seed=2).item()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"level": "token"}, "objective.level=token is unknown"),
        ({"t_min": 0.5, "t_max": 0.4}, "objective.t_min=0.5 and objective.t_max=0.4 are no band"),
        ({"t_min": 0.0, "t_max": 0.0}, "are no band"),
        ({"t_min": -0.1}, "are no band"),
        ({"t_max": 1.5}, "are no band"),
        ({"t_max": float("nan")}, "are no band"),
        ({"level": "block", "block_origin": "token"}, "data.block_origin=token is unknown"),
        ({"level": "block", "block_size": 0}, "block_size=0"),
    ],
)
def test_errors(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        levels(0, **keys)
