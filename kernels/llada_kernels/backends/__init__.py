"""The ways to compute attention over an interval mask, best first. Each is one module with the same three names."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from llada_kernels.backends import cpu, cudnn_flex, flex, reference, triton_tiles
from llada_kernels.interval_mask import IntervalMask


class Backend(Protocol):
    """What a backend module offers. Importing it is cheap: optional packages are imported when they are needed."""

    SUMMARY: str
    """What it does, in a few words, for the reason that ``choose_backend`` gives."""

    def obstacle(self, device: torch.device, dtype: torch.dtype | None, head_dim: int | None) -> str | None:
        """Why this backend cannot serve such inputs here, None when it can; what is None is not checked."""

    def attention(
        self,
        query_BSHD: Tensor,
        key_BKHD: Tensor,
        value_BKHD: Tensor,
        mask: IntervalMask,
        scale: float,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor]:
        """Output ``[B, S, Hq, D]`` and log-sum-exp of the scaled scores, float32 ``[B, S, Hq]``; both differentiable.

        The inputs have been checked, and the mask is on their device. Rows that see nothing give output 0, lse -inf
        and no gradient. Results are the same on every call, unless ``deterministic`` is False.
        """


BACKENDS: dict[str, Backend] = {
    "cpu": cpu,
    "cudnn": cudnn_flex,
    "flex": flex,
    "triton": triton_tiles,
    "reference": reference,
}
