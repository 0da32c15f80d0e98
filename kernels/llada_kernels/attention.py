"""The one entry point: attention over an interval mask, by whichever backend fits the device."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from llada_kernels.backends import BACKENDS
from llada_kernels.interval_mask import IntervalMask


@overload
def interval_attention(
    query_BSHD: Tensor,
    key: Tensor,
    value: Tensor,
    mask: IntervalMask,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: Literal[False] = False,
    deterministic: bool = True,
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
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]: ...


def interval_attention(
    query_BSHD: Tensor,
    key: Tensor,
    value: Tensor,
    mask: IntervalMask,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    deterministic: bool = True,
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
        deterministic: same inputs, same bits. Only ``cudnn`` knows a faster way (its backward) when this is False.

    Returns:
        Output ``[B, S, Hq, D]`` in the dtype of the query; with ``return_lse`` also lse float32 ``[B, S, Hq]``
        (float64 for float64 inputs). Rows that see nothing give output 0, lse -inf and zero gradients.

    Raises:
        ValueError: shapes, dtypes, devices, mask and backend do not fit together; the message says how.
    """
    _check(query_BSHD, key, value, mask)
    device, head_dim = query_BSHD.device, query_BSHD.shape[-1]
    name, _ = choose_backend(backend, device, query_BSHD.dtype, head_dim)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    output, lse = BACKENDS[name].attention(query_BSHD, key, value, mask.to(device), scale, deterministic)
    return (output, lse) if return_lse else output


def choose_backend(
    backend: str, device: torch.device | str, dtype: torch.dtype | None = None, head_dim: int | None = None
) -> tuple[str, str]:
    """Name of the backend that ``interval_attention`` uses for such inputs, and why.

    Args:
        backend: "auto", the first of ``BACKENDS`` that runs, or a name.
        device: where the inputs are.
        dtype, head_dim: of the inputs; None leaves them out of the decision.

    Raises:
        ValueError: no such backend, or it cannot serve such inputs; the message says why and what can.
    """
    device = torch.device(device)
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; use auto, {', '.join(BACKENDS)}")
    obstacles: dict[str, str] = {}
    for name, candidate in BACKENDS.items():
        if backend in (name, "auto"):
            obstacle = candidate.obstacle(device, dtype, head_dim)
            if obstacle is None:
                passed = "; ".join(f"not {other}: {why}" for other, why in obstacles.items())
                return name, "asked for" if backend == name else candidate.SUMMARY + (passed and f" ({passed})")
            obstacles[name] = obstacle
    usable = [name for name, other in BACKENDS.items() if other.obstacle(device, dtype, head_dim) is None]
    raise ValueError(
        f"attention backend {backend!r} cannot be used: {obstacles[backend]}; use auto, {', '.join(usable)}"
    )


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
