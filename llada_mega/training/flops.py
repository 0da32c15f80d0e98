"""Model FLOPs: what the mathematics needs, not what a backend happens to execute.

Forward: 2 FLOPs a multiply-add in every matrix product, attention over visible keys only (QK^T and PV), the output
projection only at rows with logits. Backward needs each product twice more, one for either factor, so a step is three
times the forward pass, as is customary for model FLOPs utilisation. Recomputation, padding, softmax, norms and lookups
do not count.
"""

from __future__ import annotations

from dataclasses import dataclass

from llada_mega.config.model import ModelConfig
from llada_mega.data.batch import Batch

STEP = 3  # forward and backward, in forward passes


@dataclass(frozen=True)
class Flops:
    """FLOPs of a forward pass by kind of kernel; ``a + b`` and ``n * a`` work."""

    linear: float = 0.0  # projections of the attention, dense networks, shared experts, routers
    experts: float = 0.0  # routed experts
    attention: float = 0.0  # QK^T and PV over visible pairs
    logits: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.linear + self.experts + self.attention + self.logits

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.linear + other.linear,
            self.experts + other.experts,
            self.attention + other.attention,
            self.logits + other.logits,
        )

    def __rmul__(self, factor: float) -> Flops:
        return Flops(factor * self.linear, factor * self.experts, factor * self.attention, factor * self.logits)


def layer_flops(config: ModelConfig, layer: int, positions: float, visible_pairs: float) -> Flops:
    """Forward pass of the 0-based ``layer`` over ``positions`` tokens whose rows see ``visible_pairs`` keys in all."""
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    linear = hidden * (heads + 2 * config.num_query_groups * config.head_dim) + heads * hidden
    routed = 0
    if config.is_moe_layer(layer):
        moe = config.moe
        linear += hidden * moe.num_experts + 3 * hidden * moe.shared_expert_ffn_hidden_size
        routed = 3 * hidden * moe.expert_ffn_hidden_size * moe.top_k
    else:
        linear += 3 * hidden * config.ffn_hidden_size
    return Flops(2.0 * positions * linear, 2.0 * positions * routed, attention=4.0 * visible_pairs * heads)


def logit_flops(config: ModelConfig, rows: float) -> Flops:
    """Forward pass of the output projection at ``rows`` rows."""
    return Flops(logits=2.0 * config.hidden_size * config.vocab_size * rows)


def forward_flops(config: ModelConfig, positions: float, visible_pairs: float, logit_rows: float) -> Flops:
    """Forward pass of the whole model."""
    layers = (layer_flops(config, layer, positions, visible_pairs) for layer in range(config.num_layers))
    return sum(layers, logit_flops(config, logit_rows))


def batch_flops(config: ModelConfig, batch: Batch) -> float:
    """Forward and backward model FLOPs of one micro-batch."""
    positions = int((~batch.padding_S).sum())
    return STEP * forward_flops(config, positions, batch.mask.area(), batch.num_rows).total
