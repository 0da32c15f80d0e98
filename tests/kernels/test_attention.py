"""Attention: the CPU backend against the reference, the reference against PyTorch's own and numerical gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llada_kernels import IntervalMask, choose_backend, interval_attention
from llada_kernels.backends import chunk_plan, cpu
from llada_kernels.backends.chunk_plan import ChunkPlan
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.kernels.cases import Inputs, any_masks, assert_close, make_inputs, run


@settings(max_examples=200, derandomize=True, deadline=None)
@given(any_masks(), st.sampled_from([(1, 1), (4, 4), (6, 2), (5, 1)]), st.integers(1, 2), st.sampled_from([3, 8]))
def test_cpu_equals_reference(mask: IntervalMask, heads: tuple[int, int], batch: int, head_dim: int) -> None:
    inputs = make_inputs(mask, *heads, batch=batch, head_dim=head_dim)
    assert_close(run(inputs, mask, "cpu", scale=0.7), run(inputs, mask, "reference", scale=0.7))


@pytest.mark.parametrize("chunk_flops", [0, 280_000, 10**12], ids=["one chunk a run", "default", "one chunk"])
@pytest.mark.parametrize(
    "mask",
    [
        IntervalMask.block_diffusion([600, 1, 37], 32),
        IntervalMask.block_diffusion([300, 300], 1, padding=[False, True]),
        IntervalMask.block_diffusion([13] * 40, 64),
        IntervalMask.mdlm([513, 600]),
        IntervalMask.causal([520, 4]),
        IntervalMask.block_causal([50, 600], 48, block_origin="sequence"),
    ],
    ids=["blocks", "autoregressive", "short documents", "mdlm", "causal", "block causal"],
)
def test_every_cut_of_a_long_mask_is_right(mask: IntervalMask, chunk_flops: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(chunk_plan, "CHUNK_COST_FLOPS", chunk_flops)
    mask = IntervalMask(mask.endpoints, mask.total_k)
    inputs = make_inputs(mask, 4, 2, head_dim=16)
    assert_close(run(inputs, mask, "cpu"), run(inputs, mask, "reference"), 2e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("heads", [(4, 4), (9, 3)])
def test_equals_scaled_dot_product_attention(backend: str, heads: tuple[int, int]) -> None:
    mask = IntervalMask.block_diffusion([40, 1, 23], 8)
    inputs = make_inputs(mask, *heads, batch=2)
    query, key, value = (x.requires_grad_() for x in inputs)
    q, k, v = (x.transpose(1, 2) for x in inputs)
    want = scaled_dot_product_attention(q, k, v, attn_mask=mask.dense(), enable_gqa=True).transpose(1, 2)
    got = interval_attention(query, key, value, mask, backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    grads_got, grads_want = (torch.autograd.grad((x * weight).sum(), inputs) for x in (got, want))
    torch.testing.assert_close(grads_got, grads_want, rtol=1e-5, atol=1e-5)


def test_reference_gradients_are_exact() -> None:
    mask = IntervalMask.block_diffusion([5, 2, 3], 2, padding=[False, True, False])
    inputs = tuple(x.requires_grad_() for x in make_inputs(mask, 4, 2, torch.float64, head_dim=3))
    sees = mask.visible_counts() > 0

    def function(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        output, lse = interval_attention(query, key, value, mask, backend="reference", return_lse=True)
        return output, lse[:, sees]

    assert torch.autograd.gradcheck(function, inputs)


def test_heads_are_repeated_where_the_kernel_does_not_group_them(monkeypatch: Any) -> None:
    mask = IntervalMask.block_diffusion([20, 7], 4)
    inputs = make_inputs(mask, 6, 2)
    monkeypatch.setattr(cpu, "GROUPED_HEADS", False)
    assert_close(run(inputs, mask, "cpu"), run(inputs, mask, "reference"))


def test_float64_falls_back_to_the_reference() -> None:
    mask = IntervalMask.mdlm([4, 3])
    inputs = make_inputs(mask, 2, 1, torch.float64)
    got, want = run(inputs, mask, "cpu"), run(inputs, mask, "reference")
    assert all(got[name].dtype == torch.float64 and torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_rows_that_see_nothing_are_exactly_zero(backend: str) -> None:
    mask = IntervalMask.block_diffusion([6, 4, 5], 4, padding=[False, True, False]).pad(40, 44)
    blind, unseen = ~mask.dense().any(1), ~mask.dense().any(0)
    query, key, value = make_inputs(mask, 4, 2)
    result = run((query, key, value), mask, backend)
    assert int(blind.sum()) == 18 and int(unseen.sum()) >= 22
    assert (result["output"][:, blind] == 0).all() and (result["query"][:, blind] == 0).all()
    assert (result["lse"][:, blind] == -torch.inf).all() and result["lse"][:, ~blind].isfinite().all()
    assert (result["key"][:, unseen] == 0).all() and (result["value"][:, unseen] == 0).all()
    assert all(result[name].isfinite().all() for name in ("output", "query", "key", "value"))

    nothing = IntervalMask(torch.zeros(3, 7, dtype=torch.int32), 5)
    result = run(make_inputs(nothing, 2, 2), nothing, backend)
    assert all((result[name] == 0).all() for name in ("output", "query", "key", "value"))


def test_cpu_never_touches_what_nobody_sees() -> None:
    mask = IntervalMask.block_diffusion([60, 20, 30], 8, padding=[False, True, False])
    inputs = make_inputs(mask, 4, 2)
    clean = run(inputs, mask, "cpu")
    for x, unseen in zip(inputs, (mask.dense().any(1), mask.dense().any(0), mask.dense().any(0)), strict=True):
        x[:, ~unseen] = torch.nan
    assert all(torch.equal(run(inputs, mask, "cpu")[name], clean[name]) for name in clean)


def test_cpu_is_deterministic_and_plans_once(monkeypatch: Any) -> None:
    mask = IntervalMask.block_diffusion([90, 38], 8)
    inputs = make_inputs(mask, 6, 2)
    want = run(inputs, mask, "cpu")
    monkeypatch.setattr(IntervalMask, "dense", lambda self: pytest.fail("the CPU backend made a dense mask"))
    built = ChunkPlan.built
    for _ in range(3):
        again = run(inputs, mask, "cpu")
        assert all(torch.equal(again[name], want[name]) for name in want)
    assert ChunkPlan.built == built
    run(inputs, IntervalMask(mask.endpoints, mask.total_k), "cpu")
    assert ChunkPlan.built == built + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(dtype: torch.dtype, monkeypatch: Any) -> None:
    monkeypatch.setattr(chunk_plan, "CHUNK_COST_FLOPS", 0)  # one chunk a row: as many partial sums as there can be
    monkeypatch.setattr(chunk_plan, "KEY_COST_ROWS", 0)
    mask = IntervalMask.causal([300])
    inputs = make_inputs(mask, 6, 2, dtype, head_dim=32)
    got = run(inputs, mask, "cpu")
    want = run(tuple(x.float() for x in inputs), mask, "reference")  # type: ignore[arg-type]
    assert all(got[name].dtype == dtype for name in ("output", "query", "key", "value"))
    assert got["lse"].dtype == torch.float32
    for name, x in want.items():
        error = (got[name].float() - x).norm() / x.norm()
        assert error < torch.finfo(dtype).eps, (name, float(error))


def test_strided_inputs_and_partial_gradients() -> None:
    mask = IntervalMask.block_diffusion([50], 8)
    inputs = make_inputs(mask, 4, 2, batch=2)
    want = run(inputs, mask, "cpu")
    sbhd = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs)
    strided = tuple(x.transpose(1, 3).contiguous().transpose(1, 3) for x in inputs)
    for variant in (sbhd, strided):
        assert_close(run(variant, mask, "cpu"), want)  # type: ignore[arg-type]
    query, key, value = inputs
    grads = []
    for backend in ("cpu", "reference"):
        key = key.detach().clone().requires_grad_()
        _, lse = interval_attention(query, key, value, mask, backend=backend, return_lse=True)
        grads.append(torch.autograd.grad(lse.square().sum(), key)[0])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_choose_backend() -> None:
    name, why = choose_backend("auto", "cpu")
    assert name == "cpu" and why == cpu.SUMMARY
    name, why = choose_backend("auto", "meta")
    assert name == "reference" and "not cudnn: it does not run on meta" in why
    assert choose_backend("reference", "cpu") == ("reference", "asked for")
    with pytest.raises(ValueError, match="unknown attention backend 'flash'; use auto, cpu, cudnn, flex, triton, ref"):
        choose_backend("flash", "cpu")
    with pytest.raises(ValueError, match="attention backend 'cpu' .*does not run on cuda; use auto, "):
        choose_backend("cpu", torch.device("cuda"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), "query must be"),
        (lambda q, k, v: (q, k, v[:, :-1]), "query must be"),
        (lambda q, k, v: (q[:, :-1], k, v), "mask is for 6 rows and 6 keys, got 5 rows and 6 keys"),
        (lambda q, k, v: (q, k[:, :-1], v[:, :-1]), "got 6 rows and 5 keys"),
        (lambda q, k, v: (q[:, :, :3], k, v), "3 query heads are not a multiple of 2 key heads"),
        (lambda q, k, v: (q, k[..., :4], v[..., :4]), "head dim"),
        (lambda q, k, v: (q.double(), k, v), "share a float dtype"),
        (lambda q, k, v: (q.long(), k.long(), v.long()), "share a float dtype"),
        (lambda q, k, v: (q, k.to("meta"), v), "are on cpu, meta and cpu"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: Callable[..., Inputs], message: str) -> None:
    mask = IntervalMask.mdlm([6])
    with pytest.raises(ValueError, match=message):
        interval_attention(*change(*make_inputs(mask, 4, 2)), mask)


def test_a_broken_mask_is_refused() -> None:
    mask = IntervalMask(torch.tensor([[0] * 4, [3] * 4, [2] * 4], dtype=torch.int32), 4)
    with pytest.raises(ValueError, match="row 0 decrease"):
        interval_attention(*make_inputs(mask, 2, 2), mask)
