"""``config.json`` of Hugging Face directories <-> :class:`ModelConfig`.

Llama, Qwen2 and Qwen3 are here, the mixtures of experts in :mod:`llada_mega.checkpoint.hf_config_moe`. What is written
is read again before it leaves: a model that its family's file cannot express is refused, not bent.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from llada_mega.checkpoint.hf_config_moe import (
    LLADA2_CLASSES,
    llada2_content,
    parse_llada2,
    qwen3_experts,
    qwen3_experts_content,
)
from llada_mega.checkpoint.hf_fields import TOKEN_IDS, Fields, common_shape, family_class
from llada_mega.config.model import ModelConfig, MoEConfig
from llada_mega.errors import CheckpointError

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    **LLADA2_CLASSES,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EXPORTED = ("llama", "qwen2", "qwen3", "qwen3_moe", "llada2_moe")
# Keys of ModelConfig that say how a model is run or trained, not what it is.
_HOW_NOT_WHAT = {"model.attention_backend", "model.implementation", "model.moe.bias_update_rate"}


def parse_config(content: dict[str, Any], location: str) -> ModelConfig:
    """Shape of the model that a parsed ``config.json`` describes.

    Args:
        content: the parsed file.
        location: its name in error messages.
    Raises:
        CheckpointError: a field is missing, has the wrong type, contradicts another one, or asks for something that is
            not supported here (rotary scaling, sliding windows, other biases, quantised weights, other families).
    """
    fields = Fields(content, location)
    family = family_class(fields, CLASSES)
    if family in LLADA2_CLASSES:
        return parse_llada2(fields)
    _refuse_unsupported(fields, family)
    common = common_shape(fields)
    return ModelConfig(
        architecture=family,
        head_dim=_head_dim(fields, family, common["hidden_size"], common["num_attention_heads"]),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        qkv_bias=family == "qwen2",
        moe=qwen3_experts(fields, common["num_layers"]) if family == "qwen3_moe" else MoEConfig(),
        **common,
    )


def _refuse_unsupported(fields: Fields, family: str) -> None:
    fields.refuse("attention_bias", *([True] if family == "qwen2" else []), False)
    fields.refuse("mlp_bias", False)
    fields.refuse("partial_rotary_factor", 1.0)
    fields.nested("rope_parameters").refuse("partial_rotary_factor", 1.0)
    if family == "llama":
        fields.refuse("sliding_window")
    window_layers = set(fields.get("layer_types", list, [])) - {"full_attention"}
    if window_layers:
        raise fields.fail(f"layer_types has {sorted(window_layers)}, which is not supported; use full_attention")


def _head_dim(fields: Fields, family: str, hidden_size: int, heads: int) -> int:
    """``head_dim``, which llama and qwen2 may leave out (then hidden_size / num_attention_heads); qwen3 may not."""
    if fields.content.get("head_dim") is not None or family in ("qwen3", "qwen3_moe"):
        head_dim = fields.count("head_dim")
    elif hidden_size % heads:
        raise fields.fail(f"hidden_size={hidden_size} is no multiple of num_attention_heads={heads}; add head_dim")
    else:
        head_dim = hidden_size // heads
    if family == "qwen2" and head_dim * heads != hidden_size:
        raise fields.fail(f"head_dim={head_dim} contradicts hidden_size={hidden_size} / num_attention_heads={heads}")
    if head_dim % 2:
        raise fields.fail(f"head_dim={head_dim} must be even: the rotary embedding rotates pairs of channels")
    return head_dim


def render_config(
    config: ModelConfig, dtype: torch.dtype, block_size: int | None, *, stacked_experts: bool = False
) -> dict[str, Any]:
    """``config.json`` that the family's readers understand, with ``mask_token_id`` and ``block_size`` for decoding.

    Those are transformers 4 and 5; for LLaDA2 with the published modeling code, and the inference engines that read its
    checkpoints.

    Args:
        config: the model.
        dtype: of the exported weights.
        block_size: tokens of a decoding block; None leaves the field out.
        stacked_experts: the exported experts of a layer are one tensor (LLaDA2 only).
    Raises:
        CheckpointError: the model belongs to no Hugging Face family, or has something that its family has not.
    """
    family = config.architecture
    if family not in EXPORTED:
        raise CheckpointError(f"model.architecture={family} cannot be exported; use one of {', '.join(EXPORTED)}")
    if stacked_experts and family != "llada2_moe":
        raise CheckpointError(f"model.architecture={family} has no form with stacked experts; only llada2_moe has one")
    name = next(name for name, known in DTYPES.items() if known == dtype)
    content: dict[str, Any] = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "dtype": name,
        "torch_dtype": name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "use_cache": True,
    }
    content |= llada2_content(config, stacked_experts) if family == "llada2_moe" else _dense_content(family)
    if family == "qwen3_moe":
        content |= qwen3_experts_content(config.moe)
    if family == "qwen2":
        del content["head_dim"]  # always hidden_size / num_attention_heads there
    content |= _token_ids(config)
    if block_size is not None:
        content["block_size"] = block_size
    _check_expressed(config, content)
    return content


def _dense_content(family: str) -> dict[str, Any]:
    """What Llama and the Qwens differ in."""
    content = {} if family == "qwen2" else {"attention_bias": False}
    return content | ({"mlp_bias": False} if family == "llama" else {"use_sliding_window": False})


def _token_ids(config: ModelConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in TOKEN_IDS if getattr(config, name) is not None}


def _check_expressed(config: ModelConfig, content: dict[str, Any]) -> None:
    """Fails unless ``content`` reads back as ``config``."""
    location = f"config.json of model.architecture={config.architecture}"
    wanted, found = model_keys(config), model_keys(parse_config(content, location))
    for key, value in wanted.items():
        of_no_experts = key.startswith("model.moe.") and key != "model.moe.num_experts" and not config.is_moe
        if value != found[key] and not of_no_experts:
            raise CheckpointError(
                f"{key}={value} cannot be exported: a {location} would say {found[key]}; change one of the two"
            )


def model_keys(config: ModelConfig) -> dict[str, Any]:
    """Every key that makes up the model, as users write it: ``model.moe.top_k`` -> value."""
    values = dataclasses.asdict(config)
    keys = {f"model.moe.{name}": value for name, value in values.pop("moe").items()}
    keys |= {f"model.{name}": value for name, value in values.items()}
    return {key: value for key, value in keys.items() if key not in _HOW_NOT_WHAT}


def render_generation_config(config: ModelConfig, block_size: int | None = None) -> dict[str, Any]:
    """``generation_config.json``: the special ids, greedy; for LLaDA2 also its decoder's arguments and their defaults.

    Args:
        config: the model.
        block_size: tokens of a LLaDA2 decoding block; None: the published 32.
    """
    content: dict[str, Any] = {"do_sample": False} | _token_ids(config)
    content.pop("mask_token_id", None)
    if config.architecture == "llada2_moe":
        content |= {"block_length": block_size or 32, "steps": 32, "threshold": 0.95}
        content |= {"mask_id": config.mask_token_id, "eos_id": config.eos_token_id}
    return {name: value for name, value in content.items() if value is not None}
