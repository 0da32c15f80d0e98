"""Validation windows: a fixed list of held-out text pieces of one length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llada_mega.data.indexed import IndexedCorpus
from llada_mega.data.sample import Sample, SampleBuilder
from llada_mega.errors import DataError


def validation_windows(
    corpus: IndexedCorpus, document_ids: Sequence[int] | NDArray[np.int64] | None, length: int, count: int
) -> list[Sample]:
    """``count`` samples of ``length`` tokens, each one piece of one document, the same at every call.

    Windows are spread over the documents (each gives one before any gives two) and over each document, and do not
    overlap. Only when there are not enough whole windows do documents shorter than ``length`` join, the longest first,
    padded at the end. ``sample_index`` counts the windows.

    Args:
        corpus: the tokens.
        document_ids: held-out documents; None for all.

    Raises:
        DataError: fewer than ``count`` windows exist.
    """
    ids = np.arange(len(corpus)) if document_ids is None else np.asarray(document_ids, dtype=np.int64)
    lengths = corpus.document_lengths[ids]
    long = np.flatnonzero(lengths >= length)
    taken = _spread(lengths[long] // length, count)
    windows = [
        (int(ids[document]), int(start), length)
        for document, number in zip(long, taken, strict=True)
        for start in np.linspace(0, lengths[document] - length, number).astype(np.int64)
    ]
    short = np.flatnonzero((lengths >= 2) & (lengths < length))  # one token alone has nothing to predict it from
    longest_first = short[np.argsort(-lengths[short], kind="stable")][: count - len(windows)]
    windows += [(int(ids[document]), 0, int(lengths[document])) for document in longest_first]
    if len(windows) < count:
        raise DataError(
            f"{corpus.prefix}: {len(ids)} held-out documents give {len(windows)} windows of {length} tokens, "
            f"{count} are wanted; hold out more documents, or lower the number of windows"
        )
    samples = []
    for index, (document, start, size) in enumerate(windows):
        builder = SampleBuilder(length)
        builder.add(corpus.tokens(document, start, size))
        samples.append(builder.finish(index))
    return samples


def _spread(capacity: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """How many windows to take from each document: level by level, the last level from evenly spaced documents."""
    taken = np.zeros_like(capacity)
    while (missing := count - int(taken.sum())) > 0:
        free = np.flatnonzero(taken < capacity)
        if len(free) == 0:
            break
        chosen = free if len(free) <= missing else free[np.arange(missing) * len(free) // missing]
        taken[chosen] += 1
    return taken
