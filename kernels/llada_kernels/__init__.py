"""Block attention over interval masks: an independent library on plain PyTorch."""

from __future__ import annotations

from llada_kernels.attention import choose_backend, interval_attention
from llada_kernels.backends import BACKENDS
from llada_kernels.interval_mask import IntervalMask

__all__ = ["BACKENDS", "IntervalMask", "choose_backend", "interval_attention"]
