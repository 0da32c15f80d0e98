from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llada_mega.data.index_file import Index
from llada_mega.data.indexed import IndexedCorpus
from llada_mega.data.packing import PackedCorpus, pack_histogram, split_documents
from llada_mega.data.sample import Sample
from llada_mega.errors import ConfigError, DataError


class MemoryCorpus(IndexedCorpus):
    """Token j of document i is (i, j) in one number: tokens are unique, so nothing can be mixed up unseen."""

    def __init__(self, lengths: list[int] | NDArray[np.int64]) -> None:
        starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        super().__init__(Path("memory"), Index(np.dtype(np.int64), starts), {})

    def tokens(self, index: int, start: int, length: int) -> NDArray[np.int64]:
        assert 0 <= start <= start + length <= self.document_lengths[index]
        return np.arange(start, start + length) + 1_000_000 * (index + 1)


layouts = st.tuples(
    st.lists(st.integers(0, 60), min_size=1, max_size=20).filter(any),
    st.sampled_from([(16, 1), (16, 4), (16, 16), (24, 8), (3, 1)]),
    st.integers(0, 3),
)


def documents(sample: Sample) -> list[tuple[int, list[int], bool]]:
    """(start, tokens, padding) of every document."""
    starts = np.cumsum([0, *sample.document_lengths])[:-1].tolist()
    tokens = sample.tokens.tolist()
    parts = zip(starts, sample.document_lengths, sample.padding, strict=True)
    return [(start, tokens[start : start + length], padding) for start, length, padding in parts]


@settings(max_examples=60, deadline=None)
@given(layouts)
def test_an_epoch_holds_every_token_once(layout: tuple[list[int], tuple[int, int], int]) -> None:
    lengths, (sequence_length, alignment), epoch = layout
    packed = PackedCorpus(MemoryCorpus(lengths), sequence_length, alignment, seed=5)
    seen: Counter[int] = Counter()
    for index in range(packed.num_samples):
        sample = packed.sample(epoch, index)
        assert len(sample) == sequence_length == sum(sample.document_lengths)
        assert min(sample.document_lengths) >= 1 and len(sample.padding) == len(sample.document_lengths)
        assert any(not padding for padding in sample.padding)
        for start, tokens, padding in documents(sample):
            if padding:
                assert set(tokens) == {0}
                continue
            assert start % alignment == 0
            document, first = tokens[0] // 1_000_000 - 1, tokens[0] % 1_000_000
            assert first % sequence_length == 0  # documents are cut at multiples of L only
            length = min(lengths[document] - first, sequence_length)
            assert tokens == [tokens[0] + j for j in range(length)]
            seen.update(tokens)
        assert not any(a and b for a, b in pairwise(sample.padding))  # neighbouring padding is one document
        real = [not p for n, p in zip(sample.document_lengths, sample.padding, strict=True) for _ in range(n)]
        assert sample.supervised.tolist() == real
    assert seen == Counter(1_000_000 * (i + 1) + j for i, length in enumerate(lengths) for j in range(length))


@settings(deadline=None)
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=32).filter(any))
def test_histogram_packing_places_every_piece_and_leaves_one_half_empty_sample(counts: list[int]) -> None:
    capacity = len(counts)
    of_size = np.array([0, *counts])
    patterns = pack_histogram(of_size, capacity)
    placed = np.zeros_like(of_size)
    for pattern in patterns:
        assert pattern.repeats > 0
        assert sum(s * c for s, c in zip(pattern.sizes, pattern.counts, strict=True)) <= capacity
        for size, count in zip(pattern.sizes, pattern.counts, strict=True):
            placed[size] += count * pattern.repeats
    assert placed.tolist() == of_size.tolist()
    fills = [
        sum(size * count for size, count in zip(pattern.sizes, pattern.counts, strict=True))
        for pattern in patterns
        for _ in range(pattern.repeats)
    ]
    assert sum(2 * fill <= capacity for fill in fills) <= 1  # two half-empty samples would be one


