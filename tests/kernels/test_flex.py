"""The FlexAttention backend, as far as a machine without a GPU can say.

PyTorch refuses a backward pass of FlexAttention on the CPU, and compiles no log-sum-exp there. What it does there is
right, though: without the refusal, the backend's graph, traced as for a GPU and run by PyTorch's own dense formula,
checks the mask function, the layouts and the gradients; compiled C++ checks the tile lists. ``test_gpu.py`` has the
rest.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from llada_kernels import IntervalMask, choose_backend
from llada_kernels.backends import flex, reference
from llada_kernels.exchange import KeyExchange
from llada_kernels.partition import RowPartition
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from tests.kernels.cases import Inputs, assert_close, make_inputs


@pytest.fixture
def graphs(monkeypatch: Any) -> Iterator[CompileCounterWithBackend]:
    """The backend on the CPU; counts graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flex._attention_with_lse, fullgraph=True, backend=counter)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    monkeypatch.setattr(flex.torch_flex, "_validate_device", lambda *tensors: None)
    with torch._dynamo.config.patch(cache_size_limit=flex.MAX_GRAPHS):
        yield counter


def run(backend: Any, inputs: Inputs, mask: IntervalMask, scale: float, blind_grad: float = 0.0) -> dict[str, Tensor]:
    """Output, lse and the gradients of a random function of both; ``blind_grad`` is what arrives at blind rows."""
    query, key, value = (x.detach().clone().requires_grad_() for x in inputs)
    output, lse = backend.attention(query, key, value, mask, scale)
    blind = ~mask.dense().any(1)
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (output, lse)]
    for grad in grads:
        grad[:, blind] = blind_grad
    torch.autograd.backward([output, lse], grads)
    assert query.grad is not None and key.grad is not None and value.grad is not None
    grads = {"query": query.grad, "key": key.grad, "value": value.grad}
    return {"output": output.detach(), "lse": lse.detach(), **grads}


MASKS = {
    "documents": lambda: IntervalMask.block_diffusion([30, 1, 17], 4),
    "autoregressive": lambda: IntervalMask.block_diffusion([130, 24], 1),
    "shard": lambda: IntervalMask.block_diffusion([100, 40], 8).select_keys(range(0, 280, 3)).select_rows([7, 200, 8]),
    "seven endpoints": lambda: IntervalMask(torch.tensor([[0, 1, 2, 4, 5, 6, 9], [2, 3, 5, 5, 5, 7, 8]]).int().T, 10),
    "mdlm": lambda: IntervalMask.mdlm([40, 12]),
    "causal": lambda: IntervalMask.causal([151, 1]),
}


@pytest.mark.slow
def test_equals_the_reference(graphs: CompileCounterWithBackend) -> None:
    for name, build in MASKS.items():
        mask = build()
        for scale in (0.7, 16**-0.5):
            inputs = make_inputs(mask, 6, 2, torch.float64, batch=2, head_dim=16)
            got, want = run(flex, inputs, mask, scale), run(reference, inputs, mask, scale)
            for part, x in want.items():
                torch.testing.assert_close(got[part], x, rtol=1e-9, atol=1e-9, msg=f"{part}, {name}")


@pytest.mark.parametrize("returns_aux", [True, False])
def test_rows_that_see_nothing(graphs: CompileCounterWithBackend, returns_aux: bool, monkeypatch: Any) -> None:
    if returns_aux and not flex.RETURNS_AUX:
        pytest.skip("this PyTorch has no AuxRequest")
    monkeypatch.setattr(flex, "RETURNS_AUX", returns_aux)
    mask = IntervalMask.block_diffusion([60, 40, 50], 4, padding=[False, True, False]).pad(400, 404)
    blind, unseen = ~mask.dense().any(1), ~mask.dense().any(0)
    inputs = make_inputs(mask, 4, 2, head_dim=16)
    result = run(flex, inputs, mask, 0.25, blind_grad=torch.nan)
    assert int(blind.sum()) == 180
    assert (result["output"][:, blind] == 0).all() and (result["query"][:, blind] == 0).all()
    assert (result["lse"][:, blind] == -torch.inf).all()
    assert (result["key"][:, unseen] == 0).all() and (result["value"][:, unseen] == 0).all()
    assert_close(result, run(reference, inputs, mask, 0.25))
    assert result["lse"].dtype == torch.float32

    nothing = IntervalMask(torch.zeros(3, 7, dtype=torch.int32), 5)
    result = run(flex, make_inputs(nothing, 2, 2, head_dim=16), nothing, 0.25)
    assert all((result[name] == 0).all() for name in ("output", "query", "key", "value"))


