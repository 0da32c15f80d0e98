"""Training objectives: how much each masked token counts, and what the sum is divided by.

Legend: R rows, the masked tokens of a batch.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from llada_mega.diffusion.schedule import Schedule
from llada_mega.errors import ConfigError

WEIGHTINGS = ("elbo", "uniform")


class Objective(Protocol):
    """A strategy: the loss of a global batch is sum(weights_R * cross_entropy_R) / denominator.

    Both parts are known on the host before the forward pass. Denominators of micro-batches and ranks add up, and the
    division happens once, over the global batch, so the loss does not depend on how the batch is split. A denominator
    may be 0 (a micro-batch without a masked token); the sum over the global batch is what must not be.
    """

    def row_weights(self, t_R: Tensor) -> Tensor:
        """Weight of each masked token from its noise level in (0, 1]: float32 [R]."""
        ...

    def denominator(self, num_supervised: int, num_masked: int) -> int:
        """What a batch with these token counts adds to the global denominator."""
        ...


class DiffusionObjective:
    """Eq. (1) and (2): cross entropy of the clean token at every masked position.

    ``elbo`` weights by -alpha'_t / (1 - alpha_t) and divides by supervised tokens: an unbiased estimate of the
    negative evidence lower bound in nats a token, if t covers (0, 1]. ``uniform`` is the plain mean over masked tokens.

    Raises:
        ConfigError: unknown weighting.
    """

    def __init__(self, weighting: str, schedule: Schedule) -> None:
        check_weighting(weighting)
        self.weighting = weighting
        self.schedule = schedule

    def row_weights(self, t_R: Tensor) -> Tensor:
        """-alpha'_t / (1 - alpha_t), or 1; float32 [R]."""
        t_R = t_R.to(torch.float32)
        return self.schedule.weight(t_R) if self.weighting == "elbo" else torch.ones_like(t_R)

    def denominator(self, num_supervised: int, num_masked: int) -> int:
        """Supervised tokens (``elbo``) or masked tokens (``uniform``)."""
        return num_supervised if self.weighting == "elbo" else num_masked


def check_weighting(weighting: str, key: str = "objective.weighting") -> None:
    """Raise ConfigError, naming ``key``, unless the weighting exists."""
    if weighting not in WEIGHTINGS:
        raise ConfigError(f"{key}={weighting} is unknown; use {' or '.join(WEIGHTINGS)}")
