"""Qwen3-MoE against transformers' own: routing, logits and gradients, through the files that it saves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from llada_kernels import IntervalMask
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llada_mega.checkpoint.hf_config import parse_config, render_config
from llada_mega.config.count import active_parameters, total_parameters
from llada_mega.config.model import ModelConfig
from llada_mega.config.run import ParallelConfig
from llada_mega.errors import ConfigError
from llada_mega.models import BlockDiffusionModel, build_model, load_tensors, mask_carrier, update_expert_bias
from llada_mega.models.config import check_model
from llada_mega.models.hf_mapping import hf_shapes, hf_to_local, local_to_hf
from llada_mega.models.router import routers
from tests.models.helpers import assert_close, bdlm_inputs, dense_config, hf_gradients, moe_config, random_ids

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.latest

EXPERTS, TOP_K, LAYERS, VOCABULARY = 8, 3, 3, 150
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=[[], [0]], ids=["all layers sparse", "first layer dense"])
def theirs(request: pytest.FixtureRequest) -> Any:
    """A random model of transformers; every tensor is away from its initial value."""
    fields: dict[str, Any] = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "moe_intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": True,
        "mlp_only_layers": request.param,
        "decoder_sparse_step": 1,
        "rope_theta": 5000.0,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model.eval()


@pytest.fixture(scope="module")
def saved(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What transformers writes: its config.json, and one tensor for each matrix of each expert."""
    directory = tmp_path_factory.mktemp("qwen3_moe")
    theirs.save_pretrained(directory)
    return directory


def saved_config(directory: Path) -> ModelConfig:
    return parse_config(json.loads((directory / "config.json").read_text()), "config.json")


def load(directory: Path) -> BlockDiffusionModel:
    config = saved_config(directory)
    ours = build_model(config, seed=None).eval()
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == hf_shapes(config)  # noqa: SIM118
        load_tensors(ours, hf_to_local(config, file.get_tensor))
    return ours


def causal_logits(ours: BlockDiffusionModel, ids: Tensor, *lengths: int) -> Tensor:
    """[S, V] of documents packed into one causal sequence."""
    position = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        return ours(ids, position, mask_carrier.pack(IntervalMask.causal(list(lengths))))


@torch.no_grad()
def their_logits(theirs: Any, ids: Tensor) -> Tensor:
    return theirs(ids).logits[0]


def test_logits_equal_transformers(theirs: Any, saved: Path) -> None:
    ids = random_ids(dense_config(), 40)
    actual, expected = causal_logits(load(saved), ids, 40), their_logits(theirs, ids)
    assert actual.shape == expected.shape
    assert_close(actual, expected, TOLERANCE)


def test_packed_documents_equal_separate_documents(theirs: Any, saved: Path) -> None:
    ids = random_ids(dense_config(), 25)
    expected = torch.cat([their_logits(theirs, ids[:, :9]), their_logits(theirs, ids[:, 9:])])
    assert_close(causal_logits(load(saved), ids, 9, 16), expected, TOLERANCE)


def test_routing_equals_transformers(theirs: Any, saved: Path) -> None:
    """The experts that every token goes to, and with which weight: softmax over all, the best, renormalised."""
    ours, ids = load(saved), random_ids(dense_config(), 40)
    seen: list[tuple[Tensor, Tensor]] = []
    for router in routers(ours):
        router.register_forward_hook(lambda module, arguments, output: seen.append(output))
    causal_logits(ours, ids, 40)
    with torch.no_grad():
        logits = theirs(ids, output_router_logits=True).router_logits
    assert len(seen) == len(logits) == LAYERS - len(theirs.config.mlp_only_layers)
    for (weight_TE, chosen_TE), logit_TE in zip(seen, logits, strict=True):
        score_TE = torch.softmax(logit_TE, dim=-1)
        best_TK = score_TE.topk(TOP_K, dim=-1).indices
        expected_TE = torch.zeros_like(score_TE).scatter(1, best_TK, score_TE.gather(1, best_TK))
        assert torch.equal(chosen_TE, expected_TE > 0)
        assert_close(weight_TE, expected_TE / expected_TE.sum(-1, keepdim=True), TOLERANCE)


