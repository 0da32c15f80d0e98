"""config.json of Ling 2.0, LLaDA2 and Qwen3-MoE: nothing guessed, nothing lost."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_mega.checkpoint.hf_config import parse_config, render_config, render_generation_config
from llada_mega.config.compose import compose
from llada_mega.config.model import ModelConfig, MoEConfig
from llada_mega.config.schema import Config
from llada_mega.errors import CheckpointError
from tests.models.helpers import moe_config

# Every field that the published training config.json of LLaDA2.0-flash has, with the values of the published model.
LLADA2: dict[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
        "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
        "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
    },
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 9216,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 16384,
    "model_type": "llada2_moe",
    "moe_intermediate_size": 1024,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "norm_head": False,
    "num_attention_heads": 32,
    "num_experts": 256,
    "num_key_value_heads": 4,
    "rope_theta": 600000,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_rmsnorm": True,
    "rms_norm_eps": 1e-06,
    "head_dim": 128,
    "num_shared_experts": 1,
    "use_cache": True,
    "use_qkv_bias": False,
    "embedding_dropout": 0.0,
    "norm_softmax": False,
    "output_dropout": 0.0,
    "vocab_size": 157184,
    "rotary_dim": 64,
    "using_split_qkv_in_self_attention": False,
    "router_dtype": "fp32",
    "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "score_function": "sigmoid",
    "initializer_range": 0.02,
    "max_window_layers": 28,
    "output_router_logits": False,
    "pad_token_id": 156892,
    "partial_rotary_factor": 0.5,
    "use_sliding_window": False,
}
LING = LLADA2 | {
    "model_type": "bailing_moe_v2",
    "architectures": ["BailingMoeV2ForCausalLM"],
    "num_nextn_predict_layers": 1,
    "moe_shared_expert_intermediate_size": 1024,
    "use_qk_norm": True,
    "eos_token_id": 156892,
}
QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "use_sliding_window": False,
    "sliding_window": None,
}


def without(content: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in names}


def published(name: str) -> ModelConfig:
    return compose(Config, [f"model={name}"]).model


def qwen3_moe(**changes: Any) -> ModelConfig:
    return dataclasses.replace(parse_config(QWEN3_MOE, "config.json"), **changes)


@pytest.mark.parametrize("content", [LLADA2, LLADA2 | {"model_type": "llada2_moe_veomni"}, LING])
def test_ling_and_llada2_are_one_model(content: dict[str, Any]) -> None:
    """The published shape, but for MASK (and EOS), which the published file does not name."""
    expected = dataclasses.replace(
        published("ling_flash"), mask_token_id=None, eos_token_id=content.get("eos_token_id")
    )
    assert parse_config(content, "config.json") == expected


def test_qwen3_moe_routes_by_softmax_without_groups_bias_and_shared_expert() -> None:
    config = parse_config(QWEN3_MOE, "config.json")
    assert (config.architecture, config.qk_norm, config.qkv_bias, config.rotary_percent) == (
        "qwen3_moe",
        True,
        False,
        1.0,
    )
    expected = MoEConfig(8, 3, 1, 1, 24, 0, first_dense_layers=1, score_function="softmax", routed_scaling_factor=1.0)
    assert config.moe == expected


def test_qwen3_moe_as_transformers_5_writes_it() -> None:
    content = without(QWEN3_MOE, "rope_theta", "num_experts")
    content |= {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "num_local_experts": 8}
    assert parse_config(content, "config.json") == parse_config(QWEN3_MOE, "config.json")


LLADA2_REQUIRED = [
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta"),
    *("rms_norm_eps", "tie_word_embeddings", "num_experts", "num_experts_per_tok", "n_group", "topk_group"),
    *("num_shared_experts", "first_k_dense_replace", "routed_scaling_factor", "hidden_act"),
]
QWEN3_REQUIRED = [
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta"),
    *("rms_norm_eps", "tie_word_embeddings", "num_experts", "num_experts_per_tok", "hidden_act"),
    *("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"),
]


@pytest.mark.parametrize(
    ("content", "field"),
    [(content, field) for content in (LLADA2, LING) for field in LLADA2_REQUIRED]
    + [(QWEN3_MOE, field) for field in QWEN3_REQUIRED],
)
def test_a_missing_field_is_named(content: dict[str, Any], field: str) -> None:
    content = without(content, "moe_shared_expert_intermediate_size", field)
    with pytest.raises(CheckpointError, match=rf"config\.json: {field} is missing"):
        parse_config(content, "config.json")


@pytest.mark.parametrize("field", ["partial_rotary_factor", "rotary_dim"])
def test_either_field_states_the_rotary_share(field: str) -> None:
    assert parse_config(without(LLADA2, field), "config.json").rotary_percent == 0.5


def test_the_rotary_share_may_be_nested_and_must_be_stated() -> None:
    content = without(LLADA2, "partial_rotary_factor", "rotary_dim", "rope_theta")
    nested = {"rope_parameters": {"rope_type": "default", "rope_theta": 6e5, "partial_rotary_factor": 0.5}}
    assert parse_config(content | nested, "config.json") == parse_config(LLADA2, "config.json")
    with pytest.raises(CheckpointError, match="partial_rotary_factor is missing"):
        parse_config(content | {"rope_theta": 6e5}, "config.json")


@pytest.mark.parametrize(
    ("base", "changes", "named"),
    [
        (LLADA2, {"architectures": ["BailingMoeV2ForCausalLM"]}, "contradicts model_type='llada2_moe'"),
        (LING, {"architectures": ["LLaDA2MoeModelLM"]}, "contradicts model_type='bailing_moe_v2'"),
        (LLADA2, {"rotary_dim": 32}, "partial_rotary_factor=0.5 contradicts rotary_dim / head_dim=32 / 128=0.25"),
        (LLADA2, {"partial_rotary_factor": 0.0, "rotary_dim": None}, "partial_rotary_factor=0.0 of head_dim=128"),
        (LLADA2, {"partial_rotary_factor": 1.5, "rotary_dim": None}, "partial_rotary_factor=1.5 of head_dim=128"),
        (LING, {"moe_shared_expert_intermediate_size": 512}, "moe_shared_expert_intermediate_size=512 contradicts"),
        (LLADA2, {"n_group": 7}, "n_group=7 does not divide num_experts=256"),
        (LLADA2, {"topk_group": 9}, "topk_group=9 exceeds n_group=8"),
        (LLADA2, {"num_experts_per_tok": 6}, "num_experts_per_tok=6 is not 2 x topk_group=4"),
        (LLADA2, {"num_experts_per_tok": 200}, "num_experts_per_tok=200 exceeds"),
        (LLADA2, {"first_k_dense_replace": 32}, "first_k_dense_replace=32 leaves no layer"),
        (LLADA2, {"first_k_dense_replace": -1}, "first_k_dense_replace=-1 must be 0 or more"),
        (LLADA2, {"num_key_value_heads": 0}, "num_key_value_heads=0 must be 1 or more"),
        (LLADA2, {"routed_scaling_factor": 0}, "routed_scaling_factor=0.0 must be positive"),
        (LLADA2, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (LLADA2, {"use_bias": True}, "use_bias=True"),
        (LLADA2, {"use_qkv_bias": True}, "use_qkv_bias=True"),
        (LLADA2, {"norm_head": True}, "norm_head=True"),
        (LLADA2, {"norm_softmax": True}, "norm_softmax=True"),
        (LLADA2, {"use_rmsnorm": False}, "use_rmsnorm=False"),
        (LLADA2, {"score_function": "softmax"}, "score_function='softmax'"),
        (LLADA2, {"norm_topk_prob": False}, "norm_topk_prob=False"),
        (LLADA2, {"moe_router_enable_expert_bias": False}, "moe_router_enable_expert_bias=False"),
        (LLADA2, {"use_qk_norm": False}, "use_qk_norm=False"),
        (LLADA2, {"use_sliding_window": True}, "use_sliding_window=True"),
        (LLADA2, {"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling.type='yarn'"),
        (LLADA2, {"rope_scaling": {"type": "default", "rope_theta": 1e4}}, "contradicts rope_scaling.rope_theta=10000"),
        (LLADA2, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (LLADA2, {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        (LLADA2, {"embedding_dropout": 0.1}, "embedding_dropout=0.1"),
        (LLADA2, {"output_dropout": 0.1}, "output_dropout=0.1"),
        (LLADA2, {"using_split_qkv_in_self_attention": True}, "using_split_qkv_in_self_attention=True"),
        (LLADA2, {"router_dtype": "bf16"}, "router_dtype='bf16'"),
        (QWEN3_MOE, {"norm_topk_prob": False}, "norm_topk_prob=False"),
        (QWEN3_MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        (QWEN3_MOE, {"mlp_only_layers": [1]}, "mlp_only_layers=[1]"),
        (QWEN3_MOE, {"mlp_only_layers": [0, 1, 2]}, "leaves no layer of num_hidden_layers=3"),
        (QWEN3_MOE, {"num_local_experts": 4}, "num_experts=8 contradicts num_local_experts=4"),
        (QWEN3_MOE, {"num_experts_per_tok": 9}, "num_experts_per_tok=9 exceeds num_experts=8"),
        (QWEN3_MOE, {"attention_bias": True}, "attention_bias=True"),
        (QWEN3_MOE, {"use_sliding_window": True}, "use_sliding_window=True"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(base: dict[str, Any], changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_config(base | changes, "config.json")
    assert str(caught.value).startswith("config.json: ") and named in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [published("ling_mini"), published("ling_flash"), published("tiny_ling"), qwen3_moe(), qwen3_moe(mask_token_id=7)],
    ids=["mini", "flash", "tiny_ling", "qwen3_moe", "qwen3_moe-mask"],
)
def test_rendering_and_parsing_give_the_same_model(config: ModelConfig) -> None:
    rendered = render_config(config, torch.bfloat16, block_size=32)
    assert parse_config(rendered, "again") == config
    assert rendered["block_size"] == 32
    assert rendered.get("mask_token_id") == config.mask_token_id


def test_llada2_is_written_as_it_is_published() -> None:
    """Every published field, with the published value; ours are what decoding needs, and the form of the experts."""
    config = published("ling_flash")
    rendered = render_config(config, torch.bfloat16, block_size=32)
    differing = {name for name in LLADA2 if rendered[name] != LLADA2[name]}
    assert differing == {"max_window_layers"}  # of sliding windows, which are off
    added = {"dtype", "use_qk_norm", "mask_token_id", "eos_token_id", "block_size"}
    assert set(rendered) - set(LLADA2) == added
    assert rendered["use_qk_norm"] is True
    assert (rendered["mask_token_id"], rendered["pad_token_id"], rendered["eos_token_id"]) == (156895, 156892, 156892)
    stacked = render_config(config, torch.bfloat16, 32, stacked_experts=True)
    assert stacked == rendered | {"model_type": "llada2_moe_veomni"}
    assert parse_config(stacked, "again") == config


def test_a_model_without_pad_says_so() -> None:
    """The class default is an id of the published vocabulary, which a smaller embedding does not have."""
    config = dataclasses.replace(published("tiny_ling"), pad_token_id=None)
    rendered = render_config(config, torch.float32, None)
    assert "pad_token_id" in rendered and rendered["pad_token_id"] is None
    assert parse_config(rendered, "again") == config


def test_a_shared_expert_is_as_wide_as_whole_experts() -> None:
    with pytest.raises(CheckpointError, match=r"model\.moe\.shared_expert_ffn_hidden_size=40 cannot be exported"):
        render_config(moe_config(), torch.float32, None)


def test_training_settings_are_no_reason_to_refuse() -> None:
    config = published("tiny_ling")
    config.attention_backend, config.implementation, config.moe.bias_update_rate = "cpu", "local", 0.5
    assert parse_config(render_config(config, torch.float32, None), "again").moe.num_experts == 16


def test_decoding_defaults_of_llada2() -> None:
    content = render_generation_config(published("ling_mini"), block_size=None)
    assert content == {
        "do_sample": False,
        "pad_token_id": 156892,
        "eos_token_id": 156892,
        "block_length": 32,
        "steps": 32,
        "threshold": 0.95,
        "mask_id": 156895,
        "eos_id": 156892,
    }
    assert render_generation_config(published("ling_mini"), block_size=8)["block_length"] == 8
    assert render_generation_config(qwen3_moe(), block_size=8) == {"do_sample": False}


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Any MoE model that a checkpoint could hold."""
    groups = draw(st.sampled_from([1, 2, 4]))
    is_llada2 = draw(st.booleans())
    top_groups = draw(st.integers(1, groups))
    width, layers = draw(st.integers(1, 64)), draw(st.integers(1, 6))
    heads = draw(st.integers(1, 4))
    moe = MoEConfig(
        num_experts=groups * draw(st.integers(2, 8)),
        top_k=2 * top_groups,
        num_groups=groups if is_llada2 else 1,
        group_top_k=top_groups if is_llada2 else 1,
        expert_ffn_hidden_size=width,
        shared_expert_ffn_hidden_size=width * draw(st.integers(0, 3)) if is_llada2 else 0,
        first_dense_layers=draw(st.integers(0, layers - 1)),
        score_function="sigmoid" if is_llada2 else "softmax",
        routed_scaling_factor=draw(st.floats(0.1, 9)) if is_llada2 else 1.0,
    )
    token = st.none() | st.integers(0, 99)
    return ModelConfig(
        architecture="llada2_moe" if is_llada2 else "qwen3_moe",
        num_layers=layers,
        hidden_size=draw(st.integers(1, 300)),
        num_attention_heads=heads * draw(st.integers(1, 4)),
        num_query_groups=heads,
        head_dim=4 * draw(st.integers(1, 32)),
        ffn_hidden_size=draw(st.integers(1, 300)),
        vocab_size=100,
        max_position_embeddings=draw(st.integers(1, 10**6)),
        rope_theta=draw(st.floats(1, 1e7)),
        rotary_percent=draw(st.sampled_from([0.5, 1.0])) if is_llada2 else 1.0,
        norm_eps=draw(st.floats(1e-8, 1e-4)),
        qk_norm=True,
        tie_embeddings=draw(st.booleans()),
        init_std=draw(st.floats(1e-3, 1)),
        mask_token_id=draw(token),
        pad_token_id=draw(token),
        eos_token_id=draw(token),
        bos_token_id=draw(token),
        moe=moe,
    )


@settings(max_examples=200, deadline=None)
@given(models(), st.booleans())
def test_any_mixture_survives_the_round_trip(config: ModelConfig, stacked: bool) -> None:
    stacked = stacked and config.architecture == "llada2_moe"
    rendered = render_config(config, torch.float32, None, stacked_experts=stacked)
    assert parse_config(rendered, "again") == config
