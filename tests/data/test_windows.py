from __future__ import annotations

from collections.abc import Callable

import pytest

from llada_mega.data.indexed import IndexedCorpus
from llada_mega.data.windows import validation_windows
from llada_mega.errors import DataError

WriteCorpus = Callable[..., IndexedCorpus]


def places(samples: list) -> list[tuple[int, int]]:
    """(document, first token) of each window."""
    return [divmod(int(sample.tokens[0]), 1000) for sample in samples]


def test_windows_are_whole_pieces_spread_over_documents(write_corpus: WriteCorpus) -> None:
    corpus = write_corpus([100, 10, 35, 20, 9])
    samples = validation_windows(corpus, None, 10, 8)
    assert places(samples) == [(0, 0), (0, 45), (0, 90), (1, 0), (2, 0), (2, 25), (3, 0), (3, 10)]
    for index, sample in enumerate(samples):
        document, start = places(samples)[index]
        assert sample.tokens.tolist() == corpus.tokens(document, start, 10).tolist()
        assert (sample.document_lengths, sample.padding, sample.sample_index) == ([10], [False], index)
        assert sample.supervised.all()
    assert places(validation_windows(corpus, None, 10, 8)) == places(samples)


def test_fewer_windows_than_documents_are_spread_evenly(write_corpus: WriteCorpus) -> None:
    corpus = write_corpus([20] * 100)
    assert [document for document, _ in places(validation_windows(corpus, None, 10, 5))] == [0, 20, 40, 60, 80]
    chosen = validation_windows(corpus, [7, 3, 50], 10, 2)
    assert [document for document, _ in places(chosen)] == [7, 3]


def test_windows_never_overlap(write_corpus: WriteCorpus) -> None:
    corpus = write_corpus([107, 33, 10, 29])
    samples = validation_windows(corpus, None, 10, 10 + 3 + 1 + 2)
    tokens = [token for sample in samples for token in sample.tokens.tolist()]
    assert len(set(tokens)) == len(tokens)


def test_short_documents_fill_up_padded(write_corpus: WriteCorpus) -> None:
    corpus = write_corpus([12, 4, 1, 7])
    samples = validation_windows(corpus, None, 10, 3)
    assert [sample.document_lengths for sample in samples] == [[10], [7, 3], [4, 6]]
    assert [sample.padding for sample in samples] == [[False], [False, True], [False, True]]
    with pytest.raises(DataError, match="4 held-out documents give 3 windows of 10 tokens, 4 are wanted"):
        validation_windows(corpus, None, 10, 4)
