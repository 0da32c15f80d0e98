"""Experts as grouped products: on the CPU, where torch multiplies the groups one by one, against the fused loop."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLPSubmodules
from torch import Tensor

from llada_mega.models import build_model, grouped_experts, layer_spec
from llada_mega.models.config import build_transformer_config
from llada_mega.models.dispatch import DeviceDispatcher, LocalDispatcher
from llada_mega.models.experts import FusedExperts, Routes
from llada_mega.models.grouped_experts import GroupedExperts, can_group, device_routes
from llada_mega.models.layer_modules import local_modules
from llada_mega.parallel import ensure_single_process
from tests.models.helpers import assert_close, bdlm_inputs, moe_config

TOKENS, EXPERTS, TOP_K = 24, 16, 4
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
# torch 2.6 to 2.9 have no public grouped product; the loop is used there.
pytestmark = [
    pytest.mark.latest,
    pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped product"),
]


def routing_map() -> Tensor:
    """bool [T, E]: four experts a token, the first two and the last one never."""
    scores = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(2))
    scores[:, [0, 1, EXPERTS - 1]] = -1.0
    return torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter(1, scores.topk(TOP_K).indices, True)


def experts_of(grouped: bool, dtype: torch.dtype, device: str = "cpu") -> torch.nn.Module:
    groups = ensure_single_process()
    modules = local_modules(False, grouped)
    config = build_transformer_config(moe_config(), groups.config, dtype)
    submodules = MLPSubmodules(linear_fc1=modules.expert_column, linear_fc2=modules.expert_row)
    experts = modules.experts(EXPERTS, config, submodules, pg_collection=groups.collection)
    assert type(experts) is (GroupedExperts if grouped else FusedExperts)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return experts.to(device)


def run(experts: torch.nn.Module, dtype: torch.dtype, with_routes: bool, device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(TOKENS, moe_config().hidden_size, generator=generator).to(device, dtype).requires_grad_()
    shares = torch.rand(TOKENS * TOP_K, generator=generator).to(device).requires_grad_()
    chosen = routing_map().to(device)
    places, counts = chosen.t().flatten().nonzero().squeeze(1) % TOKENS, chosen.sum(dim=0)
    if not with_routes:
        sorted_output, _ = experts(tokens[places], counts, shares)
        output = torch.zeros_like(tokens).index_add(0, places, sorted_output)
    elif isinstance(experts, GroupedExperts):
        output, _ = experts(tokens, device_routes(chosen, TOP_K)[0], shares)
    else:
        output, _ = experts(tokens, Routes(counts.tolist(), places), shares)
    output.backward(torch.linspace(-1, 2, output.numel(), device=device).view(output.shape).to(dtype))
    found = {"output": output.detach(), "tokens": tokens.grad, "shares": shares.grad}
    return found | {name: parameter.grad for name, parameter in experts.named_parameters()}  # type: ignore[return-value]


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert_close(actual[name].float(), tensor.float(), tolerance, name)


@pytest.mark.parametrize("with_routes", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_gradients_are_those_of_the_loop(dtype: torch.dtype, with_routes: bool) -> None:
    expected = run(experts_of(False, dtype), dtype, with_routes)
    compare(run(experts_of(True, dtype), dtype, with_routes), expected, DTYPES[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("with_routes", [False, True])
def test_on_a_gpu(with_routes: bool) -> None:
    """Experts without a token too: their products have no inner dimension, and their gradients are zero."""
    expected = run(experts_of(False, torch.bfloat16, "cuda"), torch.bfloat16, with_routes, "cuda")
    compare(run(experts_of(True, torch.bfloat16, "cuda"), torch.bfloat16, with_routes, "cuda"), expected, 3e-2)


def test_weights_are_multiplied_where_they_lie_unless_somebody_moved_them() -> None:
    experts = experts_of(True, torch.float32)
    weights = [expert.linear_fc1.weight for expert in experts.local_experts]
    together = grouped_experts._stack(weights)
    assert torch.equal(together, torch.stack(weights))
    assert together.data_ptr() == weights[0].data_ptr()
    expected = run(experts, torch.float32, True)
    for parameter in experts.parameters():  # as the distributed optimizer does, one after the other, last first
        parameter.grad = None
    buffer = torch.empty(sum(parameter.numel() for parameter in experts.parameters()))
    end = buffer.numel()
    for parameter in experts.parameters():
        place = buffer[end - parameter.numel() : end].view_as(parameter)
        parameter.data = place.copy_(parameter.data)
        end -= parameter.numel()
    copied = grouped_experts._stack(weights)
    assert torch.equal(copied, torch.stack(weights))
    assert copied.data_ptr() not in {weight.data_ptr() for weight in weights}
    compare(run(experts, torch.float32, True), expected, 1e-6)


def test_routes_are_those_of_the_host() -> None:
    chosen = routing_map()
    routes, by_expert_N = device_routes(chosen, TOP_K)
    assert torch.equal(by_expert_N, chosen.t().flatten().nonzero().squeeze(1))
    counts = chosen.sum(dim=0).tolist()
    assert routes.ends_E.dtype == torch.int32
    assert routes.ends_E.tolist() == [sum(counts[: expert + 1]) for expert in range(EXPERTS)]
    experts_N = torch.repeat_interleave(torch.arange(EXPERTS), torch.tensor(counts))
    for token in range(TOKENS):
        mine = routes.order_TK[token]
        assert torch.equal(routes.token_N[mine], torch.full((TOP_K,), token))
        assert torch.equal(experts_N[mine], chosen[token].nonzero().squeeze(1))


def test_a_model_with_grouped_experts_is_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, gradients and names; the expert load is counted as before."""

    def losses(grouped: bool) -> tuple[Tensor, dict[str, Tensor]]:
        monkeypatch.setattr(layer_spec, "can_group", lambda config: grouped)
        model = build_model(moe_config(), seed=3)
        dispatchers = {type(m.token_dispatcher) for m in model.modules() if hasattr(m, "token_dispatcher")}
        assert dispatchers == {DeviceDispatcher if grouped else LocalDispatcher}
        ids, position, carrier, masked = bdlm_inputs(moe_config(), [20, 12], 4)
        rows = masked.nonzero()[:, 0]
        loss = model(ids, position, carrier, logit_rows_R=rows, labels_R=ids[0, rows + len(masked)]).loss_sum
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected_loss, expected = losses(False)
    loss, gradients = losses(True)
    assert_close(loss, expected_loss, 1e-6, "loss")
    compare(gradients, expected, 1e-5)


@pytest.mark.parametrize(
    ("capability", "dtype", "ffn", "usable"),
    [
        ((9, 0), torch.bfloat16, 64, True),
        ((8, 0), torch.bfloat16, 24, True),
        ((7, 5), torch.bfloat16, 64, False),
        ((9, 0), torch.float32, 64, False),
        ((9, 0), torch.bfloat16, 20, False),  # rows of 40 bytes
        (None, torch.bfloat16, 64, False),
    ],
)
def test_where_experts_are_grouped(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, dtype: torch.dtype, ffn: int, usable: bool
) -> None:
    config = build_transformer_config(moe_config(), ensure_single_process().config, torch.float32)
    config.params_dtype, config.moe_ffn_hidden_size = dtype, ffn
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", functools.partial(tuple, capability or ()))
    assert can_group(config) is usable
