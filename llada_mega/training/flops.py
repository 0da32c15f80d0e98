"""Model FLOPs of a batch: what the mathematics needs, not what a backend happens to execute.

Forward: 2 FLOPs a multiply-add in every matrix product, attention over visible keys only (QK^T and PV), the output
projection only at rows with logits. Forward and backward together count three times the forward, as is customary for
model FLOPs utilisation; recomputation does not count.
"""

from __future__ import annotations

from llada_mega.config.model import ModelConfig
from llada_mega.data.batch import Batch


def linear_flops_per_position(config: ModelConfig) -> float:
    """Forward FLOPs of one position in all layers' matrix products (router included), without attention scores."""
    head_outputs = (config.num_attention_heads + 2 * config.num_query_groups) * config.head_dim
    attention = config.hidden_size * head_outputs + config.num_attention_heads * config.head_dim * config.hidden_size
    total = 0.0
    for layer in range(config.num_layers):
        total += attention
        if config.is_moe_layer(layer):
            moe = config.moe
            width = moe.top_k * moe.expert_ffn_hidden_size + moe.shared_expert_ffn_hidden_size
            total += 3 * config.hidden_size * width + config.hidden_size * moe.num_experts
        else:
            total += 3 * config.hidden_size * config.ffn_hidden_size
    return 2.0 * total


def batch_flops(config: ModelConfig, batch: Batch) -> float:
    """Forward and backward model FLOPs of one micro-batch."""
    positions = int((~batch.padding_S).sum())
    linear = linear_flops_per_position(config) * positions
    attention = batch.mask.attention_flops(config.num_attention_heads, config.head_dim) * config.num_layers
    logits = 2.0 * config.hidden_size * config.vocab_size * batch.num_rows
    return 3.0 * (linear + attention + logits)
