"""Who sees whom in a training batch, and which clean tokens are needed at all.

Legend: L tokens of one or several packed samples, C clean tokens that are kept, K keys = rows = L + C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from llada_kernels import IntervalMask
from torch import Tensor

from llada_mega.diffusion.blocks import index_blocks
from llada_mega.errors import ConfigError

LAYOUTS = ("ar", "bdlm", "mdlm")
CLEAN_TOKENS = ("needed", "all")


@dataclass(frozen=True, eq=False)
class Visibility:
    """The attention mask over ``[noisy L ; clean C]`` and the positions (int64 [C], increasing, in [0, L)) whose clean
    copy is kept. Without clean tokens (layouts ``ar`` and ``mdlm``) C = 0."""

    mask: IntervalMask
    clean_positions: Tensor


def build_visibility(
    layout: str,
    document_lengths: Sequence[int],
    *,
    padding: Sequence[bool],
    block_size: int,
    block_origin: str = "document",
    clean_tokens: str = "needed",
    sequence_lengths: Sequence[int] | None = None,
) -> Visibility:
    """The mask of one micro-batch.

    Layout ``bdlm`` is eq. (3): noisy sees noisy of its own block and clean of earlier blocks, clean sees clean of its
    own and earlier blocks, all inside one document. ``mdlm`` is eq. (4): every token of the document. ``ar`` is the
    causal mask inside each document.

    The clean copy of a document's last block is seen by no noisy row, nor by any clean row that one sees, so
    ``clean_tokens="needed"`` drops it: loss and gradients stay the same. When no document has a second block nothing
    is needed, and ``bdlm`` is ``mdlm``.

    Args:
        document_lengths: positive lengths that tile the L tokens of all samples.
        padding: one bool a document; padding sees nothing and is seen by nothing.
        block_size: L_B; ignored by ``ar`` and ``mdlm``.
        block_origin: ``document`` or ``sequence``, where block 0 starts.
        clean_tokens: ``needed``, or ``all`` positions, those of padding included.
        sequence_lengths: lengths of the samples, groups of whole documents (default: one sample).

    Raises:
        ConfigError: unknown layout, block origin or clean-token policy, or a block size below 1.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout={layout} is unknown; use {', '.join(LAYOUTS)}")
    if clean_tokens not in CLEAN_TOKENS:
        raise ConfigError(f"data.clean_tokens={clean_tokens} is unknown; use {' or '.join(CLEAN_TOKENS)}")
    nothing = torch.empty(0, dtype=torch.int64)
    if layout == "ar":
        return Visibility(IntervalMask.causal(document_lengths, padding=padding), nothing)
    if layout == "mdlm":
        return Visibility(IntervalMask.mdlm(document_lengths, padding=padding), nothing)

    length = sum(document_lengths)
    if clean_tokens == "all":
        index_blocks(document_lengths, block_size, block_origin, sequence_lengths)  # for its checks
        clean_positions_C = torch.arange(length)
    else:
        clean_positions_C = _needed(document_lengths, padding, block_size, block_origin, sequence_lengths)
    if clean_positions_C.numel() == 0:
        return Visibility(IntervalMask.mdlm(document_lengths, padding=padding), nothing)
    mask = IntervalMask.block_diffusion(
        document_lengths,
        block_size,
        padding=padding,
        block_origin=block_origin,
        sequence_lengths=sequence_lengths,
    )
    kept_K = torch.cat((torch.arange(length), length + clean_positions_C))
    return Visibility(mask.select_rows(kept_K).select_keys(kept_K), clean_positions_C)


def _needed(
    document_lengths: Sequence[int],
    padding: Sequence[bool],
    block_size: int,
    block_origin: str,
    sequence_lengths: Sequence[int] | None,
) -> Tensor:
    """Positions (int64 [C]) whose block is not the last of their document; none of padding."""
    index = index_blocks(document_lengths, block_size, block_origin, sequence_lengths)
    padding_L = torch.tensor(padding, dtype=torch.bool)[index.document_L]
    return (~padding_L & ~index.in_last_block()).nonzero().flatten()
