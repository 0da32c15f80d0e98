"""``make bench``: forward + backward time of block attention on this machine, against attention with a dense mask."""

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


def dense_attention(query_BSHD: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """PyTorch's own attention with a bool [S, S] mask."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query_BSHD, key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=True).transpose(1, 2)


def milliseconds(attention: Callable[[Tensor, Tensor, Tensor], Tensor], total: int, device: torch.device) -> float:
    """Median time of one forward and backward pass over ``total`` positions."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, total, heads, HEAD_DIM) for heads in (QUERY_HEADS, KEY_HEADS, KEY_HEADS)]
    inputs = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        attention(*inputs).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])  # the first one plans, allocates and compiles


def main() -> None:
    """Prints one row a case."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend, reason = choose_backend("auto", device)
    print(
        f"{device}, {torch.get_num_threads()} threads, backend {backend} ({reason}), float32, {QUERY_HEADS}/{KEY_HEADS}"
    )
    print(
        f"{'length':>7} {'block':>6} {'positions':>9} {'live area':>9} {'ours, ms':>12} {'dense ms':>9} {'faster':>8}"
    )
    for length, block_size in CASES:
        mdlm = block_size == length
        documents = [length]
        mask = IntervalMask.mdlm(documents) if mdlm else IntervalMask.block_diffusion(documents, block_size)
        visible, total = mask.dense().to(device), mask.total_q
        fast = milliseconds(lambda q, k, v, mask=mask: interval_attention(q, k, v, mask), total, device)
        slow = milliseconds(lambda q, k, v, visible=visible: dense_attention(q, k, v, visible), total, device)
        live = mask.area() / total**2
        print(f"{length:>7} {block_size:>6} {total:>9} {live:>9.1%} {fast:>12.1f} {slow:>9.1f} {slow / fast:>8.2f}")


if __name__ == "__main__":
    main()
