"""Attention masks as key intervals: every query row sees a union of a few half-open intervals of keys.

The mask of block diffusion (arXiv 2512.15745, section on the BDLM objective; BD3-LM, arXiv 2503.09573) over the
concatenation ``[noisy ; clean]`` needs two intervals a row, so a mask over S rows costs O(S) memory instead of O(S^2),
and every form that a kernel wants (tiles, chunks, block masks, dense) can be derived from it.

Legend: L tokens of the packed sequence, S query rows, K keys, F = nfunc endpoint rows, s/e start/end of a token's
document, u/v start/end of its block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class IntervalMask:
    """Who sees whom, as interval endpoints.

    Row q sees the keys ``[0, F0) U [F1, F2) U [F3, F4) ...`` with ``F = endpoints[:, q]``; the form that
    ``cudnn.flex_attention`` takes. All constructors take ``document_lengths``, positive integers that tile the packed
    sequence exactly, and ``padding``, one bool a document: a padding document sees nothing and is seen by nothing.

    Attributes:
        endpoints: int32 ``[nfunc, total_q]``, nfunc odd, nondecreasing along dim 0, values in ``[0, total_k]``.
        total_k: number of keys.

    Raises:
        ValueError: the endpoints have the wrong type or shape. Their values are checked by :meth:`validate`.
    """

    endpoints: Tensor
    total_k: int
    # Plans that backends derive from this mask (chunk lists, tile lists), by backend: built once, used by every layer.
    plans: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.endpoints.dtype != torch.int32 or self.endpoints.dim() != 2 or self.endpoints.shape[0] % 2 == 0:
            raise ValueError(
                f"endpoints must be int32 [nfunc, total_q] with odd nfunc, "
                f"got {self.endpoints.dtype} {list(self.endpoints.shape)}"
            )
        if self.total_k < 0:
            raise ValueError(f"total_k must not be negative, got {self.total_k}")

    @classmethod
    def block_diffusion(
        cls,
        document_lengths: Sequence[int],
        block_size: int,
        *,
        padding: Sequence[bool] | None = None,
        block_origin: str = "document",
        sequence_lengths: Sequence[int] | None = None,
    ) -> IntervalMask:
        """The training mask over ``[noisy L ; clean L]`` (arXiv 2512.15745, eq. (3)); ``total_q = total_k = 2L``.

        Inside one document: noisy sees noisy of its own block and clean of earlier blocks; clean sees clean of its own
        and earlier blocks; clean never sees noisy. ``block_size=1`` is the autoregressive mask.

        Args:
            document_lengths: lengths of the documents, in tokens; they tile the L tokens.
            block_size: tokens in a block; a document's last block may be short.
            padding: which documents are padding.
            block_origin: count blocks from the start of the "document" or of the sample ("sequence").
            sequence_lengths: lengths of the samples, each a group of whole documents; default one sample.

        Raises:
            ValueError: a length, the block size or the origin is impossible; the message names it.
        """
        start, end, real = _documents(document_lengths, padding)
        first, last = _blocks(start, end, block_size, block_origin, document_lengths, sequence_lengths)
        length = start.numel()
        zero = torch.zeros_like(start)
        noisy = torch.stack((zero, first, last, length + start, length + first))
        clean = torch.stack((zero, length + start, length + last, length + last, length + last))
        return cls(_pack(torch.cat((noisy * real, clean * real), dim=1)), 2 * length)

    @classmethod
    def mdlm(cls, document_lengths: Sequence[int], *, padding: Sequence[bool] | None = None) -> IntervalMask:
        """Bidirectional inside each document (eq. (3) with one block a document and no clean half); size L.

        Raises:
            ValueError: a length is impossible; the message names it.
        """
        start, end, real = _documents(document_lengths, padding)
        return cls(_pack(_one_interval(start, end) * real), start.numel())

    @classmethod
    def causal(cls, document_lengths: Sequence[int], *, padding: Sequence[bool] | None = None) -> IntervalMask:
        """Token-causal inside each document: the autoregressive model; size L.

        Raises:
            ValueError: a length is impossible; the message names it.
        """
        start, _, real = _documents(document_lengths, padding)
        return cls(_pack(_one_interval(start, torch.arange(1, start.numel() + 1)) * real), start.numel())

    @classmethod
    def block_causal(
        cls,
        document_lengths: Sequence[int],
        block_size: int,
        *,
        padding: Sequence[bool] | None = None,
        block_origin: str = "document",
        sequence_lengths: Sequence[int] | None = None,
    ) -> IntervalMask:
        """Each row sees its document up to the end of its own block: the clean half alone, as in decoding; size L.

        Arguments and errors as in :meth:`block_diffusion`.
        """
        start, end, real = _documents(document_lengths, padding)
        _, last = _blocks(start, end, block_size, block_origin, document_lengths, sequence_lengths)
        return cls(_pack(_one_interval(start, last) * real), start.numel())

    @property
    def total_q(self) -> int:
        """Number of query rows."""
        return self.endpoints.shape[1]

    def to(self, device: torch.device | str) -> IntervalMask:
        """The same mask with its endpoints on ``device``; the same object each time, so that its plans are kept."""
        device = torch.device(device)
        if device == self.endpoints.device:
            return self
        key = ("device", device)
        if key not in self.plans:
            to_device = device.type != "cpu"  # there, reading would not wait for the copy
            copy = IntervalMask(self.endpoints.to(device, non_blocking=to_device), self.total_k)
            copy.plans["host"] = IntervalMask(self.host().endpoints, self.total_k)  # not self: that would be a cycle
            self.plans[key] = copy
        return self.plans[key]

    def host(self) -> IntervalMask:
        """The same mask on the CPU, without waiting for a device when it came from there: plans are made from it."""
        if self.endpoints.device.type == "cpu":
            return self
        if "host" not in self.plans:
            self.plans["host"] = IntervalMask(self.endpoints.cpu(), self.total_k)
        return self.plans["host"]

    def select_rows(self, rows: Tensor | Sequence[int]) -> IntervalMask:
        """The mask of some query rows, in the order given (a context-parallel shard, kept clean tokens).

        Raises:
            ValueError: a row is outside ``[0, total_q)``.
        """
        index = self._index(rows, self.total_q, "rows")
        return IntervalMask(self.endpoints[:, index].contiguous(), self.total_k)

    def select_keys(self, positions: Tensor | Sequence[int]) -> IntervalMask:
        """The mask over a subset of the keys, kept in increasing order.

        The map from a key to its rank in the subset is monotone, so each interval stays one interval.

        Raises:
            ValueError: positions are outside ``[0, total_k)`` or not strictly increasing.
        """
        index = self._index(positions, self.total_k, "key positions")
        if not bool((index[1:] > index[:-1]).all()):
            raise ValueError("key positions must be strictly increasing")
        kept_before = torch.zeros(self.total_k + 1, dtype=torch.int32, device=self.endpoints.device)
        kept_before[index + 1] = 1
        kept_before = kept_before.cumsum(0, dtype=torch.int32)
        return IntervalMask(kept_before[self.endpoints.long()], index.numel())

    def pad(self, total_q: int, total_k: int) -> IntervalMask:
        """Append rows that see nothing and keys that nobody sees.

        Raises:
            ValueError: a total is smaller than the present one.
        """
        if total_q < self.total_q or total_k < self.total_k:
            raise ValueError(f"cannot pad {self.total_q} rows, {self.total_k} keys to {total_q} rows, {total_k} keys")
        return IntervalMask(torch.nn.functional.pad(self.endpoints, (0, total_q - self.total_q)), total_k)

    def dense(self) -> Tensor:
        """The mask as bool ``[total_q, total_k]``, True = visible. O(S^2): for tests, drawings and the oracle."""
        return visible_keys(self.endpoints, torch.arange(self.total_k, device=self.endpoints.device))

    def visible_counts(self) -> Tensor:
        """Number of keys that each row sees, int64 ``[total_q]``."""
        bound = self.endpoints.long()
        return bound[0] + (bound[2::2] - bound[1::2]).sum(0)

    def area(self) -> int:
        """Number of visible (row, key) pairs."""
        return int(self.visible_counts().sum())

    def attention_flops(self, num_heads: int, head_dim: int) -> int:
        """FLOPs of one forward attention over the visible pairs only (two products, 2 FLOPs a multiply-add)."""
        return 4 * self.area() * num_heads * head_dim

    def validate(self) -> None:
        """Check the values of the endpoints (this synchronises with the device that holds them).

        Raises:
            ValueError: an endpoint lies outside ``[0, total_k]`` or a row decreases; the message names the row.
        """
        outside = ((self.endpoints < 0) | (self.endpoints > self.total_k)).any(0)
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            raise ValueError(f"endpoints of row {row} are outside [0, {self.total_k}]: {self._row(row)}")
        falling = (self.endpoints[1:] < self.endpoints[:-1]).any(0)
        if bool(falling.any()):
            row = int(falling.nonzero()[0])
            raise ValueError(f"endpoints of row {row} decrease: {self._row(row)}")

    def _row(self, row: int) -> list[int]:
        return self.endpoints[:, row].tolist()

    def _index(self, values: Tensor | Sequence[int], size: int, what: str) -> Tensor:
        index = torch.as_tensor(values, device=self.endpoints.device)
        if index.dim() != 1 or (index.numel() and (index.is_floating_point() or index.dtype == torch.bool)):
            raise ValueError(f"{what} must be a vector of integers, got {index.dtype} {list(index.shape)}")
        index = index.long()
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
            raise ValueError(f"{what} must lie in [0, {size}), got {int(index.min())} .. {int(index.max())}")
        return index


def visible_keys(endpoints: Tensor, keys: Tensor) -> Tensor:
    """Which rows (columns of ``endpoints`` ``[nfunc, rows]``) see which keys: bool ``[rows, len(keys)]``."""
    bound = endpoints[:, :, None]
    visible = keys < bound[0]
    for low, high in zip(bound[1::2], bound[2::2], strict=True):
        visible |= (keys >= low) & (keys < high)
    return visible


def _documents(lengths: Sequence[int], padding: Sequence[bool] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Start and end of each token's document (int64 [L]) and whether it is real, not padding (bool [L])."""
    length_D = _positive(lengths, "document_lengths")
    real_D = ~torch.as_tensor([False] * len(length_D) if padding is None else list(padding), dtype=torch.bool)
    if real_D.numel() != length_D.numel():
        raise ValueError(f"padding has {real_D.numel()} entries for {length_D.numel()} documents")
    end_D = length_D.cumsum(0)
    document_L = torch.repeat_interleave(length_D)
    return (end_D - length_D)[document_L], end_D[document_L], real_D[document_L]


