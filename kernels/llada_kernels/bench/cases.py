"""What is measured: masks of training batches, by length, documents and block size."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from llada_kernels.interval_mask import IntervalMask

LENGTHS = (1024, 4096, 16384)
DOCUMENTS = (1, 8, 17)
BLOCK_SIZES = (1, 4, 32)
UNEVEN = 17  # this many documents have uneven lengths


@dataclass(frozen=True)
class Shape:
    """Heads and dtype of the attention: a laptop's on the CPU, those of a 16B mixture of experts on a GPU."""

    query_heads: int
    key_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def on(cls, device: torch.device) -> Shape:
        """The default on a kind of device."""
        return cls(8, 8, 64, torch.float32) if device.type == "cpu" else cls(16, 4, 128, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One mask: ``[noisy ; clean]`` over ``length`` tokens, or "mdlm", where a document is one block."""

    length: int
    documents: int
    block_size: int
    layout: str = "bdlm"

    @property
    def name(self) -> str:
        """One word a property."""
        block = "mdlm" if self.layout == "mdlm" else f"block {self.block_size}"
        return f"L={self.length} documents={self.documents} {block}"

    def document_lengths(self) -> list[int]:
        """Lengths that add up to ``length``: even ones, or log-normal ones as in packed text."""
        if self.documents == UNEVEN:
            generator = random.Random(0)
            weights = [generator.lognormvariate(0.0, 1.0) for _ in range(self.documents)]
        else:
            weights = [1.0] * self.documents
        lengths = [max(1, int(self.length * weight / sum(weights))) for weight in weights]
        lengths[-1] += self.length - sum(lengths)
        return lengths

    def mask(self) -> IntervalMask:
        """A new mask, without plans."""
        if self.layout == "mdlm":
            return IntervalMask.mdlm(self.document_lengths())
        return IntervalMask.block_diffusion(self.document_lengths(), self.block_size)


def all_cases(lengths: tuple[int, ...] = LENGTHS) -> list[Case]:
    """Every length with every number of documents, block sizes 1 to L, and MDLM."""
    cases = []
    for length in lengths:
        for documents in DOCUMENTS:
            cases += [Case(length, documents, block_size) for block_size in (*BLOCK_SIZES, length)]
            cases.append(Case(length, documents, length, "mdlm"))
    return cases


def quick_cases() -> list[Case]:
    """A few that tell most, for a look in a minute."""
    return [Case(1024, documents, 32) for documents in DOCUMENTS] + [Case(1024, 1, 1024, "mdlm"), Case(4096, 1, 32)]
