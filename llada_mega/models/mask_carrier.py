"""The attention mask as a tensor that may travel where Megatron-Core carries only tensors.

Megatron's layers pass ``attention_mask`` through untouched, but activation recomputation saves tensors and nothing
else, and under a pipeline schedule the recomputation of one micro-batch runs after the forward pass of later ones, so
there is no "current mask". A carrier is therefore an int32 CPU tensor: an id, the endpoints and, under context
parallelism, the exchange of keys. :func:`unpack` finds the objects of that id, with the plans that attention backends
keep on the mask, in a bounded cache; when they have been evicted, or the carrier came from another process, they are
rebuilt from the tensor.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from typing import NamedTuple

import torch
from llada_kernels import IntervalMask
from llada_kernels.exchange import RankExchange
from torch import Tensor

CAPACITY = 64  # masks kept: more than the micro-batches in flight of any pipeline schedule
_HEADER = 5  # id, nfunc, total_q, total_k, rows whose keys are sent
_INT32_MAX = 2**31 - 1


class Visibility(NamedTuple):
    """What a carrier says: who sees whom, and how the keys of other ranks are come by (None: there are none)."""

    mask: IntervalMask
    exchange: RankExchange | None


_lock = threading.Lock()
_cache: OrderedDict[int, tuple[Tensor, Visibility]] = OrderedDict()
_ids = itertools.count()


def pack(mask: IntervalMask, exchange: RankExchange | None = None) -> Tensor:
    """A carrier, an int32 vector on the CPU: header, endpoints row by row, places of the exchanged keys if any."""
    number = next(_ids) % _INT32_MAX
    header = [number, len(mask.endpoints), mask.total_q, mask.total_k, exchange.num_sent if exchange else 0]
    parts = [torch.tensor(header, dtype=torch.int32), mask.endpoints.cpu().flatten()]
    if exchange is not None:
        parts.append(exchange.places_K.to(torch.int32))
    carrier = torch.cat(parts)
    _remember(number, carrier, Visibility(mask, exchange))
    return carrier


def unpack(carrier: Tensor) -> Visibility:
    """What ``carrier`` was packed from, the same objects as long as they are cached."""
    number, nfunc, total_q, total_k, num_sent = carrier[:_HEADER].tolist()
    with _lock:
        known = _cache.get(number)
        if known is not None:
            _cache.move_to_end(number)
    if known is not None and (known[0] is carrier or torch.equal(known[0], carrier)):
        return known[1]
    endpoints, places_K = carrier[_HEADER:].tensor_split([nfunc * total_q])
    exchange = RankExchange(num_sent, places_K.long()) if num_sent else None
    visibility = Visibility(IntervalMask(endpoints.view(nfunc, total_q).clone(), total_k), exchange)
    _remember(number, carrier, visibility)
    return visibility


def _remember(number: int, carrier: Tensor, visibility: Visibility) -> None:
    with _lock:
        _cache[number] = (carrier, visibility)
        _cache.move_to_end(number)
        while len(_cache) > CAPACITY:
            _cache.popitem(last=False)
