"""The same step by a published model: GLM-4-MoE of ``transformers``, which is the architecture of Ling 2.0.

Grouped-query attention with normalised queries and keys, half-rotated heads, sigmoid routing in groups with an expert
bias, a shared expert, a first dense layer: only names and the fusion of projections differ. It is run as trainers run
it: a dense mask for ``scaled_dot_product_attention``, a loop over experts, logits at all 2L positions. Nothing here
makes it slower than a user would find it.

Legend: L tokens, S = 2L positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.plain_model import Weights
from llada_mega.config.model import ModelConfig

_NAMES = {
    "word_embeddings": "embed_tokens",
    "attention.query_layernorm": "self_attn.q_norm",
    "attention.key_layernorm": "self_attn.k_norm",
    "attention.dense": "self_attn.o_proj",
    "gate.expert_bias": "gate.e_score_correction_bias",
}


def build(config: ModelConfig, weights: Weights) -> nn.Module:
    """The model with ``weights`` (LLaDA2's names, as in :mod:`bench.plain_model`), in training mode.

    Args:
        config: with routed experts.
        weights: float32; copied.
    """
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    moe = config.moe
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.head_dim,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": config.rotary_percent,
        },
        "rms_norm_eps": config.norm_eps,
        "moe_intermediate_size": moe.expert_ffn_hidden_size,
        "num_experts_per_tok": moe.top_k,
        "n_shared_experts": moe.shared_expert_ffn_hidden_size // moe.expert_ffn_hidden_size,
        "n_routed_experts": moe.num_experts,
        "n_group": moe.num_groups,
        "topk_group": moe.group_top_k,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "first_k_dense_replace": moe.first_dense_layers,
        "use_qk_norm": config.qk_norm,
        "attn_implementation": "sdpa",
    }
    model = Glm4MoeForCausalLM(Glm4MoeConfig(**fields))
    model.set_experts_implementation("eager")  # the loop
    model.load_state_dict(renamed(config, weights))
    return model.float().train()


def loss(
    model: nn.Module, ids_S: Tensor, positions_S: Tensor, mask_SS: Tensor, labels_L: Tensor, weights_L: Tensor
) -> Tensor:
    """What :func:`bench.plain_model.loss` returns."""
    output = model(
        input_ids=ids_S[None], position_ids=positions_S[None], attention_mask=mask_SS[None, None], use_cache=False
    )
    logits_LV = output.logits[0, : len(labels_L)].float()
    return (F.cross_entropy(logits_LV, labels_L, reduction="none") * weights_L).sum()


def renamed(config: ModelConfig, tensors: Weights) -> dict[str, Tensor]:
    """Weights, or gradients, under LLaDA2's names -> under the names of ``Glm4MoeForCausalLM.state_dict``."""
    result = {}
    for name, tensor in tensors.items():
        if name.endswith("query_key_value.weight"):
            heads = config.num_attention_heads, config.num_query_groups, config.num_query_groups
            parts = tensor.split([number * config.head_dim for number in heads])
            prefix = name.replace("attention.query_key_value.weight", "self_attn.")
            result.update({f"{prefix}{part}_proj.weight": rows for part, rows in zip("qkv", parts, strict=True)})
        elif ".experts." not in name:
            for ours, theirs in _NAMES.items():
                name = name.replace(ours, theirs)
            result[name] = tensor
    for layer in range(config.moe.first_dense_layers, config.num_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors[f"{prefix}.{expert}.{part}_proj.weight"] for expert in range(config.moe.num_experts)])
            for part in ("gate", "up", "down")
        )
        result[f"{prefix}.gate_up_proj"], result[f"{prefix}.down_proj"] = torch.cat([gate, up], dim=1), down
    return result
