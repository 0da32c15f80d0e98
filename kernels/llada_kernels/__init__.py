"""Block attention over interval masks: an independent library on plain PyTorch."""

from __future__ import annotations

from llada_kernels.attention import BACKENDS, choose_backend, interval_attention
from llada_kernels.interval_mask import IntervalMask
from llada_kernels.reference import reference_attention

__all__ = ["BACKENDS", "IntervalMask", "choose_backend", "interval_attention", "reference_attention"]
