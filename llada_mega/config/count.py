"""Parameters of a model in closed form, without building it.

Counted are the weights of the model itself: not the expert biases of the router, which no gradient touches, and not
the rows that tensor parallelism pads the vocabulary with. That is how LLaDA2.0 (arXiv 2512.15745) states its sizes.
"""

from __future__ import annotations

from llada_mega.config.model import ModelConfig


def _attention(model: ModelConfig) -> int:
    query, key_value = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    weights = model.hidden_size * (query + 2 * key_value) + query * model.hidden_size
    return weights + (2 * model.head_dim if model.qk_norm else 0) + (query + 2 * key_value if model.qkv_bias else 0)


def _gated_mlp(model: ModelConfig, ffn_hidden_size: int) -> int:
    return 3 * model.hidden_size * ffn_hidden_size


def _layers(model: ModelConfig, experts: int) -> int:
    """All layers and the final norm, with ``experts`` routed experts counted in each MoE layer."""
    moe = model.moe
    total = model.hidden_size
    for index in range(model.num_layers):
        total += _attention(model) + 2 * model.hidden_size
        if model.is_moe_layer(index):
            total += moe.num_experts * model.hidden_size  # the router sees all of them
            total += experts * _gated_mlp(model, moe.expert_ffn_hidden_size)
            total += _gated_mlp(model, moe.shared_expert_ffn_hidden_size)
        else:
            total += _gated_mlp(model, model.ffn_hidden_size)
    return total


def embedding_parameters(model: ModelConfig) -> int:
    """Token embedding and output projection; one matrix when they are tied."""
    return model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)


def total_parameters(model: ModelConfig) -> int:
    """All weights."""
    return _layers(model, model.moe.num_experts) + embedding_parameters(model)


def active_parameters(model: ModelConfig, embeddings: bool = True) -> int:
    """Weights that take part in the computation for one token, with or without embedding and output projection."""
    return _layers(model, model.moe.top_k) + (embedding_parameters(model) if embeddings else 0)
