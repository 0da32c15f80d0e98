"""Candidates and the rule that accepts them."""

from __future__ import annotations

import pytest
import torch

from llada_mega.inference.sampling import accept, draw_candidates, transfer_schedule


@pytest.mark.parametrize(
    ("block_size", "steps", "expected"),
    [(8, 4, [2, 2, 2, 2]), (8, 3, [3, 3, 2]), (5, 5, [1] * 5), (4, 6, [1, 1, 1, 1, 0, 0]), (7, 1, [7])],
)
def test_schedule(block_size: int, steps: int, expected: list[int]) -> None:
    assert transfer_schedule(block_size, steps) == expected


def test_temperature_zero_takes_the_most_probable_token() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, -1.0, 0.0]])
    token, probability = draw_candidates(logits, torch.tensor([3, 4]), step=0, seed=0, temperature=0.0, top_p=1.0)
    assert token.tolist() == [1, 0]
    torch.testing.assert_close(probability, torch.softmax(logits.double(), -1).max(-1).values)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_tokens_follow_the_distribution(temperature: float) -> None:
    """Chi-square of 20,000 draws; 99.9 % of it lies below 24.3 with 7 degrees of freedom."""
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, -0.5, 1.5, 0.2])
    count = 20_000
    token, probability = draw_candidates(
        logits.expand(count, -1), torch.arange(count), step=1, seed=7, temperature=temperature, top_p=1.0
    )
    expected = torch.softmax(logits.double() / temperature, -1)
    observed = torch.bincount(token, minlength=8)
    assert float(((observed - count * expected) ** 2 / (count * expected)).sum()) < 24.3
    torch.testing.assert_close(probability, expected[token])


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    """Probabilities 0.5, 0.3, 0.15, 0.05: 0.8 keeps two tokens, 0.81 three."""
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    for top_p, kept in ((0.49, {1}), (0.79, {1, 3}), (0.81, {0, 1, 3}), (1.0, {0, 1, 2, 3})):
        token, probability = draw_candidates(
            logits.expand(2000, -1), torch.arange(2000), step=0, seed=1, temperature=1.0, top_p=top_p
        )
        assert set(token.tolist()) == kept
        mass = sum(float(logits[index].exp()) for index in kept)
        torch.testing.assert_close(probability, logits.exp()[token].double() / mass, rtol=1e-5, atol=0)


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.zeros(4000, 5)
    logits[:, 2] = -torch.inf
    for temperature in (0.0, 1.0, 50.0):
        token, _ = draw_candidates(logits, torch.arange(4000), step=0, seed=3, temperature=temperature, top_p=1.0)
        assert 2 not in token


def test_a_draw_depends_on_seed_step_and_position_alone() -> None:
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    position = torch.arange(64)

    def draw(step: int = 0, seed: int = 0) -> torch.Tensor:
        return draw_candidates(logits, position, step=step, seed=seed, temperature=1.0, top_p=0.9)[0]

    assert torch.equal(draw(), draw())
    assert not torch.equal(draw(), draw(step=1)) and not torch.equal(draw(), draw(seed=1))
    some = torch.tensor([40, 3, 17])
    token, _ = draw_candidates(logits[some], position[some], step=0, seed=0, temperature=1.0, top_p=0.9)
    assert torch.equal(token, draw()[some])


def test_threshold_is_strict_and_the_schedule_is_the_floor() -> None:
    probability = torch.tensor([0.2, 0.95, 0.99, 0.96, 0.5], dtype=torch.float64)
    assert accept(probability, 1, 0.95).tolist() == [False, False, True, True, False]
    assert accept(probability, 2, 0.95).tolist() == [False, False, True, True, False]
    assert accept(probability, 3, 0.95).tolist() == [False, True, True, True, False]
    assert accept(probability, 1, 1.0).tolist() == [False, False, True, False, False]
    assert accept(probability, 5, 0.0).tolist() == [True] * 5
    assert accept(torch.tensor([0.5, 0.5, 0.5]), 2, 0.9).tolist() == [True, True, False]
