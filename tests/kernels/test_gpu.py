"""Every GPU backend against the float64 reference, on the device. Run by ``make test-gpu``; skipped without a GPU.

A backend that this machine cannot run (architecture, missing package) is skipped with its own reason.
"""

from __future__ import annotations

import pytest
import torch
from llada_kernels import BACKENDS, IntervalMask, choose_backend, interval_attention
from llada_kernels.bench.memory import peak_allocation
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.kernels.cases import Inputs, make_inputs, run

pytestmark = pytest.mark.gpu
CUDA = "cuda:0"

MASKS = {
    "one document": lambda: IntervalMask.block_diffusion([512], 32),
    "documents": lambda: IntervalMask.block_diffusion([300, 1, 37, 190, 240], 32),
    "padding": lambda: IntervalMask.block_diffusion([200, 120, 64], 8, padding=[False, True, False]).pad(800, 832),
    "autoregressive": lambda: IntervalMask.block_diffusion([300, 84], 1),
    "one block": lambda: IntervalMask.block_diffusion([257, 127], 4096),
    "mdlm": lambda: IntervalMask.mdlm([400, 112]),
    "causal": lambda: IntervalMask.causal([511, 1]),
    "rows and keys left out": lambda: (
        IntervalMask.block_diffusion([512, 256], 16)
        .select_keys(torch.arange(0, 1536, 2))
        .select_rows(torch.randperm(1536, generator=torch.Generator().manual_seed(0))[:640])
    ),
}
HEADS = {"multi-head": (4, 4, 64), "grouped": (16, 4, 128), "multi-query": (8, 1, 128)}


@pytest.fixture(params=[name for name in BACKENDS if name != "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that runs on this GPU."""
    obstacle = BACKENDS[request.param].obstacle(torch.device(CUDA), torch.bfloat16, 128)
    if obstacle is not None:
        pytest.skip(f"{request.param}: {obstacle}")
    return str(request.param)


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the difference over the norm of the reference, tensor by tensor; lse: largest difference."""
    finite = want["lse"].isfinite()
    assert torch.equal(got["lse"].isfinite().cpu(), finite.cpu())
    result = {"lse": float((got["lse"].double() - want["lse"])[finite].abs().max())}
    for name in ("output", "query", "key", "value"):
        assert got[name].isfinite().all(), name
        result[name] = float((got[name].double() - want[name]).norm() / want[name].norm())
    return result


def dense_sdpa_errors(inputs: Inputs, mask: IntervalMask, want: dict[str, Tensor]) -> dict[str, float]:
    """What PyTorch's own attention reaches in the same dtype, on the rows that see something."""
    sees = mask.dense().any(1)
    query, key, value = inputs
    q, k, v = (x.transpose(1, 2) for x in (query[:, sees], key, value))
    output = scaled_dot_product_attention(q, k, v, attn_mask=mask.dense()[sees], enable_gqa=True).transpose(1, 2)
    return {"output": float((output.double() - want["output"][:, sees]).norm() / want["output"].norm())}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", MASKS)
def test_bf16_equals_the_float64_reference(backend: str, name: str, heads: str) -> None:
    mask = MASKS[name]().to(CUDA)
    query_heads, key_heads, head_dim = HEADS[heads]
    inputs = make_inputs(mask, query_heads, key_heads, torch.bfloat16, head_dim=head_dim)
    inputs = tuple(x.to(CUDA) for x in inputs)  # type: ignore[assignment]
    want = run(tuple(x.double() for x in inputs), mask, "reference")  # type: ignore[arg-type]
    found = errors(run(inputs, mask, backend), want)
    # Rounding the result alone costs eps / 4 or so; probabilities and score gradients are rounded as well.
    eps = torch.finfo(torch.bfloat16).eps
    assert found["lse"] < 2e-3, found
    assert found["output"] < max(eps, 2 * dense_sdpa_errors(inputs, mask, want)["output"]), found
    assert all(found[name] < 2 * eps for name in ("query", "key", "value")), found


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(backend: str, dtype: torch.dtype) -> None:
    obstacle = BACKENDS[backend].obstacle(torch.device(CUDA), dtype, 64)
    if obstacle is not None:
        pytest.skip(f"{backend}: {obstacle}")
    mask = MASKS["documents"]().to(CUDA)
    inputs = tuple(x.to(CUDA) for x in make_inputs(mask, 8, 2, dtype, head_dim=64))
    want = run(tuple(x.double() for x in inputs), mask, "reference")  # type: ignore[arg-type]
    found = errors(run(inputs, mask, backend), want)  # type: ignore[arg-type]
    limit = 1e-4 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert all(error < max(limit, 1e-4) for error in found.values()), found


def test_same_bits_every_time(backend: str) -> None:
    mask = MASKS["documents"]().to(CUDA)
    inputs = tuple(x.to(CUDA) for x in make_inputs(mask, 16, 4, torch.bfloat16, head_dim=128))
    want = run(inputs, mask, backend)  # type: ignore[arg-type]
    for _ in range(5):
        again = run(inputs, mask, backend)  # type: ignore[arg-type]
        assert all(torch.equal(again[name], want[name]) for name in want)


def test_rows_that_see_nothing_are_zero(backend: str) -> None:
    mask = MASKS["padding"]().to(CUDA)
    blind, unseen = ~mask.dense().any(1), ~mask.dense().any(0)
    inputs = tuple(x.to(CUDA) for x in make_inputs(mask, 16, 4, torch.bfloat16, head_dim=128))
    result = run(inputs, mask, backend)  # type: ignore[arg-type]
    assert (result["output"][:, blind] == 0).all() and (result["query"][:, blind] == 0).all()
    assert (result["lse"][:, blind] == -torch.inf).all()
    assert (result["key"][:, unseen] == 0).all() and (result["value"][:, unseen] == 0).all()


def test_sequence_first_layout(backend: str) -> None:
    """The models hand over ``[S, B, H, D]`` tensors, transposed."""
    mask = MASKS["one document"]().to(CUDA)
    inputs = tuple(x.to(CUDA) for x in make_inputs(mask, 16, 4, torch.bfloat16, head_dim=128))
    strided = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs)
    want, got = (run(x, mask, backend) for x in (inputs, strided))  # type: ignore[arg-type]
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_memory_grows_with_the_rows_only(backend: str) -> None:
    if backend == "reference":
        pytest.skip("reference: O(S^2) by design")

    def peak(length: int) -> int:
        mask = IntervalMask.block_diffusion([length], 32)
        sizes = [(2 * length, 16), (2 * length, 4), (2 * length, 4)]
        inputs = [torch.randn(1, *s, 128, device=CUDA, dtype=torch.bfloat16, requires_grad=True) for s in sizes]

        def step() -> None:
            query, key, value = inputs
            fresh = IntervalMask(mask.endpoints, mask.total_k)
            output = interval_attention(query, key, value, fresh, backend=backend)
            torch.autograd.grad(output, inputs, torch.ones_like(output))

        step()  # compiles
        return peak_allocation(step, torch.device(CUDA))

    assert peak(8192) < 2.3 * peak(4096)  # O(S^2) would be 4


def test_auto_picks_a_fused_backend() -> None:
    name, reason = choose_backend("auto", CUDA, torch.bfloat16, 128)
    assert name in ("cudnn", "flex", "triton"), reason
