"""The Triton backend in Triton's interpreter, on the CPU: run by ``test_triton.py`` with ``TRITON_INTERPRET=1``.

The interpreter executes the kernels' own code, one program after the other. Whether a GPU's compiler and memory model
agree with it is not seen here.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from llada_kernels import IntervalMask, interval_attention
from llada_kernels.backends import triton_tiles
from llada_kernels.backends.triton_tiles import Launch, Launches
from llada_kernels.tiles import TileLists
from torch import Tensor

from tests.kernels.cases import Inputs, any_masks, make_inputs, run

HEADS = [(1, 1), (2, 2), (4, 2), (6, 2), (8, 1)]


def compare(mask: IntervalMask, inputs: Inputs, tolerance: float, scale: float = 0.7) -> dict[str, Tensor]:
    """Asserts that outputs and gradients are those of the reference in float64; error is over the largest value."""
    got = run(inputs, mask, "triton", scale=scale)
    want = run(tuple(x.double() for x in inputs), mask, "reference", scale=scale)  # type: ignore[arg-type]
    for name, x in want.items():
        assert got[name].dtype == (torch.float32 if name == "lse" else inputs[0].dtype)
        assert got[name].shape == x.shape
        finite = x.isfinite()
        assert torch.equal(got[name].isfinite(), finite), name
        if finite.any():
            error, largest = (got[name].double() - x)[finite].abs().max(), x[finite].abs().max()
            assert error <= tolerance * max(float(largest), 1e-3), (name, float(error), float(largest))
    return got


@settings(
    max_examples=24,
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],  # the interpreter is too slow to look for a smaller example
    suppress_health_check=list(HealthCheck),
)
@given(any_masks(), st.sampled_from(HEADS), st.sampled_from([32, 40, 64, 96, 128]), st.integers(1, 2))
def test_random_masks(mask: IntervalMask, heads: tuple[int, int], head_dim: int, batch: int) -> None:
    compare(mask, make_inputs(mask, *heads, head_dim=head_dim, batch=batch), 2e-5)


MASKS = {
    "blocks": IntervalMask.block_diffusion([150, 1, 37], 8),
    "padding": IntervalMask.block_diffusion([50, 20, 10], 16, padding=[False, True, False]).pad(200, 190),
    "mdlm": IntervalMask.mdlm([100, 33]),
    "causal": IntervalMask.causal([90, 5]),
    "nothing": IntervalMask(torch.zeros(3, 40, dtype=torch.int32), 50),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("tile", [(16, 64), (64, 16), (32, 32)], ids=str)
def test_tile_shapes(mask: IntervalMask, tile: tuple[int, int], monkeypatch: Any) -> None:
    monkeypatch.setattr(triton_tiles, "INTERPRETED", Launches(*[Launch(*tile, 4, 1)] * 3))
    tiles = TileLists.of(MASKS["blocks"], *tile)
    assert tiles.row_full.indices.numel() and tiles.row_partial.indices.numel()
    got = compare(mask, make_inputs(mask, 2, 1, head_dim=16), 2e-5)
    blind, unseen = ~mask.dense().any(1), ~mask.dense().any(0)
    assert (got["output"][:, blind] == 0).all() and (got["query"][:, blind] == 0).all()
    assert (got["lse"][:, blind] == -torch.inf).all()
    assert (got["key"][:, unseen] == 0).all() and (got["value"][:, unseen] == 0).all()


def test_float16() -> None:
    """Probabilities and their gradients are rounded to float16 before a product: relative errors of a few 2**-11."""
    for number, heads in enumerate([(2, 2), (4, 1), (6, 2)]):
        mask = IntervalMask.block_diffusion([20, 5, 12], 4**number, padding=[False, True, False])
        compare(mask, make_inputs(mask, *heads, torch.float16, head_dim=64, seed=number), 3e-3, scale=1 / 8)


def test_any_strides() -> None:
    mask = IntervalMask.block_diffusion([20], 4)
    inputs = make_inputs(mask, 4, 2, batch=2, head_dim=16)
    want = run(inputs, mask, "triton")
    sbhd = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs)
    head_dim_outermost = tuple(x.transpose(1, 3).contiguous().transpose(1, 3) for x in inputs)
    fused = torch.cat(inputs, 2).split([4, 2, 2], 2)  # one projection for query, key and value
    for variant in (sbhd, head_dim_outermost, fused):
        query, key, value = (x.detach().requires_grad_() for x in variant)
        output, lse = interval_attention(query, key, value, mask, backend="triton", return_lse=True)
        assert torch.equal(output, want["output"]) and torch.equal(lse, want["lse"])
    endpoints = mask.endpoints.T.contiguous().T
    got = run(inputs, IntervalMask(endpoints, mask.total_k), "triton")
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("wanted", ["output", "lse"])
def test_gradient_of_one_result(wanted: str) -> None:
    mask = IntervalMask.block_diffusion([20, 3], 4)
    grads = []
    for backend in ("triton", "reference"):
        inputs = tuple(x.requires_grad_() for x in make_inputs(mask, 2, 1, head_dim=16))
        results = interval_attention(*inputs, mask, backend=backend, return_lse=True)
        loss = results[("output", "lse").index(wanted)].square().sum()
        grads.append(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(*grads, rtol=2e-5, atol=2e-5)


def test_gradients_of_blind_rows_are_ignored() -> None:
    """Whoever merges partial results divides by what a blind row sees: its incoming gradients may be NaN."""
    mask = IntervalMask.block_diffusion([12], 4).pad(30, 30)
    inputs = tuple(x.requires_grad_() for x in make_inputs(mask, 2, 1, head_dim=16))
    _, lse = interval_attention(*inputs, mask, backend="triton", return_lse=True)
    weight = torch.ones_like(lse)
    want = torch.autograd.grad(lse, inputs, weight, retain_graph=True)
    weight[:, 24:] = torch.nan
    assert all(torch.equal(x, y) for x, y in zip(torch.autograd.grad(lse, inputs, weight), want, strict=True))


def test_same_bits_and_no_dense_mask(monkeypatch: Any) -> None:
    mask = IntervalMask.block_diffusion([50, 14], 8)
    inputs = make_inputs(mask, 4, 2, head_dim=16)
    want = run(inputs, mask, "triton")
    built = TileLists.built
    monkeypatch.setattr(IntervalMask, "dense", lambda self: pytest.fail("the Triton backend made a dense mask"))
    again = run(inputs, mask, "triton")
    assert all(torch.equal(again[name], want[name]) for name in want)
    assert TileLists.built == built


def test_the_order_of_programs_does_not_matter(monkeypatch: Any) -> None:
    """No program reads what another one writes, and the order in the plan is a permutation."""
    mask = IntervalMask.block_diffusion([50, 14], 8)
    inputs = make_inputs(mask, 4, 2, head_dim=16)
    want = run(inputs, mask, "triton")
    shuffled = IntervalMask(mask.endpoints, mask.total_k)
    for launch in (triton_tiles.INTERPRETED.forward, triton_tiles.INTERPRETED.query):
        for order in (lists := TileLists.of(shuffled, launch.block_m, launch.block_n)).row_order, lists.key_order:
            order.copy_(order[torch.tensor(random.Random(0).sample(range(order.numel()), order.numel()))])
    got = run(inputs, shuffled, "triton")
    assert all(torch.equal(got[name], want[name]) for name in want)
