from __future__ import annotations

import pytest
import torch

from llada_mega.diffusion.schedule import SCHEDULES, Schedule, get_schedule
from llada_mega.errors import ConfigError

schedules = pytest.mark.parametrize("schedule", list(SCHEDULES.values()), ids=list(SCHEDULES))


@schedules
def test_weight_is_the_derivative_of_alpha(schedule: Schedule) -> None:
    t = torch.linspace(1e-3, 1, 500, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(schedule.alpha(t).sum(), t)
    expected = -slope / (1 - schedule.alpha(t))
    torch.testing.assert_close(schedule.weight(t), expected, rtol=1e-9, atol=1e-9)


@schedules
def test_ends_and_monotony(schedule: Schedule) -> None:
    t = torch.linspace(0, 1, 1001)
    alpha = schedule.alpha(t)
    assert alpha[0] == 1 and abs(alpha[-1]) < 1e-6
    assert (alpha.diff() < 0).all()
    probability = schedule.mask_probability(t)
    assert probability.min() == 0 and probability.max() <= 1 and probability[-1] > 1 - 1e-6


@schedules
def test_small_t_keeps_its_relative_accuracy(schedule: Schedule) -> None:
    t = torch.tensor([1e-3, 1e-5, 1e-7])
    exact = schedule.mask_probability(t.double())
    torch.testing.assert_close(schedule.mask_probability(t).double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(schedule.weight(t).double(), schedule.weight(t.double()), rtol=1e-6, atol=0)


def test_values() -> None:
    t = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(get_schedule("linear").weight(t), torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(get_schedule("cosine").alpha(t)[1], torch.tensor(0.5, dtype=torch.float64).sqrt())


def test_mask_probability_is_no_alias_of_t() -> None:
    t = torch.tensor([0.5])
    get_schedule("linear").mask_probability(t).zero_()
    assert t.item() == 0.5


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"objective\.schedule=square is unknown; use linear or cosine"):
        get_schedule("square")
