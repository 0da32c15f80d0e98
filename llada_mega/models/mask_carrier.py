"""The attention mask as a tensor that may travel where Megatron-Core carries only tensors.

Megatron's layers pass ``attention_mask`` through untouched, but activation recomputation saves tensors and nothing
else, and under a pipeline schedule the recomputation of one micro-batch runs after the forward pass of later ones, so
there is no "current mask". A carrier is therefore an int32 CPU tensor: an id, the endpoints, under context parallelism
the exchange of keys, and the rows that are predicted. :func:`unpack` finds the objects of that id, with the plans that
attention backends keep on the mask, in a bounded cache; when they have been evicted, or the carrier came from another
process, they are rebuilt from the tensor.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from llada_kernels import IntervalMask
from llada_kernels.exchange import RankExchange
from torch import Tensor

CAPACITY = 64  # masks kept: more than the micro-batches in flight of any pipeline schedule
_HEADER = 7  # id, nfunc, total_q, total_k, rows whose keys are sent, logit rows, those that are no filler
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class ChosenRows:
    """The rows that are predicted, all that the last layer has to compute.

    Attributes:
        rows_R: int64 on the CPU, indices into the rows of the mask; fillers last.
        num_rows: rows that are no filler.
        num_positions: S, rows of the whole mask.
        mask: what the rows see; fillers see nothing.
    """

    rows_R: Tensor
    num_rows: int
    num_positions: int
    mask: IntervalMask
    _copies: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, mask: IntervalMask, rows_R: Tensor, num_rows: int) -> ChosenRows:
        """``num_rows`` rows of ``mask`` and fillers."""
        seen = mask.host().select_rows(rows_R[:num_rows]).pad(len(rows_R), mask.total_k)
        return cls(rows_R, num_rows, mask.total_q, seen)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``rows_R`` and which are fillers (bool ``[R]``), copied to ``device`` once, without waiting for it."""
        if device not in self._copies:
            filler_R = torch.arange(len(self.rows_R)) >= self.num_rows
            on_device = self.rows_R.to(device, non_blocking=True), filler_R.to(device, non_blocking=True)
            self._copies[device] = on_device
        return self._copies[device]


class Visibility(NamedTuple):
    """What a carrier says.

    Attributes:
        mask: who sees whom.
        exchange: how the keys of other ranks are come by; None: there are none.
        chosen: the rows that are predicted; None: all.
    """

    mask: IntervalMask
    exchange: RankExchange | None
    chosen: ChosenRows | None = None


_lock = threading.Lock()
_cache: OrderedDict[int, tuple[Tensor, Visibility]] = OrderedDict()
_ids = itertools.count()


def pack(
    mask: IntervalMask,
    exchange: RankExchange | None = None,
    logit_rows_R: Tensor | None = None,
    num_rows: int = 0,
) -> Tensor:
    """A carrier, an int32 vector on the CPU: header, endpoints row by row, logit rows, places of the exchanged keys.

    Args:
        mask: of this rank's rows.
        exchange: of a context-parallel rank.
        logit_rows_R: int64 on the CPU, the rows that are predicted, fillers last; None: all.
        num_rows: logit rows that are no filler.
    """
    number = next(_ids) % _INT32_MAX
    chosen = None if logit_rows_R is None else ChosenRows.of(mask, logit_rows_R, num_rows)
    sent, rows = exchange.num_sent if exchange else 0, 0 if logit_rows_R is None else len(logit_rows_R)
    header = [number, len(mask.endpoints), mask.total_q, mask.total_k, sent, rows, num_rows]
    parts = [torch.tensor(header, dtype=torch.int32), mask.endpoints.cpu().flatten()]
    if logit_rows_R is not None:
        parts.append(logit_rows_R.to(torch.int32))
    if exchange is not None:
        parts.append(exchange.places_K.to(torch.int32))
    carrier = torch.cat(parts)
    _remember(number, carrier, Visibility(mask, exchange, chosen))
    return carrier


def unpack(carrier: Tensor) -> Visibility:
    """What ``carrier`` was packed from, the same objects as long as they are cached."""
    number, nfunc, total_q, total_k, num_sent, size, num_rows = carrier[:_HEADER].tolist()
    with _lock:
        known = _cache.get(number)
        if known is not None:
            _cache.move_to_end(number)
    if known is not None and (known[0] is carrier or torch.equal(known[0], carrier)):
        return known[1]
    endpoints, rows_R, places_K = carrier[_HEADER:].tensor_split([nfunc * total_q, nfunc * total_q + size])
    mask = IntervalMask(endpoints.view(nfunc, total_q).clone(), total_k)
    exchange = RankExchange(num_sent, places_K.long()) if num_sent else None
    chosen = ChosenRows.of(mask, rows_R.long(), num_rows) if size else None
    visibility = Visibility(mask, exchange, chosen)
    _remember(number, carrier, visibility)
    return visibility


def _remember(number: int, carrier: Tensor, visibility: Visibility) -> None:
    with _lock:
        _cache[number] = (carrier, visibility)
        _cache.move_to_end(number)
        while len(_cache) > CAPACITY:
            _cache.popitem(last=False)
