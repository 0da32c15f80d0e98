"""Time, peak memory and error of attention, forward and backward.

Candidates take turns inside one process, so that a busy machine slows all of them. The floor is the time that the
matrix products over the visible pairs alone take at the measured speed of a large matrix product in the same dtype.

Legend: B batch (1), S rows, K keys, H heads, D head dim, R sampled rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llada_kernels.attention import interval_attention
from llada_kernels.backends import BACKENDS
from llada_kernels.bench.cases import Case, Shape
from llada_kernels.bench.memory import peak_allocation
from llada_kernels.interval_mask import IntervalMask

DENSE = "dense SDPA"
BACKWARD_PRODUCTS = 2.5  # of the forward pass: scores again, then dQ, dK, dV and dP, five products against two
MAX_REPEATS, SECONDS_A_CASE = 7, 20.0
SAMPLED_ROWS = 256  # rows whose outputs and gradients are compared with the float64 reference
DENSE_MASK_ELEMENTS = {"cpu": 2**27, "cuda": 2**30}  # beyond, the dense mask and its float copy are left out

Attention = Callable[[Tensor, Tensor, Tensor, IntervalMask], Tensor]


@dataclass(frozen=True)
class Measurement:
    """One candidate on one case. ``peak_mib``: beyond inputs, outputs and gradients, mask and plan included."""

    case: str
    candidate: str
    milliseconds: float
    floor_milliseconds: float
    dense_ratio: float | None  # dense SDPA's time over this one's, None where dense was left out
    live_share: float
    peak_mib: float
    max_error: float  # largest over output, dQ, dK and dV: max |difference| / max |reference|


def candidates(device: torch.device, shape: Shape) -> dict[str, Attention]:
    """Every backend that runs here but the reference, and PyTorch's attention with a dense mask."""
    names = [
        name
        for name, backend in BACKENDS.items()
        if name != "reference" and backend.obstacle(device, shape.dtype, shape.head_dim) is None
    ]
    return {name: _attention_of(name) for name in names} | {DENSE: _dense_attention}


def measure(case: Case, shape: Shape, device: torch.device, gemm_flops: float) -> list[Measurement]:
    """All candidates on one case."""
    mask = case.mask()
    chosen = candidates(device, shape)
    if mask.total_q * mask.total_k > DENSE_MASK_ELEMENTS[device.type]:
        del chosen[DENSE]
    inputs = _inputs(mask, shape, device)
    milliseconds = _take_turns(list(chosen.values()), inputs, mask, device)
    floor = 1000 * mask.attention_flops(shape.query_heads, shape.head_dim) * (1 + BACKWARD_PRODUCTS) / gemm_flops
    dense = milliseconds[-1] if DENSE in chosen else None
    return [
        Measurement(
            case=case.name,
            candidate=name,
            milliseconds=taken,
            floor_milliseconds=floor,
            dense_ratio=None if dense is None else dense / taken,
            live_share=mask.area() / (mask.total_q * mask.total_k),
            peak_mib=_peak_mib(attention, inputs, case, device),
            max_error=_max_error(attention, inputs, mask),
        )
        for (name, attention), taken in zip(chosen.items(), milliseconds, strict=True)
    ]


def gemm_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Measured speed of a large matrix product."""
    size = 1536 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = [_seconds(lambda: left @ right, device) for _ in range(MAX_REPEATS + 1)]
    return 2 * size**3 / statistics.median(times[1:])


def _attention_of(backend: str) -> Attention:
    return lambda query, key, value, mask: interval_attention(query, key, value, mask, backend=backend)


def _dense_attention(query_BSHD: Tensor, key: Tensor, value: Tensor, mask: IntervalMask) -> Tensor:
    """PyTorch's own attention with a bool ``[S, S]`` mask, which is kept like a plan."""
    if "dense" not in mask.plans:
        mask.plans["dense"] = mask.dense().to(query_BSHD.device)
    query, key, value = (tensor.transpose(1, 2) for tensor in (query_BSHD, key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask.plans["dense"], enable_gqa=True).transpose(
        1, 2
    )


def _inputs(mask: IntervalMask, shape: Shape, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(mask.total_q, shape.query_heads), (mask.total_k, shape.key_heads), (mask.total_k, shape.key_heads)]
    return [
        torch.randn(1, *size, shape.head_dim, generator=generator).to(device, shape.dtype).requires_grad_()
        for size in sizes
    ]


def _take_turns(
    attentions: list[Attention], inputs: list[Tensor], mask: IntervalMask, device: torch.device
) -> list[float]:
    """Median milliseconds of forward and backward of each."""
    grad = torch.ones_like(inputs[0])
    times: list[list[float]] = [[] for _ in attentions]
    started = time.perf_counter()
    for _ in range(MAX_REPEATS + 1):
        for attention, taken in zip(attentions, times, strict=True):
            taken.append(_seconds(partial(_forward_backward, attention, inputs, mask, grad), device))
        if time.perf_counter() - started > SECONDS_A_CASE and len(times[0]) > 2:
            break
    return [1000 * statistics.median(taken[1:]) for taken in times]  # the first one plans, allocates and compiles


def _forward_backward(attention: Attention, inputs: list[Tensor], mask: IntervalMask, grad: Tensor) -> list[Tensor]:
    query, key, value = inputs
    output = attention(query, key, value, mask)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak_mib(attention: Attention, inputs: list[Tensor], case: Case, device: torch.device) -> float:
    """Peak allocation of forward and backward with a fresh mask, beyond the output and the gradients."""
    grad = torch.ones_like(inputs[0])

    kept = sum(x.nbytes for x in inputs) + grad.nbytes  # as large as the gradients and the output
    return (peak_allocation(lambda: _forward_backward(attention, inputs, case.mask(), grad), device) - kept) / 2**20


def _max_error(attention: Attention, inputs: list[Tensor], mask: IntervalMask) -> float:
    """Against the float64 reference: sampled rows alone get a gradient, so those rows alone make all gradients."""
    generator = torch.Generator().manual_seed(1)
    rows_R = torch.randperm(mask.total_q, generator=generator)[:SAMPLED_ROWS].sort().values
    rows_R = rows_R.to(inputs[0].device)
    grad = torch.zeros_like(inputs[0])
    grad[:, rows_R] = torch.randn(grad[:, rows_R].shape, generator=generator).to(grad)
    output, *grads = _forward_backward(attention, inputs, mask, grad)

    query, key, value = (x.detach().double().requires_grad_() for x in inputs)
    reference = interval_attention(query[:, rows_R], key, value, mask.select_rows(rows_R.cpu()), backend="reference")
    wanted = torch.autograd.grad(reference, (query, key, value), grad[:, rows_R].double())
    pairs = [(output[:, rows_R], reference), *zip(grads, wanted, strict=True)]
    return max(float((got.double() - want.detach()).abs().max() / want.detach().abs().max()) for got, want in pairs)
