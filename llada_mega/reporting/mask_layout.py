"""A mask with names for its rows and keys: halves, documents, blocks; and how much of it is live, tile by tile.

Legend: L tokens, C kept clean tokens, S = L + C rows and keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from llada_kernels import IntervalMask
from llada_kernels.partition import TILE

from llada_mega.diffusion.blocks import index_blocks
from llada_mega.diffusion.visibility import build_visibility
from llada_mega.reporting.mask_options import MaskOptions

_TILE_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Segment:
    """Rows (and keys) ``[start, stop)`` of one document in one half."""

    half: str  # noisy | clean | tokens
    document: int
    start: int
    stop: int


@dataclass(frozen=True)
class DrawnMask:
    """A mask to draw. Rows and keys are the same positions, named by ``segments`` in order.

    ``halves``: [(name, start, stop)]; ``block_edges``: positions in [0, S] where a block or document begins or ends;
    ``token_S``: the token position in [0, L) of each row; ``block_S``: its block, counted from the block origin.
    """

    mask: IntervalMask
    layout: str
    segments: list[Segment]
    halves: list[tuple[str, int, int]]
    block_edges: list[int]
    token_S: np.ndarray
    block_S: np.ndarray
    left_out: int  # clean tokens that nobody sees and that are not there

    @property
    def size(self) -> int:
        """S, the number of rows."""
        return self.mask.total_q

    def live_share(self) -> float:
        """Visible (row, key) pairs over all pairs."""
        return self.mask.area() / max(self.size * self.mask.total_k, 1)

    def region(self, row_half: str, key_half: str) -> str | None:
        """Name of the kind of attention between two halves; None where there is never any."""
        if row_half == "clean" and key_half == "noisy":
            return None
        return row_half if row_half == "tokens" else f"{row_half} → {key_half}"


def draw_layout(options: MaskOptions) -> DrawnMask:
    """Build the mask that ``options`` (checked) describe and name its parts."""
    documents = list(options.documents)
    visibility = build_visibility(
        options.layout,
        documents,
        padding=[False] * len(documents),
        block_size=options.block_size,
        block_origin=options.block_origin,
        clean_tokens=options.clean_tokens,
    )
    total = sum(documents)
    blocks = index_blocks(documents, options.block_size, options.block_origin)
    clean = visibility.clean_positions
    first_half = "tokens" if options.layout == "ar" else "noisy"
    halves = [(first_half, 0, total)]
    if clean.numel():
        halves.append(("clean", total, total + clean.numel()))
    token_S = torch.cat((torch.arange(total), clean))
    document_S = blocks.document_L[token_S].numpy()
    block_S = (blocks.segments() if options.layout == "bdlm" else blocks.document_L)[token_S].numpy()
    half_S = np.arange(token_S.numel()) >= total
    segments = [
        Segment("clean" if half_S[start] else first_half, int(document_S[start]), start, stop)
        for start, stop in _runs(np.stack((half_S, document_S)))
    ]
    edges = [start for start, _ in _runs(np.stack((half_S, block_S)))]
    return DrawnMask(
        mask=visibility.mask,
        layout=options.layout,
        segments=segments,
        halves=halves,
        block_edges=[*edges, token_S.numel()],
        token_S=token_S.numpy(),
        block_S=blocks.block_L[token_S].numpy(),
        left_out=total - clean.numel() if options.layout == "bdlm" else 0,
    )


def _runs(keys: np.ndarray) -> list[tuple[int, int]]:
    """Maximal runs [start, stop) of equal columns of ``keys`` [n, S]."""
    changes = np.flatnonzero((keys[:, 1:] != keys[:, :-1]).any(0)) + 1
    edges = [0, *changes.tolist(), keys.shape[1]]
    return list(pairwise(edges)) if keys.shape[1] else []


def same_row_groups(mask: IntervalMask) -> list[tuple[int, int]]:
    """Consecutive rows [start, stop) that see the same keys."""
    return _runs(mask.endpoints.numpy())


def row_intervals(mask: IntervalMask, row: int) -> list[tuple[int, int]]:
    """The non-empty key intervals [low, high) of one row; intervals that touch are joined."""
    bounds = [0, *mask.endpoints[:, row].tolist()]
    joined: list[tuple[int, int]] = []
    for low, high in zip(bounds[::2], bounds[1::2], strict=True):
        if low >= high:
            continue
        if joined and joined[-1][1] == low:
            low = joined.pop()[0]
        joined.append((low, high))
    return joined


def tile_coverage(mask: IntervalMask, tile: int) -> np.ndarray:
    """Visible pairs in each tile of ``tile`` x ``tile``, int64 [ceil(total_q / tile), ceil(total_k / tile)].

    From the endpoints alone: per row and interval, the tiles it fills are counted by a difference array, the two tiles
    at its ends exactly. Nothing of size total_q x total_k exists at any time.
    """
    return np.concatenate([np.zeros((0, -(-mask.total_k // tile)), dtype=np.int64), *_coverage_in_parts(mask, tile)])


def _coverage_in_parts(mask: IntervalMask, tile: int) -> Iterator[np.ndarray]:
    """``tile_coverage`` a few rows of tiles at a time, in order."""
    endpoints = mask.endpoints.cpu().numpy()
    step = _TILE_ROWS_AT_ONCE * tile
    for first in range(0, mask.total_q, step):
        part = endpoints[:, first : first + step].astype(np.int64)
        yield _coverage_of_rows(part, tile, -(-part.shape[1] // tile), -(-mask.total_k // tile))


def _coverage_of_rows(endpoints: np.ndarray, tile: int, row_tiles: int, key_tiles: int) -> np.ndarray:
    """Coverage of consecutive rows, ``endpoints`` [nfunc, rows]; rows start at a tile's border."""
    # Prefix form: [0, x) covers tiles below x // tile whole and x % tile keys of the next; an interval is a difference.
    filled = np.zeros((row_tiles, key_tiles + 1), dtype=np.int64)  # difference array along the keys
    partial = np.zeros((row_tiles, key_tiles + 1), dtype=np.int64)
    row_tile = np.arange(endpoints.shape[1]) // tile
    for index, bound in enumerate(endpoints):
        sign = 1 if index % 2 == 0 else -1  # F0 and the interval ends add, the interval starts subtract
        whole, rest = bound // tile, bound % tile
        filled[:, 0] += sign * tile * np.bincount(row_tile, minlength=row_tiles)
        np.add.at(filled, (row_tile, whole), -sign * tile)
        np.add.at(partial, (row_tile, whole), sign * rest)
    return (np.cumsum(filled, axis=1) + partial)[:, :key_tiles]


@dataclass(frozen=True)
class TileCount:
    """Tiles of ``TILE`` x ``TILE``: how many there are, how many see anything, how many are wholly visible."""

    total: int
    live: int
    full: int


def count_tiles(mask: IntervalMask, tile: int = TILE) -> TileCount:
    """Live tiles are the work of a kernel that skips the others; only those that are not full need a mask."""
    total = live = full = first = 0
    keys = np.minimum(tile, mask.total_k - tile * np.arange(-(-mask.total_k // tile)))
    for part in _coverage_in_parts(mask, tile):
        rows = np.minimum(tile, mask.total_q - tile * (first + np.arange(part.shape[0])))
        total += part.size
        live += int((part > 0).sum())
        full += int((part == rows[:, None] * keys).sum())
        first += part.shape[0]
    return TileCount(total, live, full)


def quadrant(drawn: DrawnMask, rows: tuple[int, int], keys: tuple[int, int]) -> IntervalMask:
    """The mask of rows [a, b) over keys [c, d)."""
    return drawn.mask.select_rows(_span(rows)).select_keys(_span(keys))


def _span(bounds: Sequence[int]) -> torch.Tensor:
    return torch.arange(bounds[0], bounds[1])
