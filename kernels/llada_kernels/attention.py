"""The one entry point: attention over an interval mask, by whichever backend fits the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

import torch
from torch import Tensor

from llada_kernels.cpu import cpu_attention
from llada_kernels.interval_mask import IntervalMask
from llada_kernels.reference import reference_attention

Backend = Callable[[Tensor, Tensor, Tensor, IntervalMask, float | None], tuple[Tensor, Tensor]]

BACKENDS: dict[str, Backend] = {"cpu": cpu_attention, "reference": reference_attention}


@overload
def interval_attention(
    query_BSHD: Tensor,
    key: Tensor,
    value: Tensor,
    mask: IntervalMask,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def interval_attention(
    query_BSHD: Tensor,
    key: Tensor,
    value: Tensor,
    mask: IntervalMask,
    scale: float | None = None,
    backend: str = "auto",
    *,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def interval_attention(
    query_BSHD: Tensor,
    key: Tensor,
    value: Tensor,
    mask: IntervalMask,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention where row q sees exactly the keys that ``mask`` says. Differentiable.

    Args:
        query_BSHD: ``[B, S, Hq, D]`` floating point; the mask (S = ``mask.total_q``) holds for each batch entry.
        key, value: ``[B, K, Hk, D]``, K = ``mask.total_k``, Hq a multiple of Hk (grouped-query attention); dtype and
            device as the query.
        mask: who sees whom; backends cache their plan on it.
        scale: factor on the scores, default ``1 / sqrt(D)``.
        backend: "auto" or a name from ``BACKENDS``.
        return_lse: also return the log-sum-exp of the scaled visible scores, differentiable.

    Returns:
        Output ``[B, S, Hq, D]`` in the dtype of the query; with ``return_lse`` also lse float32 ``[B, S, Hq]``
        (float64 for float64 inputs). Rows that see nothing give output 0, lse -inf and zero gradients.

    Raises:
        ValueError: shapes, dtypes, devices, mask and backend do not fit together; the message says how.
    """
    _check(query_BSHD, key, value, mask)
    name, _ = choose_backend(backend, query_BSHD.device)
    output, lse = BACKENDS[name](query_BSHD, key, value, mask.to(query_BSHD.device), scale)
    return (output, lse) if return_lse else output


def choose_backend(backend: str, device: torch.device | str) -> tuple[str, str]:
    """Name of the backend that ``interval_attention`` uses on ``device``, and why.

    Raises:
        ValueError: no such backend, or it does not run on this device.
    """
    kind = torch.device(device).type
    if backend == "auto":
        if kind == "cpu":
            return "cpu", "fused chunks of visible pairs on the CPU"
        return "reference", f"no fused backend for device {kind} yet: dense mask, O(S^2) memory"
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; use auto, {', '.join(BACKENDS)}")
    if backend == "cpu" and kind != "cpu":
        raise ValueError(f"attention backend 'cpu' does not run on {kind}; use auto or reference")
    return backend, "asked for"


def _check(query: Tensor, key: Tensor, value: Tensor, mask: IntervalMask) -> None:
    if query.dim() != 4 or key.dim() != 4 or value.shape != key.shape:
        raise ValueError(
            f"query must be [B, S, Hq, D] and key and value [B, K, Hk, D], "
            f"got {list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )
    batch, rows, heads, head_dim = query.shape
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(f"batch and head dim of query {list(query.shape)} and key {list(key.shape)} differ")
    if key.shape[2] == 0 or heads % key.shape[2]:
        raise ValueError(f"{heads} query heads are not a multiple of {key.shape[2]} key heads")
    if rows != mask.total_q or key.shape[1] != mask.total_k:
        raise ValueError(
            f"mask is for {mask.total_q} rows and {mask.total_k} keys, got {rows} rows and {key.shape[1]} keys"
        )
    if not query.is_floating_point() or not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value must share a float dtype, got {query.dtype} {key.dtype} {value.dtype}")
    if not query.device == key.device == value.device:
        raise ValueError(f"query, key and value are on {query.device}, {key.device} and {value.device}")
