"""Random masks and inputs, and what every backend is asked for."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from llada_kernels import IntervalMask, interval_attention
from torch import Tensor

Inputs = tuple[Tensor, Tensor, Tensor]


@st.composite
def any_masks(draw: st.DrawFn, max_rows: int = 40) -> IntervalMask:
    """Block-diffusion masks with rows and keys left out, and masks of arbitrary intervals."""
    random = draw(st.randoms(use_true_random=False))
    kind = draw(st.sampled_from(["arbitrary", "block_diffusion", "mdlm", "causal", "block_causal"]))
    if kind == "arbitrary":
        nfunc, rows, keys = random.choice([1, 3, 5, 7]), random.randint(1, max_rows), random.randint(1, max_rows)
        columns = [sorted(random.randint(0, keys) for _ in range(nfunc)) for _ in range(rows)]
        columns = [column if random.random() > 0.2 else [0] * nfunc for column in columns]
        return IntervalMask(torch.tensor(columns, dtype=torch.int32).T.contiguous(), keys)
    documents = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    padding = [random.random() < 0.15 for _ in documents]
    block_size = () if kind in ("mdlm", "causal") else (random.choice([1, 2, 4, 5, 64]),)
    mask: IntervalMask = getattr(IntervalMask, kind)(documents, *block_size, padding=padding)
    if random.random() < 0.5:
        mask = mask.select_keys(sorted(random.sample(range(mask.total_k), random.randint(1, mask.total_k))))
        mask = mask.select_rows(random.sample(range(mask.total_q), random.randint(1, mask.total_q)))
    return mask


def make_inputs(
    mask: IntervalMask, heads: int, key_heads: int, dtype: torch.dtype = torch.float32, **kw: Any
) -> Inputs:
    generator = torch.Generator().manual_seed(kw.get("seed", 0))
    batch, head_dim = kw.get("batch", 1), kw.get("head_dim", 8)
    shapes = [(mask.total_q, heads), (mask.total_k, key_heads), (mask.total_k, key_heads)]
    query, key, value = (torch.randn(batch, *s, head_dim, generator=generator, dtype=torch.float64) for s in shapes)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def run(inputs: Inputs, mask: IntervalMask, backend: str, **kw: Any) -> dict[str, Tensor]:
    """Output, lse and the gradients of a random function of both."""
    query, key, value = (x.detach().clone().requires_grad_() for x in inputs)
    output, lse = interval_attention(query, key, value, mask, backend=backend, return_lse=True, **kw)
    generator = torch.Generator().manual_seed(7)
    output_weight = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    lse_weight = torch.randn(lse.shape, generator=generator, dtype=torch.float64).to(lse.dtype)
    (output * output_weight).sum().add((lse * lse_weight)[lse.isfinite()].sum()).backward()
    assert query.grad is not None and key.grad is not None and value.grad is not None
    grads = {"query": query.grad, "key": key.grad, "value": value.grad}
    return {"output": output.detach(), "lse": lse.detach(), **grads}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=tolerance, atol=tolerance, check_dtype=False, msg=name)
