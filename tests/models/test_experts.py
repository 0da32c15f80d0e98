"""The fused modules of the local layers against Megatron's and PyTorch's own: outputs, gradients, hooks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from llada_mega.models import build_model
from llada_mega.models.config import build_transformer_config
from llada_mega.models.dispatch import LocalDispatcher
from llada_mega.models.experts import FusedExperts, Routes
from llada_mega.models.layer_modules import local_modules
from llada_mega.models.norm import RMSNorm
from llada_mega.models.rotary import rotary_angles, rotary_factors, rotate
from llada_mega.parallel import ensure_single_process
from tests.models.helpers import assert_close, moe_config

pytestmark = pytest.mark.latest
COUNTS = [5, 0, 9, 1, 0, 0, 30, 2, 0, 4, 4, 0, 3, 1, 0, 1]  # of 16 experts, some of them without a token
DTYPES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}


def experts_of(kind: str, dtype: torch.dtype) -> torch.nn.Module:
    """Experts with the same random weights, fused or Megatron's."""
    groups = ensure_single_process()
    modules = local_modules(fused_weight_gradients=kind == "megatron")
    config = build_transformer_config(moe_config(), groups.config, dtype)
    config.use_te_activation_func = False  # Megatron's own SwiGLU
    submodules = MLPSubmodules(linear_fc1=modules.expert_column, linear_fc2=modules.expert_row)
    experts = modules.experts(len(COUNTS), config, submodules, pg_collection=groups.collection)
    assert type(experts) is (SequentialMLP if kind == "megatron" else FusedExperts)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return experts


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [10, H], shares [N] of fp32 at least, the token of each route [N]."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(10, moe_config().hidden_size, generator=generator).to(dtype).requires_grad_()
    shares = torch.rand(sum(COUNTS), generator=generator).to(torch.promote_types(dtype, torch.float32))
    return tokens, shares.requires_grad_(), torch.randint(10, (sum(COUNTS),), generator=generator)


def run(kind: str, dtype: torch.dtype, with_routes: bool = False) -> dict[str, Tensor]:
    """Summed outputs of a token's experts, and all gradients."""
    experts = experts_of(kind, dtype)
    tokens, shares, token_N = inputs(dtype)
    if with_routes:
        output, bias = experts(tokens, Routes(COUNTS, token_N), shares)
    else:
        sorted_output, bias = experts(tokens[token_N], torch.tensor(COUNTS), shares)
        output = torch.zeros_like(tokens).index_add(0, token_N, sorted_output)
    assert bias is None
    output.backward(torch.linspace(-1, 2, output.numel()).view(output.shape).to(dtype))
    found = {"output": output.detach(), "tokens": tokens.grad, "shares": shares.grad}
    found |= {name: parameter.grad for name, parameter in experts.named_parameters()}
    assert all(tensor is not None for tensor in found.values())
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("group_routes", [1, 12, 1024])
@pytest.mark.parametrize("with_routes", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_gradients_are_those_of_megatrons_experts(
    dtype: torch.dtype, with_routes: bool, group_routes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llada_mega.models.experts.GROUP_ROUTES", group_routes)
    expected, actual = run("megatron", dtype), run("fused", dtype, with_routes)
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert_close(actual[name], tensor, DTYPES[dtype], name)


def test_hooks_that_wait_for_a_parameter_run() -> None:
    """Overlapped all-gather of the distributed optimizer: Megatron waits in forward pre-hooks."""
    experts = experts_of("fused", torch.float32)
    called = []
    for name, module in experts.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda module, args, name=name: called.append(name))
    tokens, shares, token_N = inputs(torch.float32)
    experts(tokens, Routes(COUNTS, token_N), shares)
    assert len(called) == len(set(called)) == 2 * len(COUNTS)


def test_one_rank_sends_nothing() -> None:
    layers = [module for module in build_model(moe_config()).modules() if hasattr(module, "token_dispatcher")]
    assert layers and all(isinstance(layer.token_dispatcher, LocalDispatcher) for layer in layers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_norm_is_pytorchs(dtype: torch.dtype) -> None:
    norm = RMSNorm(build_transformer_config(moe_config(), ensure_single_process().config, dtype), 8)
    whole = torch.randn(5, 1, 3, 20, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        norm.weight.normal_()
    grad = torch.randn(5, 1, 3, 8, dtype=dtype)
    hidden = whole[..., 4:12]  # strided, as key heads are
    actual = [norm(hidden), *torch.autograd.grad(norm(hidden), [whole, norm.weight], grad)]
    reference = F.rms_norm(hidden, (8,), norm.weight, norm.eps)
    expected = [reference, *torch.autograd.grad(reference, [whole, norm.weight], grad)]
    for got, wanted in zip(actual, expected, strict=True):
        assert_close(got, wanted, 1e-14 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("rotary_percent", [0.5, 1.0])
def test_rotation_is_megatrons(rotary_percent: float) -> None:
    config = moe_config(rotary_percent=rotary_percent)
    position = torch.randint(0, 5000, (1, 7))
    heads = torch.randn(7, 1, 3, config.head_dim, dtype=torch.float64, requires_grad=True)
    actual = rotate(heads, rotary_factors(position, config, torch.float64))
    expected = _apply_rotary_pos_emb_bshd(heads, rotary_angles(position, config, torch.float64))
    assert_close(actual, expected, 1e-14)
    grad = torch.randn_like(heads)
    (got,), (wanted,) = (torch.autograd.grad(output, heads, grad) for output in (actual, expected))
    assert_close(got, wanted, 1e-14)
