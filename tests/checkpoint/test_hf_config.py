"""config.json is read strictly and written so that transformers understands it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llada_mega.checkpoint.hf_config import parse_config, render_config
from llada_mega.config.model import ModelConfig, MoEConfig
from llada_mega.errors import CheckpointError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
QWEN3 = LLAMA | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16, "attention_bias": False}
QWEN2 = LLAMA | {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "sliding_window": 4096,
    "use_sliding_window": False,
}


def test_families_differ_in_norms_biases_and_head_size() -> None:
    llama, qwen2, qwen3 = (parse_config(content, "config.json") for content in (LLAMA, QWEN2, QWEN3))
    assert (llama.head_dim, llama.qk_norm, llama.qkv_bias) == (8, False, False)
    assert (qwen2.head_dim, qwen2.qk_norm, qwen2.qkv_bias) == (8, False, True)
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.qkv_bias) == (16, True, False)
    assert llama.rope_theta == 10000.0 and llama.tie_embeddings and llama.eos_token_id == 2
    assert llama.bos_token_id is None and llama.mask_token_id is None


def test_rope_theta_as_transformers_5_writes_it() -> None:
    content = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    content["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    assert parse_config(content, "config.json").rope_theta == 5e5


def test_the_first_of_several_eos_ids_counts() -> None:
    assert parse_config(LLAMA | {"eos_token_id": [7, 8]}, "config.json").eos_token_id == 7


@pytest.mark.parametrize(
    "field",
    [
        *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta"),
        "tie_word_embeddings",
    ],
)
def test_a_missing_field_is_named(field: str) -> None:
    content = {key: value for key, value in LLAMA.items() if key != field}
    with pytest.raises(CheckpointError, match=rf"config\.json: {field} is missing"):
        parse_config(content, "config.json")


def test_qwen3_must_give_its_head_size() -> None:
    content = {key: value for key, value in QWEN3.items() if key != "head_dim"}
    with pytest.raises(CheckpointError, match="head_dim is missing"):
        parse_config(content, "config.json")


@pytest.mark.parametrize(
    ("base", "changes", "named"),
    [
        (LLAMA, {"model_type": "gpt2"}, "model_type='gpt2'"),
        (LLAMA, {"architectures": ["MistralForCausalLM"]}, "architectures"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (LLAMA, {"attention_bias": True}, "attention_bias=True"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias=True"),
        (LLAMA, {"sliding_window": 4096}, "sliding_window=4096"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.rope_type='llama3'"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type='linear'"),
        (LLAMA, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000}}, "rope_parameters.rope_type='yarn'"),
        (LLAMA, {"rope_parameters": {"rope_theta": 5.0}}, "contradicts rope_parameters.rope_theta=5.0"),
        (LLAMA, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA, {"num_key_value_heads": 4}, "num_key_value_heads=4 does not divide num_attention_heads=6"),
        (LLAMA, {"hidden_size": 50}, "hidden_size=50"),
        (LLAMA, {"hidden_size": "48"}, "hidden_size='48' must be of type int"),
        (LLAMA, {"num_hidden_layers": True}, "num_hidden_layers=True"),
        (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers=0 must be 1 or more"),
        (LLAMA, {"head_dim": 7}, "head_dim=7 must be even"),
        (LLAMA, {"eos_token_id": 320}, "eos_token_id=320 is outside vocab_size=320"),
        (LLAMA, {"mask_token_id": "<mask>"}, "mask_token_id='<mask>'"),
        (QWEN2, {"use_sliding_window": True}, "use_sliding_window=True"),
        (QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        (QWEN2, {"head_dim": 16}, "head_dim=16 contradicts"),
        (QWEN2, {"attention_bias": "yes"}, "attention_bias='yes'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(base: dict[str, Any], changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_config(base | changes, "config.json")
    assert str(caught.value).startswith("config.json: ") and named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [LLAMA, QWEN2, QWEN3])
def test_rendering_and_parsing_give_the_same_model(content: dict[str, Any]) -> None:
    config = parse_config(content | {"mask_token_id": 319, "pad_token_id": 2}, "config.json")
    rendered = render_config(config, torch.bfloat16, block_size=8)
    assert parse_config(rendered, "again") == config
    assert (rendered["block_size"], rendered["mask_token_id"], rendered["dtype"]) == (8, 319, "bfloat16")
    assert "block_size" not in render_config(config, torch.float32, None)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (ModelConfig(architecture="llama", qk_norm=True), "model.qk_norm=True"),
        (ModelConfig(architecture="qwen2"), "model.qkv_bias=False"),
        (ModelConfig(architecture="llama", rotary_percent=0.5), "model.rotary_percent=0.5"),
        (ModelConfig(architecture="llama", moe=MoEConfig(num_experts=8)), "model.moe.num_experts=8"),
        (ModelConfig(architecture="gpt2"), "model.architecture=gpt2"),
        (ModelConfig(architecture="qwen2", qkv_bias=True, head_dim=32), "model.head_dim=32"),
    ],
)
def test_a_model_that_its_family_cannot_express_is_not_exported(config: ModelConfig, named: str) -> None:
    with pytest.raises(CheckpointError, match=named) as caught:
        render_config(config, torch.float32, None)
    assert "\n" not in str(caught.value)


def test_only_llada2_has_a_form_with_stacked_experts() -> None:
    with pytest.raises(CheckpointError, match="model.architecture=llama has no form with stacked experts"):
        render_config(ModelConfig(), torch.float32, None, stacked_experts=True)
