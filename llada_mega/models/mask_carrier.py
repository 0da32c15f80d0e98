"""The attention mask as a tensor that may travel where Megatron-Core carries only tensors.

Megatron's layers pass ``attention_mask`` through untouched, but activation recomputation saves tensors and nothing
else, and under a pipeline schedule the recomputation of one micro-batch runs after the forward pass of later ones, so
there is no "current mask". A carrier is therefore an int32 CPU tensor with the endpoints and an id. :func:`unpack`
finds the :class:`IntervalMask` of that id, with the plans that attention backends keep on it, in a bounded cache; when
it has been evicted, or the carrier came from another process, the mask is rebuilt from the endpoints.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict

import torch
from llada_kernels import IntervalMask
from torch import Tensor

CAPACITY = 64  # masks kept: more than the micro-batches in flight of any pipeline schedule
_HEADER = 3  # id, total_k, total_q
_INT32_MAX = 2**31 - 1
_lock = threading.Lock()
_cache: OrderedDict[int, tuple[Tensor, IntervalMask]] = OrderedDict()
_ids = itertools.count()


def pack(mask: IntervalMask) -> Tensor:
    """``mask`` as int32 ``[nfunc + 1, max(total_q, 3)]`` on the CPU: endpoints, then a row (id, total_k, total_q)."""
    endpoints = mask.endpoints.cpu()
    carrier = torch.zeros(endpoints.shape[0] + 1, max(mask.total_q, _HEADER), dtype=torch.int32)
    carrier[:-1, : mask.total_q] = endpoints
    number = next(_ids) % _INT32_MAX
    carrier[-1, :_HEADER] = torch.tensor([number, mask.total_k, mask.total_q], dtype=torch.int32)
    _remember(number, carrier, mask)
    return carrier


def unpack(carrier: Tensor) -> IntervalMask:
    """The mask that ``carrier`` was packed from, the same object as long as it is cached."""
    number, total_k, total_q = carrier[-1, :_HEADER].tolist()
    with _lock:
        known = _cache.get(number)
        if known is not None:
            _cache.move_to_end(number)
    if known is not None and (known[0] is carrier or torch.equal(known[0], carrier)):
        return known[1]
    mask = IntervalMask(carrier[:-1, :total_q].contiguous(), total_k)
    _remember(number, carrier, mask)
    return mask


def _remember(number: int, carrier: Tensor, mask: IntervalMask) -> None:
    with _lock:
        _cache[number] = (carrier, mask)
        _cache.move_to_end(number)
        while len(_cache) > CAPACITY:
            _cache.popitem(last=False)
