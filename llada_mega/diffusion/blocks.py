"""Which document and which block every token belongs to.

Legend: L tokens of one or several packed samples, D documents that tile them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llada_mega.errors import ConfigError

BLOCK_ORIGINS = ("document", "sequence")


@dataclass(frozen=True)
class BlockIndex:
    """int64 [L] each. ``block_L`` is b(k), counted from the block origin; it never decreases inside a document."""

    document_L: Tensor
    block_L: Tensor

    def segments(self) -> Tensor:
        """int64 [L]: running number of the token's (document, block) pair, from 0 without gaps."""
        starts_L = torch.zeros_like(self.block_L)
        starts_L[1:] = (self.block_L.diff() != 0) | (self.document_L.diff() != 0)
        return starts_L.cumsum(0)

    def in_last_block(self) -> Tensor:
        """bool [L]: the token lies in the last block of its document."""
        end_L = torch.searchsorted(self.document_L, self.document_L, right=True)
        return self.block_L == self.block_L[end_L - 1]


def index_blocks(
    document_lengths: Sequence[int],
    block_size: int,
    block_origin: str = "document",
    sequence_lengths: Sequence[int] | None = None,
) -> BlockIndex:
    """Document and block of every token.

    Args:
        document_lengths: positive lengths that tile the L tokens.
        block_size: L_B >= 1.
        block_origin: ``document``: blocks count from the start of their document, as decoding does; ``sequence``:
            from the start of the packed sample, the report's floor(k / L_B), and a document border ends a block.
        sequence_lengths: lengths of the samples, groups of whole documents; default: one sample.

    Raises:
        ConfigError: unknown ``block_origin`` or a block size below 1.
    """
    if block_origin not in BLOCK_ORIGINS:
        raise ConfigError(f"data.block_origin={block_origin} is unknown; use {' or '.join(BLOCK_ORIGINS)}")
    if block_size < 1:
        raise ConfigError(f"block_size={block_size} is not a block size; use 1 or more")
    document_L = _owner(document_lengths)
    origins = document_lengths if block_origin == "document" else (sequence_lengths or [len(document_L)])
    owner_L = document_L if block_origin == "document" else _owner(origins)
    start = torch.tensor([0, *origins], dtype=torch.int64).cumsum(0)
    position_L = torch.arange(len(document_L)) - start[owner_L]
    return BlockIndex(document_L, position_L // block_size)


def _owner(lengths: Sequence[int]) -> Tensor:
    lengths_N = torch.tensor(lengths, dtype=torch.int64)
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths_N)