def test_gradients_equal_transformers(theirs: Any, saved: Path) -> None:
    ours, ids = load(saved), random_ids(dense_config(), 30)
    labels, carrier = ids[0].roll(-1), mask_carrier.pack(IntervalMask.causal([30]))
    theirs.zero_grad()
    F.cross_entropy(theirs(ids).logits[0], labels, reduction="sum").backward()
    ours(ids, torch.arange(30)[None], carrier, logit_rows_R=torch.arange(30), labels_R=labels).loss_sum.backward()

    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, actual in hf_gradients(ours).items():
        layer, is_expert, rest = name.partition(".mlp.experts.")
        if name in expected:
            gradient = expected[name]
        else:  # transformers 5 has one parameter for all experts
            assert is_expert, name
            expert, matrix, _ = rest.split(".")
            if matrix == "down_proj":
                gradient = expected[f"{layer}.mlp.experts.down_proj"][int(expert)]
            else:
                gate, up = expected[f"{layer}.mlp.experts.gate_up_proj"][int(expert)].chunk(2)
                gradient = gate if matrix == "gate_proj" else up
        assert_close(actual, gradient, TOLERANCE, name)


def test_transformers_loads_what_is_exported(theirs: Any, saved: Path, tmp_path: Path) -> None:
    ours, ids = load(saved), random_ids(dense_config(), 20)
    config = ours.model_config
    tensors = {}
    for name, tensor in local_to_hf(config, {name: t for name, t in ours.state_dict().items() if t is not None}):
        is_vocabulary = "embed_tokens" in name or "lm_head" in name
        tensors[name] = (tensor[:VOCABULARY] if is_vocabulary else tensor).detach().contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(render_config(config, torch.float32, None)))
    again, report = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_close(their_logits(again, ids), their_logits(theirs, ids), TOLERANCE)


def test_parameters_are_counted(theirs: Any, saved: Path) -> None:
    config = saved_config(saved)
    assert total_parameters(config) == sum(parameter.numel() for parameter in theirs.parameters())
    unused = 3 * 48 * 24 * (EXPERTS - TOP_K) * (LAYERS - config.moe.first_dense_layers)
    assert active_parameters(config) == total_parameters(config) - unused


def test_there_is_no_bias_but_a_load(saved: Path) -> None:
    model = build_model(saved_config(saved))
    assert not [name for name in [*model.state_dict(), *model.sharded_state_dict()] if "expert_bias" in name]
    ids, position, carrier, _ = bdlm_inputs(model.model_config, [10, 6], 4)
    before = [router.weight.clone() for router in routers(model)]
    model(ids, position, carrier).sum().backward()
    load_LE = update_expert_bias(model)
    assert load_LE is not None
    assert load_LE.sum(dim=1).tolist() == [ids.numel() * TOP_K] * len(before)
    for router, weight in zip(routers(model), before, strict=True):
        assert router.expert_bias is None
        assert torch.equal(router.weight, weight)
        assert not router.local_tokens_per_expert.any()


QWEN3 = {
    "architecture": "qwen3_moe",
    "num_groups": 1,
    "group_top_k": 1,
    "shared_expert_ffn_hidden_size": 0,
    "routed_scaling_factor": 1.0,
    "score_function": "softmax",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_function": "tanh"}, r"model\.moe\.score_function=tanh is not a choice; use sigmoid or softmax"),
        ({"architecture": "llada2_moe"}, r"score_function=softmax does not fit .*=llada2_moe; use sigmoid"),
        ({"score_function": "sigmoid"}, r"score_function=sigmoid does not fit .*=qwen3_moe; use softmax"),
        ({"num_groups": 4}, r"model\.moe\.num_groups=4 does not go with model\.moe\.score_function=softmax; use 1"),
        ({"shared_expert_ffn_hidden_size": 40}, r"shared_expert_ffn_hidden_size=40 does not go with .*; use 0"),
        ({"routed_scaling_factor": 2.5}, r"routed_scaling_factor=2\.5 does not go with .*; use 1\.0"),
        ({"top_k": 1}, r"model\.moe\.top_k=1 leaves a softmax router without a gradient; use 2 or more"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    fields = QWEN3 | changes
    config = moe_config(architecture=fields.pop("architecture"), rotary_percent=1.0)
    config.moe = replace(config.moe, **fields)
    with pytest.raises(ConfigError, match=message) as caught:
        check_model(config, ParallelConfig())
    assert "\n" not in str(caught.value)