def _blocks(
    start: Tensor,
    end: Tensor,
    block_size: int,
    block_origin: str,
    document_lengths: Sequence[int],
    sequence_lengths: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """Start and end of each token's block, clipped to its document (int64 [L])."""
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if block_origin not in ("document", "sequence"):
        raise ValueError(f"block_origin must be 'document' or 'sequence', got {block_origin!r}")
    origin = start
    sample_start = _sample_starts(document_lengths, sequence_lengths)
    if block_origin == "sequence":
        origin = sample_start
    position = torch.arange(start.numel())
    first = position - (position - origin) % block_size
    return torch.maximum(first, start), torch.minimum(first + block_size, end)


def _sample_starts(document_lengths: Sequence[int], sequence_lengths: Sequence[int] | None) -> Tensor:
    """Start of each token's sample (int64 [L]); samples must be groups of whole documents."""
    total = sum(document_lengths)
    if sequence_lengths is None:
        return torch.zeros(total, dtype=torch.int64)
    length_N = _positive(sequence_lengths, "sequence_lengths")
    end_N = length_N.cumsum(0)
    document_end_D = torch.as_tensor(document_lengths, dtype=torch.int64).cumsum(0)
    if int(length_N.sum()) != total or not bool(torch.isin(end_N, document_end_D).all()):
        raise ValueError(f"sequence_lengths {length_N.tolist()} do not group the documents {list(document_lengths)}")
    return torch.repeat_interleave(end_N - length_N, length_N)


def _positive(lengths: Sequence[int], name: str) -> Tensor:
    length = torch.as_tensor(lengths)
    if length.numel() == 0:
        return torch.zeros(0, dtype=torch.int64)
    if length.dim() != 1 or length.is_floating_point() or int(length.min()) < 1:
        raise ValueError(f"{name} must be positive integers, got {length.tolist()}")
    return length.to("cpu", torch.int64)


def _one_interval(low: Tensor, high: Tensor) -> Tensor:
    return torch.stack((torch.zeros_like(low), low, high))


def _pack(endpoints: Tensor) -> Tensor:
    return endpoints.to(torch.int32).contiguous()
