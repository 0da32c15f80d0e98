"""Noise schedules: how likely a token is still clean at time t, and the loss weight that follows.

Legend: alpha_t is the probability that a token is clean at time t; t in (0, 1]. LLaDA2.0 report (arXiv 2512.15745)
eq. (1) weights the cross entropy of a masked token by -alpha'_t / (1 - alpha_t).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from llada_mega.errors import ConfigError


class Schedule(ABC):
    """Three functions of t (any shape, floating point), each in the dtype of t. alpha(0) = 1 and alpha(1) = 0."""

    name: str

    @abstractmethod
    def mask_probability(self, t: Tensor) -> Tensor:
        """1 - alpha_t, exact in relative terms for small t."""

    @abstractmethod
    def weight(self, t: Tensor) -> Tensor:
        """-alpha'_t / (1 - alpha_t), eq. (1); infinite at t = 0, which no draw returns."""

    def alpha(self, t: Tensor) -> Tensor:
        """Probability that a token is still clean at time t."""
        return 1 - self.mask_probability(t)


class LinearSchedule(Schedule):
    """alpha_t = 1 - t, so the weight is 1 / t (LLaDA2.0 report; LLaDA, arXiv 2502.09992)."""

    name = "linear"

    def mask_probability(self, t: Tensor) -> Tensor:
        return t.clone()

    def weight(self, t: Tensor) -> Tensor:
        return 1 / t


class CosineSchedule(Schedule):
    """alpha_t = cos(pi t / 2) (Block Diffusion, arXiv 2503.09573): fewer masks than the linear schedule at every t.

    The weight (pi / 2) sin(x) / (1 - cos(x)) at x = pi t / 2 equals (pi / 2) cot(x / 2).
    """

    name = "cosine"

    def mask_probability(self, t: Tensor) -> Tensor:
        # 2 sin^2(x / 2) = 1 - cos(x) without the cancellation at small x; rounding may pass 1 by one ulp
        return (2 * torch.sin(t * (math.pi / 4)) ** 2).clamp(max=1.0)

    def weight(self, t: Tensor) -> Tensor:
        return (math.pi / 2) / torch.tan(t * (math.pi / 4))


SCHEDULES: dict[str, Schedule] = {schedule.name: schedule for schedule in (LinearSchedule(), CosineSchedule())}


def get_schedule(name: str, key: str = "objective.schedule") -> Schedule:
    """The schedule called ``name``.

    Raises:
        ConfigError: no such schedule; the message names ``key``.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"{key}={name} is unknown; use {' or '.join(SCHEDULES)}")
    return SCHEDULES[name]
