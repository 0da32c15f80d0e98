"""Packing: documents -> samples of L tokens, the same for every stage, layout and run.

Documents longer than L are cut into pieces of L and a rest; a piece is a document. A piece takes up whole units of
``alignment`` tokens. Samples are filled largest piece first, each time with the largest that still fits; because only
sizes matter for that, one histogram of sizes is packed, not the documents (after the histogram packing of Krell et
al., arXiv 2107.02027). The result is a short list of patterns ("12 samples of one 3-unit and one 1-unit piece"), the
same in every epoch. What differs between epochs is which piece of a size fills which slot, and the order of samples;
both are stateless shuffles, so any sample of any epoch is found without building an epoch.

Legend: P pieces, U units of a sample (L / alignment).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from llada_mega.data.indexed import IndexedCorpus
from llada_mega.data.sample import Sample, SampleBuilder
from llada_mega.data.shuffle import hash64, permute
from llada_mega.errors import ConfigError, DataError

_SPLIT, _SAMPLES, _PIECES, _SLOTS = range(4)  # what a shuffle is for


@dataclass(frozen=True)
class Pattern:
    """``repeats`` samples that hold ``counts[i]`` pieces of ``sizes[i]`` units each."""

    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    repeats: int


def split_documents(num_documents: int, valid_fraction: float, seed: int) -> tuple[NDArray, NDArray]:
    """Indices (int64, increasing) of train and held-out documents: ``valid_fraction`` of them, at least one each.

    Documents keep their random rank when more are appended, so held-out documents mostly stay held out.

    Raises:
        ConfigError: the fraction is not in [0, 1).
        DataError: fewer than two documents to split.
    """
    if not 0.0 <= valid_fraction < 1.0:
        raise ConfigError(f"data.valid_fraction={valid_fraction} is not a share; use 0 <= valid_fraction < 1")
    documents = np.arange(num_documents, dtype=np.int64)
    if valid_fraction == 0.0:
        return documents, documents[:0]
    if num_documents < 2:
        raise DataError(f"data.valid_fraction={valid_fraction} needs two documents; the corpus has {num_documents}")
    num_valid = min(max(round(num_documents * valid_fraction), 1), num_documents - 1)
    ranked = np.argsort(hash64(seed, _SPLIT, documents), kind="stable")
    return np.sort(ranked[num_valid:]), np.sort(ranked[:num_valid])


def pack_histogram(counts: NDArray[np.int64], capacity: int) -> list[Pattern]:
    """Fill samples of ``capacity`` units with ``counts[u]`` pieces of u units, largest first.

    The number of patterns, and the work, depend on the number of different sizes, not on the number of pieces.
    """
    left = {int(size): int(counts[size]) for size in np.flatnonzero(counts)}
    sizes = sorted(left)
    patterns = []
    while sizes:
        space, at = capacity, len(sizes)
        chosen: dict[int, int] = {}
        while (at := bisect_right(sizes, space, hi=at)) > 0:
            at -= 1
            size = sizes[at]
            chosen[size] = min(left[size], space // size)
            space -= chosen[size] * size
        repeats = min(left[size] // count for size, count in chosen.items())
        patterns.append(Pattern(tuple(chosen), tuple(chosen.values()), repeats))
        for size, count in chosen.items():
            left[size] -= count * repeats
            if left[size] == 0:
                sizes.remove(size)
    return patterns


class PackedCorpus:
    """Samples of one corpus: ``sample(epoch, index)`` with ``0 <= index < num_samples``, the same number every epoch.

    Args:
        corpus: the tokens.
        sequence_length: L, tokens of a sample.
        alignment: documents start at multiples of it (``data.document_alignment``); it divides L.
        seed: with the epoch it decides the order.
        document_ids: which documents; default all. Every token of them appears once an epoch.

    Raises:
        ConfigError: the alignment does not divide the sequence length.
        DataError: there is no token to pack.
    """

    def __init__(
        self,
        corpus: IndexedCorpus,
        sequence_length: int,
        alignment: int,
        seed: int,
        document_ids: NDArray[np.int64] | Sequence[int] | None = None,
    ) -> None:
        if alignment < 1 or sequence_length % alignment:
            raise ConfigError(
                f"data.document_alignment={alignment} does not divide data.sequence_length={sequence_length}; "
                "use a divisor, such as 32 of 128"
            )
        self.corpus, self.sequence_length, self.alignment, self.seed = corpus, sequence_length, alignment, seed
        ids = np.arange(len(corpus)) if document_ids is None else np.asarray(document_ids, dtype=np.int64)
        lengths = corpus.document_lengths[ids]
        if not lengths.sum():
            raise DataError(f"{corpus.prefix} has no token in the {len(ids)} documents to pack; build or split it anew")
        self._index_pieces(ids, lengths)
        self.patterns = pack_histogram(self._num_of_size, sequence_length // alignment)
        self._first_sample = list(accumulate((p.repeats for p in self.patterns), initial=0))
        self._first_rank = self._ranks()
        self.num_samples = self._first_sample[-1]

    def _index_pieces(self, ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """Cut documents and sort the pieces by size: document and number inside it, [P] each."""
        pieces_of = -(-lengths // self.sequence_length)
        document = np.repeat(ids, pieces_of)
        number = np.arange(len(document)) - np.repeat(np.cumsum(pieces_of) - pieces_of, pieces_of)
        length = np.minimum(np.repeat(lengths, pieces_of) - number * self.sequence_length, self.sequence_length)
        units = -(-length // self.alignment)
        order = np.argsort(units, kind="stable")
        self._document = document[order].astype(np.min_scalar_type(max(len(self.corpus) - 1, 0)))
        self._number = number[order].astype(np.min_scalar_type(max(int(number.max()), 0)))
        self._num_of_size = np.bincount(units, minlength=self.sequence_length // self.alignment + 1)
        self._first_piece = np.concatenate(([0], np.cumsum(self._num_of_size)))

    def _ranks(self) -> list[tuple[int, ...]]:
        """For every pattern and each of its sizes, how many pieces of that size earlier patterns use."""
        used = [0] * len(self._num_of_size)
        ranks = []
        for pattern in self.patterns:
            ranks.append(tuple(used[size] for size in pattern.sizes))
            for size, count in zip(pattern.sizes, pattern.counts, strict=True):
                used[size] += count * pattern.repeats
        return ranks

    def pieces(self, epoch: int, index: int) -> list[tuple[int, int, int]]:
        """(document, first token, number of tokens) of every piece of a sample, in order."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} is not in [0, {self.num_samples})")
        key = hash64(self.seed, _SAMPLES, epoch)
        slot_sample = int(permute(np.array([index]), self.num_samples, key)[0])
        which = bisect_right(self._first_sample, slot_sample) - 1
        pattern, repeat = self.patterns[which], slot_sample - self._first_sample[which]
        size = np.repeat(pattern.sizes, pattern.counts)
        first = np.array(self._first_rank[which]) + repeat * np.array(pattern.counts)
        within = np.arange(len(size)) - np.repeat(np.cumsum(pattern.counts) - pattern.counts, pattern.counts)
        rank = permute(
            np.repeat(first, pattern.counts) + within,
            self._num_of_size[size],
            hash64(self.seed, _PIECES, epoch, size),
        )
        piece = self._first_piece[size] + rank
        piece = piece[np.argsort(hash64(self.seed, _SLOTS, epoch, piece), kind="stable")]
        document = self._document[piece].astype(np.int64)
        start = self._number[piece].astype(np.int64) * self.sequence_length
        length = np.minimum(self.corpus.document_lengths[document] - start, self.sequence_length)
        return list(zip(document.tolist(), start.tolist(), length.tolist(), strict=True))

    def sample(self, epoch: int, index: int, sample_index: int | None = None) -> Sample:
        """The sample, a pure function of (seed, epoch, index).

        Args:
            epoch: pass over the corpus.
            index: position in the epoch.
            sample_index: global sample index, the key of the noise; default: counted over this corpus alone.
        """
        if sample_index is None:
            sample_index = epoch * self.num_samples + index
        builder = SampleBuilder(self.sequence_length)
        for document, start, length in self.pieces(epoch, index):
            builder.add(self.corpus.tokens(document, start, length), self.alignment)
        return builder.finish(sample_index)
