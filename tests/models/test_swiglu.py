"""SwiGLU against autograd through the formula, and what it keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llada_mega.models import build_model
from llada_mega.models.config import build_transformer_config
from llada_mega.models.swiglu import SwiGLU
from llada_mega.parallel import ensure_single_process
from tests.models.helpers import moe_config

pytestmark = pytest.mark.latest


def swiglu() -> SwiGLU:
    return SwiGLU(build_transformer_config(moe_config(), ensure_single_process().config, torch.float64))


@pytest.mark.parametrize("contiguous", [True, False])
def test_output_and_gradient_are_those_of_the_formula(contiguous: bool) -> None:
    inner = torch.randn(3, 4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inner = inner if contiguous else inner.transpose(0, 1)
    ours, theirs = inner.clone().requires_grad_(), inner.clone().requires_grad_()
    gate, up = theirs.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    grad = torch.linspace(-1, 2, expected.numel(), dtype=torch.float64).view_as(expected)
    actual = swiglu()(ours)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-15)
    actual.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-14)


def test_dense_and_shared_networks_use_it_and_it_keeps_its_input_alone() -> None:
    model = build_model(moe_config(), seed=0)
    users = [name for name, module in model.named_modules() if isinstance(module, SwiGLU) and ".experts." not in name]
    assert len(users) == moe_config().num_layers
    inner = torch.randn(6, 10, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        swiglu()(inner * 1)
    assert [tuple(x.shape) for x in kept if x.numel() > 1] == [(6, 10)]
