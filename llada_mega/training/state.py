"""What a run carries from step to step, and what a step measures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

NOISE_BINS = 8  # equal bins of t in (0, 1] for the loss by noise level


@dataclass
class TrainState:
    """Position of a run. Stage, learning rate, noise and data are pure functions of ``consumed_samples``."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0  # real data tokens, padding excluded
    embedding_rms: float = 0.0  # of the embedding table when training began: the default noise std
    skipped_samples: list[list[int]] = field(
        default_factory=list
    )  # ranges [first, end) that no weight has learned from

    def skip(self, first: int) -> None:
        """Note that the weights know nothing of the samples from ``first`` to here, in order and without overlap."""
        while self.skipped_samples and self.skipped_samples[-1][1] >= first:
            first = min(first, self.skipped_samples.pop()[0])
        self.skipped_samples.append([first, self.consumed_samples])

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``state.json``."""
        return asdict(self)


@dataclass
class StepMeasurement:
    """Global measurements of one step, all but ``expert_load`` known before the optimizer changes the weights.

    ``loss`` is the weighted loss over the objective's denominator, ``ce_masked`` the plain cross entropy per masked
    token; both in nats.
    """

    loss: float
    ce_masked: float
    accuracy: float
    num_rows: int  # masked tokens
    num_tokens: int  # real data tokens
    num_positions: int  # processed positions, noisy and clean, padding included
    grad_norm: float
    mask_embedding_rms: float  # of the MASK row that the step ran with: decides whether a conversion is stable
    flops: float  # model FLOPs a device, on average
    ce_by_noise: dict[str, float] = field(default_factory=dict)
    expert_load: Tensor | None = None  # int64 [MoE layers, num_experts]: tokens that went to each; None when skipped

    @property
    def mask_ratio(self) -> float:
        """Masked tokens over data tokens."""
        return self.num_rows / max(self.num_tokens, 1)
