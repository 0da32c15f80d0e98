"""The objective against exact sums over a vocabulary so small that every mask can be enumerated.

The "model" is a table: one categorical distribution for every position and every partly masked input it can see.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from llada_mega.diffusion.corruption import corrupt
from llada_mega.diffusion.noise_levels import draw_noise_levels
from llada_mega.diffusion.objectives import DiffusionObjective
from llada_mega.diffusion.schedule import get_schedule
from llada_mega.errors import ConfigError

VOCABULARY, MASK_ID = 3, 3
TOKENS = (2, 0, 1, 1)
NegativeLogLikelihood = Callable[[int, Sequence[int]], float]


def table_model(block_size: int) -> NegativeLogLikelihood:
    """-log p(x_0 at the position | what it sees): clean earlier blocks and its own block, partly masked."""
    table: dict[tuple[object, ...], torch.Tensor] = {}
    generator = torch.Generator().manual_seed(11)

    def nll(position: int, noisy: Sequence[int]) -> float:
        block = position // block_size * block_size
        seen = (position, TOKENS[:block], tuple(noisy[block : block + block_size]))
        if seen not in table:
            logits = 2 * torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
            table[seen] = -logits.log_softmax(0)
        return float(table[seen][TOKENS[position]])

    # fill the table in a fixed order, so that its values do not depend on who asks first
    for masked in itertools.product([False, True], repeat=len(TOKENS)):
        for position in itertools.compress(range(len(TOKENS)), masked):
            nll(position, mask_out(masked))
    return nll


def mask_out(masked: Sequence[bool]) -> tuple[int, ...]:
    return tuple(MASK_ID if is_masked else token for token, is_masked in zip(TOKENS, masked, strict=True))


def any_order_nll(nll: NegativeLogLikelihood, block_size: int) -> float:
    """The bound without any schedule: blocks left to right, inside a block the mean over all orders of revealing."""
    total = 0.0
    for start in range(0, len(TOKENS), block_size):
        block = range(start, min(start + block_size, len(TOKENS)))
        orders = list(itertools.permutations(block))
        for order in orders:
            for revealed, position in enumerate(order):
                masked = [k in order[revealed:] for k in range(len(TOKENS))]
                total += nll(position, mask_out(masked)) / len(orders)
    return total


def loss_of_mask(objective: DiffusionObjective, nll: NegativeLogLikelihood, masked: Sequence[bool], t: float) -> float:
    """Weighted sum of the masked tokens' cross entropies, as training forms it."""
    rows = list(itertools.compress(range(len(TOKENS)), masked))
    weights = objective.row_weights(torch.full((len(rows),), t, dtype=torch.float64))
    assert weights.dtype == torch.float32
    return sum(float(w) * nll(row, mask_out(masked)) for w, row in zip(weights, rows, strict=True))


def expected_loss(objective: DiffusionObjective, nll: NegativeLogLikelihood, t: float) -> float:
    """Mean over all 2^L masks at noise level t."""
    rate = float(objective.schedule.mask_probability(torch.tensor(t, dtype=torch.float64)))
    total = 0.0
    for masked in itertools.product([False, True], repeat=len(TOKENS)):
        probability = math.prod(rate if is_masked else 1 - rate for is_masked in masked)
        total += probability * loss_of_mask(objective, nll, masked, t)
    return total


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("block_size", [1, 2, 3, 4])
def test_elbo_estimator_integrates_to_the_exact_bound(schedule: str, block_size: int) -> None:
    """Eq. (1) over all masks and t in (0, 1] is the any-order bound, whatever the schedule; at block size 1 it is the
    exact negative log-likelihood of the unshifted model."""
    objective = DiffusionObjective("elbo", get_schedule(schedule))
    nll = table_model(block_size)
    nodes, node_weights = np.polynomial.legendre.leggauss(20)
    levels = (nodes + 1) / 2
    integral = sum(w / 2 * expected_loss(objective, nll, t) for t, w in zip(levels, node_weights, strict=True))
    exact = any_order_nll(nll, block_size)
    assert integral == pytest.approx(exact, rel=1e-6)  # the weights are float32
    if block_size == 1:
        likelihood = sum(nll(k, mask_out([i == k for i in range(len(TOKENS))])) for k in range(len(TOKENS)))
        assert exact == pytest.approx(likelihood, rel=1e-12)
    assert objective.denominator(num_supervised=len(TOKENS), num_masked=1) == len(TOKENS)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("level", "block_size"), [("document", 4), ("document", 2), ("block", 2)])
def test_drawn_masks_estimate_the_exact_bound(schedule: str, level: str, block_size: int) -> None:
    """z-test of the training path: noise levels and masks as drawn, many copies of the sequence as documents."""
    objective = DiffusionObjective("elbo", get_schedule(schedule))
    nll = table_model(block_size)
    copies, length = 4000, len(TOKENS)
    tokens_L = torch.tensor(TOKENS).repeat(copies)
    t_L = draw_noise_levels(3, 0, [length] * copies, block_size, level, 0.0, 1.0)
    noisy_L, masked_L = corrupt(
        tokens_L,
        torch.ones_like(tokens_L, dtype=torch.bool),
        t_L,
        seed=3,
        sample_index=0,
        mask_token_id=MASK_ID,
        schedule=objective.schedule,
    )
    weights_R = objective.row_weights(t_L[masked_L])
    rows_R = masked_L.nonzero().flatten()
    noisy = noisy_L.view(copies, length).tolist()
    entropies = [nll(row % length, noisy[row // length]) for row in rows_R.tolist()]
    loss_D = torch.zeros(copies, dtype=torch.float64)
    loss_D.index_add_(0, rows_R // length, weights_R.double() * torch.tensor(entropies, dtype=torch.float64))
    z = (loss_D.mean() - any_order_nll(nll, block_size)) / (loss_D.std() / math.sqrt(copies))
    assert abs(z) < 4
    # the same draws without the weight miss the bound, so the test can fail
    loss_D.zero_().index_add_(0, rows_R // length, torch.tensor(entropies, dtype=torch.float64))
    assert abs(loss_D.mean() - any_order_nll(nll, block_size)) > 10 * loss_D.std() / math.sqrt(copies)


def test_uniform_is_the_mean_over_masked_tokens() -> None:
    objective = DiffusionObjective("uniform", get_schedule("linear"))
    nll = table_model(2)
    masked = [True, False, True, True]
    total = loss_of_mask(objective, nll, masked, 0.3)
    expected = sum(nll(k, mask_out(masked)) for k in (0, 2, 3)) / 3
    assert total / objective.denominator(num_supervised=4, num_masked=3) == pytest.approx(expected, rel=1e-12)


def test_denominators_add_up_over_a_split() -> None:
    """Empty micro-batches add nothing."""
    for weighting, expected in (("elbo", 12), ("uniform", 5)):
        objective = DiffusionObjective(weighting, get_schedule("linear"))
        parts = [objective.denominator(4, 3), objective.denominator(4, 2), objective.denominator(4, 0)]
        assert sum(parts) == objective.denominator(12, 5) == expected


def test_unknown_weighting() -> None:
    with pytest.raises(ConfigError, match=r"objective\.weighting=flat is unknown; use elbo or uniform"):
        DiffusionObjective("flat", get_schedule("linear"))
