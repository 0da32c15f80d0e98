"""Counter-based random numbers: every draw is a pure function of (seed, stream, sample, position, channel).

No generator state exists, so nothing has to be broadcast, saved or restored: any rank, worker or resumed run that
asks for the same counter gets the same number. The generator is Philox4x32-10 of Salmon et al., "Parallel Random
Numbers: As Easy as 1, 2, 3" (SC 2011), written in int64 tensor operations so that CPU and accelerators agree bit for
bit on the integers and on :func:`uniform`.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

from llada_mega.errors import ConfigError

_MASK32 = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_KEY_STEP_0, _KEY_STEP_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_STREAM_BITS = 8
_MAX_SEED = 1 << (64 - _STREAM_BITS)

Words = tuple[Tensor, Tensor, Tensor, Tensor]


class Stream(IntEnum):
    """What a draw is for; different streams of one seed are independent. Values are part of every run: append only."""

    NOISE_LEVEL = 0
    MASK = 1
    EMBEDDING = 2
    GENERATION = 3
    EVALUATION = 4


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10: four int64 tensors holding 32-bit words (broadcastable) and two 32-bit keys -> four words.

    A 32 x 32 bit product overflows int64, but two's complement keeps its 64 bits: the arithmetic right shift, cut to
    32 bits, is the high word.
    """
    word_0, word_1, word_2, word_3 = counter
    key_0, key_1 = key
    for _ in range(_ROUNDS):
        product_0 = word_0 * _MULTIPLIER_0
        product_1 = word_2 * _MULTIPLIER_1
        word_0 = ((product_1 >> 32) & _MASK32) ^ word_1 ^ key_0
        word_2 = ((product_0 >> 32) & _MASK32) ^ word_3 ^ key_1
        word_1 = product_1 & _MASK32
        word_3 = product_0 & _MASK32
        key_0 = (key_0 + _KEY_STEP_0) & _MASK32
        key_1 = (key_1 + _KEY_STEP_1) & _MASK32
    return word_0, word_1, word_2, word_3


def random_words(
    seed: int, stream: Stream, sample_index: int | Tensor, position: Tensor, channel_group: Tensor | int = 0
) -> Words:
    """Four independent 32-bit words (int64 tensors) of the broadcast shape of the arguments.

    Counter: (position, channel_group, low and high word of sample_index); key: (seed, stream), one to one.
    ``position`` and ``channel_group`` are below 2^32, ``sample_index`` below 2^63, ``seed`` in [0, 2^56).

    Raises:
        ConfigError: the seed is out of range.
    """
    if not 0 <= seed < _MAX_SEED:
        raise ConfigError(f"seed={seed} is out of range; use 0 <= seed < 2**{64 - _STREAM_BITS}")
    key = (seed & _MASK32, (seed >> 32) << _STREAM_BITS | int(stream))
    position = position.to(torch.int64)
    zero = torch.zeros((), dtype=torch.int64, device=position.device)
    sample = zero + sample_index
    counter = (position, zero + channel_group, sample & _MASK32, (sample >> 32) & _MASK32)
    return philox(counter, key)


def uniform(
    seed: int, stream: Stream, sample_index: int | Tensor, position: Tensor, channel: Tensor | int = 0
) -> Tensor:
    """float32 in [0, 1), multiples of 2^-24, in the broadcast shape of the arguments; equal on every device."""
    words = random_words(seed, stream, sample_index, position, _group(channel))
    return (_lane(words, channel) >> 8).to(torch.float32) * 2.0**-24


def normal(
    seed: int, stream: Stream, sample_index: int | Tensor, position: Tensor, channel: Tensor | int = 0
) -> Tensor:
    """Standard normal float32 in the broadcast shape of the arguments (Box-Muller).

    Channels 4g to 4g+3 share one Philox call; for a whole vector of channels use :func:`normal_channels`, which
    returns the same numbers at a quarter of the work.
    """
    words = random_words(seed, stream, sample_index, position, _group(channel))
    return _lane(_box_muller(words), channel)


def normal_channels(
    seed: int, stream: Stream, sample_index: int | Tensor, position: Tensor, num_channels: int
) -> Tensor:
    """Channels 0 to num_channels-1 of :func:`normal`: float32 [*shape of sample_index and position, num_channels]."""
    groups = torch.arange(-(-num_channels // 4), device=position.device)
    sample = sample_index.unsqueeze(-1) if isinstance(sample_index, Tensor) and sample_index.ndim else sample_index
    words = random_words(seed, stream, sample, position.unsqueeze(-1), groups)
    return torch.stack(_box_muller(words), dim=-1).flatten(-2)[..., :num_channels]


def _box_muller(words: Words) -> Words:
    """Two pairs of normals. In float64, rounded once: neither vector width nor device then shows in the result
    (but for the rare value that lies on a rounding border)."""
    normals: list[Tensor] = []
    for radius_word, angle_word in (words[:2], words[2:]):
        radius = torch.sqrt(-2.0 * torch.log((radius_word + 1).to(torch.float64) * 2.0**-32))
        angle = angle_word.to(torch.float64) * (2.0 * math.pi * 2.0**-32)
        normals += [(radius * torch.cos(angle)).to(torch.float32), (radius * torch.sin(angle)).to(torch.float32)]
    return normals[0], normals[1], normals[2], normals[3]


def _group(channel: Tensor | int) -> Tensor | int:
    return channel >> 2


def _lane(words: Words, channel: Tensor | int) -> Tensor:
    """The word that belongs to ``channel`` (channel % 4), in the broadcast shape."""
    if isinstance(channel, int):
        return words[channel & 3]
    lane = channel & 3
    low = torch.where(lane == 0, words[0], words[1])
    high = torch.where(lane == 2, words[2], words[3])
    return torch.where(lane < 2, low, high)