def test_the_block_mask_lists_the_live_tiles() -> None:
    tile = flex.TILE
    for mask in (
        IntervalMask.block_diffusion([300, 500, 100], 32, padding=[False, False, True]).pad(1900, 1810),
        IntervalMask.mdlm([1000, 24]),
        IntervalMask.causal([900]).select_rows(range(100, 777)),
    ):
        block_mask = flex.FlexPlan.of(mask).block_mask
        assert block_mask.shape == (1, 1, mask.total_q, mask.total_k)
        dense = torch.nn.functional.pad(mask.dense(), (0, -mask.total_k % tile, 0, -mask.total_q % tile))
        tiles = dense.view(dense.shape[0] // tile, tile, -1, tile)
        assert torch.equal(block_mask.to_dense()[0, 0].bool(), tiles.any(3).any(1))
        assert block_mask.full_kv_num_blocks is not None and block_mask.q_num_blocks is not None
        rows_there = torch.arange(dense.shape[0]).view(-1, tile, 1, 1) < mask.total_q
        full = (tiles | ~rows_there).all(3).all(1)
        assert torch.equal(block_mask.full_kv_num_blocks[0, 0], full.sum(1).int())
        assert torch.equal(block_mask.q_num_blocks[0, 0], (tiles.any(3).any(1) & ~full).sum(0).int())
        row, key = torch.arange(mask.total_q)[:, None], torch.arange(mask.total_k)
        none = torch.zeros((), dtype=torch.int64)
        assert torch.equal(block_mask.mask_mod(none, none, row, key), mask.dense())


def test_plans_are_made_once_a_mask_and_never_dense(graphs: CompileCounterWithBackend, monkeypatch: Any) -> None:
    mask = IntervalMask.block_diffusion([90, 38], 8)
    monkeypatch.setattr(IntervalMask, "dense", lambda self: pytest.fail("a dense mask was made"))
    inputs = make_inputs(mask, 6, 2, head_dim=16)
    flex.attention(*inputs, mask, 0.25)
    plan = flex.FlexPlan.of(mask)
    monkeypatch.setattr(flex.FlexPlan, "build", lambda mask: pytest.fail("a second plan was made"))
    flex.attention(*inputs, mask, 0.25)
    assert flex.FlexPlan.of(mask) is plan and plan.blind_S is None


@pytest.mark.slow
def test_new_documents_and_lengths_do_not_compile_again(graphs: CompileCounterWithBackend) -> None:
    def step(mask: IntervalMask, backward: bool = True) -> int:
        inputs = make_inputs(mask, 4, 2, head_dim=16)
        query, key, value = (x.requires_grad_(backward) for x in inputs)
        with torch.set_grad_enabled(backward):
            output, _ = flex.attention(query, key, value, mask, 0.25)
        if backward:
            output.sum().backward()
        return graphs.frame_count

    training = [[700, 24], [300, 300, 100], [129], [300, 11, 40], [900]]
    counts = [step(IntervalMask.block_diffusion(lengths, 8)) for lengths in training]
    assert counts == [1, 2, 2, 2, 2]  # the first length, then any length
    counts = [step(IntervalMask.mdlm(lengths)) for lengths in training]
    assert counts == [3] * 5
    counts = [step(IntervalMask.causal(lengths), backward=False) for lengths in training]
    assert counts == [4] * 5
    for lengths in ([512, 512], [1024, 256, 256], [896, 128]):
        mask = IntervalMask.block_diffusion(lengths, 32)
        exchange = KeyExchange.exact(mask, RowPartition.balanced(mask, 2, sum(lengths)))
        step(exchange.local_mask(mask, 1))
    assert graphs.frame_count <= 6  # fewer keys than both halves hold: once more at most


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_code_walks_the_tile_lists() -> None:
    mask = IntervalMask.block_diffusion([300, 60, 200], 8, padding=[False, True, False]).pad(1130, 1140)
    inputs = make_inputs(mask, 4, 2, head_dim=16)
    query, key, value = (x.transpose(1, 2) for x in inputs)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda block_mask: flex_attention(query, key, value, block_mask=block_mask, enable_gqa=True)
    )
    block_mask = flex.FlexPlan.of(mask).block_mask
    want, _ = reference.attention(*inputs, mask, 0.25)
    torch.testing.assert_close(compiled(block_mask).transpose(1, 2), want, rtol=1e-5, atol=1e-5)
    counts = block_mask.kv_num_blocks.clone()
    counts[..., 0] = 0
    wrong = BlockMask.from_kv_blocks(
        counts,
        block_mask.kv_indices,
        block_mask.full_kv_num_blocks,
        block_mask.full_kv_indices,
        BLOCK_SIZE=block_mask.BLOCK_SIZE,
        mask_mod=block_mask.mask_mod,
        seq_lengths=block_mask.seq_lengths,
    )
    assert not torch.allclose(compiled(wrong).transpose(1, 2), want, atol=1e-2)


def test_obstacles(monkeypatch: Any) -> None:
    cuda = torch.device("cuda")
    assert "no backward pass of it on cpu" in str(flex.obstacle(torch.device("cpu"), torch.float32, 64))
    assert choose_backend("auto", "cpu")[0] == "cpu"
    if not torch.cuda.is_available():
        assert flex.obstacle(cuda, torch.bfloat16, 128) == "CUDA is not available"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert flex.obstacle(cuda, None, None) == "it needs compute capability 8.0 or later"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(flex.importlib.util, "find_spec", lambda name: None)
    assert flex.obstacle(cuda, None, None) == "triton is not installed"
    monkeypatch.setattr(flex.importlib.util, "find_spec", lambda name: True)
    assert flex.obstacle(cuda, torch.bfloat16, 128) is None
    assert flex.obstacle(cuda, torch.float64, 128) == "it does not compute in torch.float64"
    assert flex.obstacle(cuda, torch.bfloat16, 8) == "head dim 8 is below 16"
