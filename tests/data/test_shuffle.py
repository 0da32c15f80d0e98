from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_mega.data.shuffle import hash64, permute


@settings(deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**63))
def test_it_is_a_permutation(size: int, key: int) -> None:
    image = permute(np.arange(size), size, hash64(key))
    assert np.array_equal(np.sort(image), np.arange(size))


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 10**12), min_size=1, max_size=30), data=st.data())
def test_elements_do_not_depend_on_their_neighbours(sizes: list[int], data: st.DataObject) -> None:
    index = np.array([data.draw(st.integers(0, size - 1)) for size in sizes])
    keys = hash64(np.arange(len(sizes)))
    together = permute(index, np.array(sizes), keys)
    for i, size in enumerate(sizes):
        assert together[i] == permute(index[i : i + 1], size, keys[i : i + 1])[0]
        assert 0 <= together[i] < size


def test_orders_of_a_few_are_about_equally_likely() -> None:
    keys = hash64(7, np.arange(24_000))
    orders = np.stack([permute(np.full(24_000, i), 4, keys) for i in range(4)], axis=1)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert counts.min() > 850 and counts.max() < 1150  # 1000 +- 5 sigma


def test_neighbours_land_apart() -> None:
    image = permute(np.arange(100_000), 100_000, hash64(1)).astype(np.float64)
    correlation = np.corrcoef(image[:-1], image[1:])[0, 1]
    assert abs(correlation) < 0.02
    assert abs(np.corrcoef(image, np.arange(100_000))[0, 1]) < 0.02


def test_values_are_frozen() -> None:
    """They are part of every run: a change here changes the data order of runs that resume."""
    assert hash64(1, 2, 3).tolist() == [12799061345140080112]
    assert permute(np.arange(10), 10, hash64(42)).tolist() == [9, 4, 8, 6, 0, 3, 7, 5, 2, 1]
