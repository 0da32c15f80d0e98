"""A packed sample: the unit of data order, noise and batches.

Legend: L tokens of the sample, D documents that tile it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(eq=False)
class Sample:
    """L consecutive tokens made of whole documents; padding is a document of its own.

    Attributes:
        tokens: int64 [L], 0 where padded.
        document_lengths: D positive lengths whose sum is L.
        padding: one bool a document; True: nobody sees it, it carries no loss.
        supervised: bool [L]: the token may be masked and predicted. Pre-training: every token that is not padding.
        sample_index: global index; with the run's seed it fixes the noise level and the mask.
        pair_id: groups samples that belong together (complementary masks, preferences); None in pre-training.
    """

    tokens: Tensor
    document_lengths: list[int]
    padding: list[bool]
    supervised: Tensor
    sample_index: int
    pair_id: int | None = None

    def __len__(self) -> int:
        return len(self.tokens)


class SampleBuilder:
    """Lays pieces into a sample of ``length`` tokens; gaps between and after them become padding documents."""

    def __init__(self, length: int) -> None:
        self._tokens = np.zeros(length, dtype=np.int64)
        self._real = np.zeros(length, dtype=np.bool_)
        self._lengths: list[int] = []
        self._padding: list[bool] = []
        self._end = 0

    def add(self, tokens: NDArray[np.int64], alignment: int = 1) -> None:
        """Place a document at the next multiple of ``alignment``."""
        self._pad_to(-(-self._end // alignment) * alignment)
        end = self._end + len(tokens)
        self._tokens[self._end : end] = tokens
        self._real[self._end : end] = True
        self._append(len(tokens), padding=False)

    def finish(self, sample_index: int) -> Sample:
        """Pad the rest and return the sample; every token that is not padding is supervised."""
        self._pad_to(len(self._tokens))
        return Sample(
            tokens=torch.from_numpy(self._tokens),
            document_lengths=self._lengths,
            padding=self._padding,
            supervised=torch.from_numpy(self._real),
            sample_index=sample_index,
        )

    def _pad_to(self, end: int) -> None:
        if end > self._end:
            self._append(end - self._end, padding=True)

    def _append(self, length: int, *, padding: bool) -> None:
        self._lengths.append(length)
        self._padding.append(padding)
        self._end += length
