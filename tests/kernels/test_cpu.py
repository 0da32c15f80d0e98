"""The CPU backend against float64 on many masks and shapes, its memory, and that it gives the same bits every time."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from llada_kernels import IntervalMask, interval_attention
from llada_kernels.backends import chunk_plan
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from tests.kernels.cases import make_inputs, run

TOLERANCE = 2e-5  # largest error over largest value
KINDS = ["block_diffusion", "block_diffusion", "block_causal", "mdlm", "causal", "arbitrary"]


def random_mask(draw: random.Random) -> IntervalMask:
    """Up to 400 rows: uneven documents, padding, rows and keys left out, or intervals of no structure."""
    kind = draw.choice(KINDS)
    if kind == "arbitrary":
        rows, keys, nfunc = draw.randint(1, 90), draw.randint(1, 90), draw.choice([1, 3, 5, 7])
        columns = [sorted(draw.randint(0, keys) for _ in range(nfunc)) for _ in range(rows)]
        columns = [column if draw.random() < 0.8 else [0] * nfunc for column in columns]
        return IntervalMask(torch.tensor(columns, dtype=torch.int32).T.contiguous(), keys)
    documents = [draw.choice([1, 7, 20, 64, 100]) for _ in range(draw.randint(1, 4))]
    padding = [draw.random() < 0.15 for _ in documents]
    block_size = () if kind in ("mdlm", "causal") else (draw.choice([1, 3, 8, 32, 1000]),)
    mask: IntervalMask = getattr(IntervalMask, kind)(documents, *block_size, padding=padding)
    if draw.random() < 0.3:
        mask = mask.select_keys(sorted(draw.sample(range(mask.total_k), draw.randint(1, mask.total_k))))
        mask = mask.select_rows(draw.sample(range(mask.total_q), draw.randint(1, mask.total_q)))
    return mask


@pytest.mark.parametrize("seed", range(10))
def test_equals_float64(seed: int) -> None:
    draw = random.Random(seed)
    blind_rows = 0
    for _ in range(30):
        mask, key_heads, group = random_mask(draw), draw.choice([1, 2]), draw.choice([1, 2, 3, 4, 8])
        blind_rows += int((mask.visible_counts() == 0).sum())
        inputs = make_inputs(mask, key_heads * group, key_heads, head_dim=draw.choice([32, 64, 80, 128]))
        got, want = run(inputs, mask, "cpu"), run(tuple(x.double() for x in inputs), mask, "reference")  # type: ignore[arg-type]
        sees = want["lse"].isfinite()
        assert torch.equal(got["lse"].isfinite(), sees) and (got["lse"][~sees] == -torch.inf).all()
        got["lse"], want["lse"] = got["lse"][sees], want["lse"][sees]
        for name, x in want.items():
            if x.numel():
                error = (got[name] - x).abs().max()
                assert error <= TOLERANCE * x.abs().max().clamp(min=1e-30), (name, float(error), mask.endpoints.shape)
    assert blind_rows


@pytest.mark.parametrize("cost", [0, 10**12], ids=["many tiles", "few tiles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_cut_of_the_backward_pass_is_right(
    cost: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_plan, "TILE_COST_FLOPS", cost)
    mask = IntervalMask.block_diffusion([70, 9, 130], 4, padding=[False, True, False])
    inputs = make_inputs(mask, 6, 2, dtype, batch=2, head_dim=32)
    got, want = run(inputs, mask, "cpu"), run(tuple(x.float() for x in inputs), mask, "reference")  # type: ignore[arg-type]
    for name in ("query", "key", "value"):
        error = (got[name].float() - want[name]).norm() / want[name].norm()
        assert error < max(1e-5, torch.finfo(dtype).eps), (name, float(error))


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_every_time(threads: int) -> None:
    mask = IntervalMask.block_diffusion([200, 56], 8)
    inputs = make_inputs(mask, 6, 2, head_dim=64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        want = run(inputs, mask, "cpu")
        for _ in range(3):
            again = run(inputs, IntervalMask(mask.endpoints, mask.total_k), "cpu")
            assert all(torch.equal(again[name], x) for name, x in want.items())
    finally:
        torch.set_num_threads(before)


def peak_bytes(function: Callable[[], list[Tensor]]) -> int:
    """Most bytes that PyTorch held during ``function``, beyond what it held before and what is returned."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        returned = function()
    allocations = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak - sum(x.numel() * x.element_size() for x in returned)


def attention_peak(length: int, documents: int, dtype: torch.dtype = torch.float32, dense: bool = False) -> int:
    """Peak of building the mask, forward and backward, beyond inputs, output and gradients; 2 x ``length`` rows."""
    inputs = [torch.randn(1, 2 * length, 8, 64).to(dtype).requires_grad_() for _ in range(3)]

    def function() -> list[Tensor]:
        mask = IntervalMask.block_diffusion([length // documents] * documents, 32)
        if dense:
            visible, (query, key, value) = mask.dense(), (x.transpose(1, 2) for x in inputs)
            output = scaled_dot_product_attention(query, key, value, attn_mask=visible).transpose(1, 2)
        else:
            output = interval_attention(*inputs, mask, backend="cpu")
        return [output.detach(), *torch.autograd.grad(output, inputs, output.detach())]

    return peak_bytes(function)


def test_memory_is_far_below_a_dense_mask() -> None:
    dense = attention_peak(2048, 8, dense=True)
    assert dense > 5 * 4096**2  # one byte a pair for the mask and four for its float form: the meter works
    for documents in (1, 8):
        assert attention_peak(4096, documents) < 0.15 * 4 * dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_grows_with_the_length_at_most(dtype: torch.dtype) -> None:
    short, long = (attention_peak(length, length // 256, dtype) for length in (1024, 2048))
    assert long < 2.2 * short
