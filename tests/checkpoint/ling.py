"""Tiny Ling checkpoints on disk, written by hand: every tensor random, norms and expert biases too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG: dict[str, Any] = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "model_type": "bailing_moe_v2",
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 80,
    "max_position_embeddings": 512,
    "moe_intermediate_size": 24,
    "moe_router_enable_expert_bias": True,
    "n_group": 4,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 1,
    "num_shared_experts": 1,
    "pad_token_id": 2,
    "eos_token_id": 2,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 600000,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "vocab_size": 301,
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the published format, written down once more."""
    hidden, dim = config["hidden_size"], config["head_dim"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    found: dict[str, tuple[int, ...]] = {
        "model.word_embeddings.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
    }

    def mlp(prefix: str, width: int) -> None:
        found[f"{prefix}.gate_proj.weight"] = found[f"{prefix}.up_proj.weight"] = (width, hidden)
        found[f"{prefix}.down_proj.weight"] = (hidden, width)

    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        found[f"{prefix}.input_layernorm.weight"] = found[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        found[f"{prefix}.attention.query_key_value.weight"] = ((heads + 2 * groups) * dim, hidden)
        found[f"{prefix}.attention.query_layernorm.weight"] = found[f"{prefix}.attention.key_layernorm.weight"] = (dim,)
        found[f"{prefix}.attention.dense.weight"] = (hidden, heads * dim)
        if layer < config["first_k_dense_replace"]:
            mlp(f"{prefix}.mlp", config["intermediate_size"])
            continue
        found[f"{prefix}.mlp.gate.weight"] = (config["num_experts"], hidden)
        found[f"{prefix}.mlp.gate.expert_bias"] = (config["num_experts"],)
        for expert in range(config["num_experts"]):
            mlp(f"{prefix}.mlp.experts.{expert}", config["moe_intermediate_size"])
        mlp(f"{prefix}.mlp.shared_experts", config["moe_intermediate_size"])
    return found


def random_tensors(config: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Norms around 1, biases of experts in float32, everything else around 0."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes(config).items():
        values = torch.randn(shape, generator=generator)
        if "norm" in name:
            tensors[name] = (1 + 0.3 * values).to(dtype)
        elif name.endswith("expert_bias"):
            tensors[name] = 0.2 * values
        else:
            tensors[name] = (0.15 * values).to(dtype)
    return tensors


def save_ling(
    directory: Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    prediction_layers: bool = False,
    seed: int = 0,
    **changes: Any,
) -> dict[str, Tensor]:
    """Write a checkpoint in two shards; returns its tensors (without layers for multi-token prediction)."""
    config = CONFIG | changes
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(config, dtype, seed)
    stored = dict(tensors)
    if prediction_layers:
        for name in list(tensors):
            if name.startswith("model.layers.1."):
                stored[name.replace("layers.1.", f"layers.{config['num_hidden_layers']}.")] = tensors[name] + 1
        stored[f"model.layers.{config['num_hidden_layers']}.eh_proj.weight"] = torch.ones(3, dtype=dtype)
    names = sorted(stored)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: stored[name] for name in members}, directory / file, metadata={"format": "pt"})
    weight_map = {name: file for file, members in shards.items() for name in members}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors
