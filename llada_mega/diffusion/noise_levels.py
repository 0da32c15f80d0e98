"""Noise levels t: spread evenly over any window of samples, yet a pure function of the sample.

t = t_min + (t_max - t_min) (1 - frac(u(seed) + phi i + psi j)) with i the global sample index, j the index of the
document or block inside the sample, phi the golden ratio's fractional part and psi that of sqrt(2). A Kronecker
sequence needs no batch to stratify over (MDLM, arXiv 2406.07524, stratifies inside a batch), so neither the batch
size nor the micro-batch split changes a draw. 1 - frac lies in (0, 1]: t = 0 has an infinite weight.

Legend: L tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llada_mega.diffusion.blocks import index_blocks
from llada_mega.diffusion.random import Stream, random_words
from llada_mega.errors import ConfigError

LEVELS = ("sequence", "document", "block")

# Fractions of 2^64. Sums wrap modulo 2^64, which is frac() exactly, at any sample index.
_PHI = 0x9E3779B97F4A7C15  # (sqrt(5) - 1) / 2
_PSI = 0x6A09E667F3BCC909  # sqrt(2) - 1
_WRAP = 1 << 64


def draw_noise_levels(
    seed: int,
    sample_index: int,
    document_lengths: Sequence[int],
    block_size: int,
    level: str,
    t_min: float,
    t_max: float,
    block_origin: str = "document",
) -> Tensor:
    """Noise level of every token of one sample: float32 t_L [L] in (t_min, t_max], constant over a unit of ``level``.

    Args:
        sample_index: global sample index, so that a later epoch draws anew.
        document_lengths: lengths that tile the sample, padding included.
        level: the unit that shares a noise level: ``sequence``, ``document`` or ``block``.
        t_min, t_max: band of noise levels, 0 <= t_min <= t_max <= 1, t_max > 0 (eq. (5)'s bandwidth, on the mask side).

    Raises:
        ConfigError: unknown level or block origin, or an empty band.
    """
    check_band(level, t_min, t_max)
    if level == "sequence":
        unit_L = torch.zeros(sum(document_lengths), dtype=torch.int64)
    else:
        index = index_blocks(document_lengths, block_size, block_origin)
        unit_L = index.document_L if level == "document" else index.segments()
    offset = _wrap_signed(_start(seed) + _PHI * sample_index)
    return _into_band(offset + _wrap_signed(_PSI) * unit_L, t_min, t_max)  # int64 wraps around


def check_band(level: str, t_min: float, t_max: float, prefix: str = "objective") -> None:
    """Raise ConfigError, naming the key under ``prefix``, unless the level exists and the band is not empty."""
    if level not in LEVELS:
        raise ConfigError(f"{prefix}.level={level} is unknown; use {', '.join(LEVELS)}")
    if not 0.0 <= t_min <= t_max <= 1.0 or t_max == 0.0:
        raise ConfigError(
            f"{prefix}.t_min={t_min} and {prefix}.t_max={t_max} are no band; use 0 <= t_min <= t_max <= 1 and t_max > 0"
        )


def _into_band(fraction_L: Tensor, t_min: float, t_max: float) -> Tensor:
    """Fractions of 2^64 (int64, as bits) -> float32 levels: 0 becomes t_max, the largest fraction just above t_min."""
    fraction_L = ((fraction_L >> 11) & ((1 << 53) - 1)).to(torch.float64) * 2.0**-53
    return (t_min + (t_max - t_min) * (1.0 - fraction_L)).to(torch.float32)


def _start(seed: int) -> int:
    """u(seed) as a fraction of 2^64."""
    high, low, *_ = random_words(seed, Stream.NOISE_LEVEL, 0, torch.zeros((), dtype=torch.int64))
    return int(high) << 32 | int(low)


def _wrap_signed(fraction: int) -> int:
    """The integer modulo 2^64 in int64's range."""
    return (fraction + _WRAP // 2) % _WRAP - _WRAP // 2
