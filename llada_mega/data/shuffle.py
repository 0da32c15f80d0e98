"""Stateless shuffling: the image of one index under a keyed permutation, without building the permutation.

A shuffle of an epoch then costs nothing to start, nothing to store and nothing to resume, and the same seed gives the
same order with every numpy version (``Generator.permutation`` promises no such thing).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_WEYL = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

_ROUND_KEYS = np.arange(8, dtype=np.uint64) * _WEYL

Words = NDArray[np.uint64]


def hash64(*words: int | Sequence[int] | NDArray) -> Words:
    """Hash nonnegative integers (broadcast against each other) to uint64, at least one-dimensional.

    Chained SplitMix64 finalizers (Steele, Lea & Flood, "Fast splittable pseudorandom number generators", 2014).
    """
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        state = _mix(state ^ (np.atleast_1d(np.asarray(word, dtype=np.uint64)) + _WEYL))
    return state


def permute(index: NDArray[np.int64], size: NDArray[np.int64] | int, key: Words) -> NDArray[np.int64]:
    """Image of ``index`` under the permutation of ``range(size)`` that ``key`` names.

    A Feistel network (Luby & Rackoff, 1988) permutes the smallest power of two, at least 16, that holds ``size``;
    results outside the range walk on along their cycle, which stays a bijection (Black & Rogaway, "Ciphers with
    arbitrary finite domains", 2002).

    Args:
        index: int64 [N], each in ``[0, size)``.
        size: domain of each element, a scalar or [N].
        key: uint64 [1] or [N].
    """
    size = np.broadcast_to(np.asarray(size, dtype=np.uint64), index.shape)
    key = np.broadcast_to(key, index.shape)
    bits = np.maximum(np.frexp((size - np.uint64(1)).astype(np.float64))[1], 4).astype(np.uint64)
    image = _feistel(index.astype(np.uint64), bits, key)
    outside = np.flatnonzero(image >= size)
    while len(outside):
        image[outside] = _feistel(image[outside], bits[outside], key[outside])
        outside = outside[image[outside] >= size[outside]]
    return image.astype(np.int64)


def _feistel(value: Words, bits: Words, key: Words) -> Words:
    """One pass over ``bits``-bit values. Halves may differ by a bit; an even number of rounds restores their sizes."""
    low_bits = bits - bits // np.uint64(2)
    high_bits = bits // np.uint64(2)
    low = value & _ones(low_bits)
    high = value >> low_bits
    for round_key in _ROUND_KEYS:
        high ^= _mix(low ^ (key + round_key)) & _ones(high_bits)
        low, high, low_bits, high_bits = high, low, high_bits, low_bits
    return high << low_bits | low


def _ones(bits: Words) -> Words:
    return (np.uint64(1) << bits) - np.uint64(1)


def _mix(state: Words) -> Words:
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))
