"""``make bench``: forward + backward time of block attention on this machine, against attention with a dense mask.

Both run in turn inside one process, so that a busy machine slows both. The floor is the time that the matrix products
over the visible pairs alone would take at the measured speed of a large matrix product.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from llada_kernels import IntervalMask, choose_backend, interval_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

QUERY_HEADS, KEY_HEADS, HEAD_DIM = 8, 2, 64
REPEATS = 5
CASES = [(512, 8), (512, 32), (512, 512), (2048, 32), (2048, 256), (2048, 2048)]  # sequence length, block size
BACKWARD_PRODUCTS = 2.5  # of the forward pass: scores again, then dQ, dK, dV and dP, five products against two

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense_attention(query_BSHD: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """PyTorch's own attention with a bool [S, S] mask."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query_BSHD, key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=True).transpose(1, 2)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(attentions: list[Attention], total: int, device: torch.device) -> list[float]:
    """Median milliseconds of forward and backward over ``total`` positions, the candidates taking turns."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, total, heads, HEAD_DIM) for heads in (QUERY_HEADS, KEY_HEADS, KEY_HEADS)]
    inputs = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    times: list[list[float]] = [[] for _ in attentions]
    for _ in range(REPEATS + 1):
        for attention, taken in zip(attentions, times, strict=True):
            taken.append(seconds(lambda attention=attention: attention(*inputs).sum().backward(), device))
    return [1000 * statistics.median(taken[1:]) for taken in times]  # the first one plans, allocates and compiles


def gemm_flops_per_second(device: torch.device, size: int = 1536) -> float:
    """Measured speed of a float32 matrix product."""
    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    times = [seconds(lambda: left @ right, device) for _ in range(REPEATS + 1)]
    return 2 * size**3 / statistics.median(times[1:])


def main() -> None:
    """Prints one row a case."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend, reason = choose_backend("auto", device)
    speed = gemm_flops_per_second(device)
    print(
        f"{device}, {torch.get_num_threads()} threads, backend {backend} ({reason}), float32, "
        f"{QUERY_HEADS}/{KEY_HEADS} heads of {HEAD_DIM}; matrix products run at {speed / 1e9:.0f} GFLOP/s"
    )
    print(
        f"{'length':>7} {'block':>6} {'live area':>9} {'floor ms':>9} {'ours ms':>9} {'dense ms':>9} {'dense/ours':>10}"
    )
    for length, block_size in CASES:
        mdlm = block_size == length
        mask = IntervalMask.mdlm([length]) if mdlm else IntervalMask.block_diffusion([length], block_size)
        visible, total = mask.dense().to(device), mask.total_q
        ours, dense = compare(
            [
                lambda q, k, v, mask=mask: interval_attention(q, k, v, mask),
                lambda q, k, v, visible=visible: dense_attention(q, k, v, visible),
            ],
            total,
            device,
        )
        floor = 1000 * mask.attention_flops(QUERY_HEADS, HEAD_DIM) * (1 + BACKWARD_PRODUCTS) / speed
        live = mask.area() / total**2
        print(
            f"{length:>7} {block_size:>6} {live:>9.1%} {floor:>9.1f} {ours:>9.1f} {dense:>9.1f} {dense / ours:>10.2f}"
        )


if __name__ == "__main__":
    main()