def test_web_like_lengths_fill_samples() -> None:
    lengths = np.random.default_rng(0).lognormal(6.2, 1.2, 20_000).astype(np.int64) + 1
    packed = PackedCorpus(MemoryCorpus(lengths), 4096, 32, seed=0)
    aligned = int((-(-lengths // 32) * 32).sum())
    assert aligned / (packed.num_samples * 4096) > 0.999
    assert int(lengths.sum()) / (packed.num_samples * 4096) > 0.98


def test_a_million_documents_pack_in_about_a_second() -> None:
    lengths = np.random.default_rng(0).lognormal(6.2, 1.2, 1_000_000).astype(np.int64) + 1
    corpus = MemoryCorpus(lengths)
    start = time.process_time()
    packed = PackedCorpus(corpus, 4096, 32, seed=0)
    packed.sample(3, 1000)
    assert time.process_time() - start < 5  # 0.3 s when idle


def test_epochs_and_seeds_differ_and_calls_agree() -> None:
    corpus = MemoryCorpus(np.random.default_rng(1).integers(1, 40, 500))

    def order(seed: int, epoch: int) -> list[list[tuple[int, int, int]]]:
        packed = PackedCorpus(corpus, 64, 8, seed=seed)
        return [packed.pieces(epoch, i) for i in range(packed.num_samples)]

    first = order(0, 0)
    assert first == order(0, 0)
    for other in (order(0, 1), order(1, 0)):
        assert len(other) == len(first)
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 0.05 * len(first)
        together = {frozenset(sample) for sample in first if len(sample) > 1}
        assert len(together & {frozenset(sample) for sample in other}) < 0.05 * len(together)
        sizes = [[sorted(-(-length // 8) for _, _, length in sample) for sample in epoch] for epoch in (first, other)]
        assert sum(a == b for a, b in zip(*sizes, strict=True)) < 0.7 * len(first)


def test_samples_of_one_pattern_are_spread_over_the_epoch() -> None:
    packed = PackedCorpus(MemoryCorpus([64] * 300 + [8] * 2400), 64, 8, seed=0)
    whole = [len(packed.pieces(0, i)) == 1 for i in range(packed.num_samples)]
    assert packed.num_samples == 600 and sum(whole) == 300
    assert 110 < sum(whole[:300]) < 190


def test_position_in_the_sample_does_not_follow_size() -> None:
    packed = PackedCorpus(MemoryCorpus([40] * 200 + [24] * 200), 64, 8, seed=0)
    first = [packed.pieces(0, i)[0][2] for i in range(packed.num_samples)]
    assert 60 < first.count(40) < 140


def test_chosen_documents_only(write_corpus: Callable[..., IndexedCorpus]) -> None:
    packed = PackedCorpus(write_corpus([5, 6, 7, 8]), 8, 4, seed=0, document_ids=np.array([3, 1]))
    pieces = [piece for i in range(packed.num_samples) for piece in packed.pieces(0, i)]
    assert sorted(pieces) == [(1, 0, 6), (3, 0, 8)]
    tokens = [packed.sample(0, i).tokens.tolist() for i in range(2)]
    assert sorted(tokens) == [[1000, 1001, 1002, 1003, 1004, 1005, 0, 0], list(range(3000, 3008))]


def test_refusals() -> None:
    corpus = MemoryCorpus([5, 0])
    with pytest.raises(ConfigError, match=r"data.document_alignment=32 does not divide data.sequence_length=100"):
        PackedCorpus(corpus, 100, 32, seed=0)
    with pytest.raises(DataError, match="no token in the 1 documents"):
        PackedCorpus(corpus, 64, 32, seed=0, document_ids=[1])
    with pytest.raises(IndexError):
        PackedCorpus(corpus, 64, 32, seed=0).sample(0, 1)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 400), st.floats(0.001, 0.5), st.integers(0, 100))
def test_split_by_document(num_documents: int, fraction: float, seed: int) -> None:
    train, valid = split_documents(num_documents, fraction, seed)
    assert sorted([*train, *valid]) == list(range(num_documents))
    assert len(valid) == min(max(round(num_documents * fraction), 1), num_documents - 1)
    again = split_documents(num_documents, fraction, seed)
    assert np.array_equal(train, again[0]) and np.array_equal(valid, again[1])


def test_split_stays_when_documents_are_appended() -> None:
    _, before = split_documents(1000, 0.1, seed=3)
    _, after = split_documents(1100, 0.1, seed=3)
    assert len(set(before) & set(after)) > 85
    _, other_seed = split_documents(1000, 0.1, seed=4)
    assert len(set(before) & set(other_seed)) < 30
    assert len(split_documents(10, 0.0, seed=0)[1]) == 0
    with pytest.raises(ConfigError, match=r"valid_fraction=1.5"):
        split_documents(10, 1.5, seed=0)
    with pytest.raises(DataError, match="needs two documents"):
        split_documents(1, 0.1, seed=0)
