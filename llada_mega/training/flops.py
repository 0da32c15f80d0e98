"""Model FLOPs: what the mathematics needs, not what a backend happens to execute.

Forward: 2 FLOPs a multiply-add in every matrix product, attention over visible keys only (QK^T and PV), the output
projection only at rows with logits, and so the last layer behind its queries, keys and values. Backward needs each
product twice more, one for either factor, so a step is three times the forward pass, as is customary for model FLOPs
utilisation. Recomputation, padding, softmax, norms and lookups do not count.
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


def layer_flops(
    config: ModelConfig, layer: int, positions: float, visible_pairs: float, outputs: float | None = None
) -> Flops:
    """Forward pass of the 0-based ``layer``.

    Args:
        positions: tokens with keys and values, and with queries, which come out of the same product.
        visible_pairs: keys that the rows with an output see, in all.
        outputs: tokens whose output is wanted; None: of all.
    """
    outputs = positions if outputs is None else outputs
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    query_key_value = hidden * (heads + 2 * config.num_query_groups * config.head_dim)
    behind, routed = hidden * heads, 0
    if config.is_moe_layer(layer):
        moe = config.moe
        behind += hidden * moe.num_experts + 3 * hidden * moe.shared_expert_ffn_hidden_size
        routed = 3 * hidden * moe.expert_ffn_hidden_size * moe.top_k
    else:
        behind += 3 * hidden * config.ffn_hidden_size
    linear = positions * query_key_value + outputs * behind
    return Flops(2.0 * linear, 2.0 * outputs * routed, attention=4.0 * visible_pairs * heads)


def logit_flops(config: ModelConfig, rows: float) -> Flops:
    """Forward pass of the output projection at ``rows`` rows."""
    return Flops(logits=2.0 * config.hidden_size * config.vocab_size * rows)


def forward_flops(
    config: ModelConfig, positions: float, visible_pairs: float, logit_rows: float, logit_pairs: float
) -> Flops:
    """Forward pass of the whole model; ``logit_pairs`` are the visible pairs of the rows with logits."""
    last = config.num_layers - 1
    total = layer_flops(config, last, positions, logit_pairs, logit_rows) + logit_flops(config, logit_rows)
    return sum((layer_flops(config, layer, positions, visible_pairs) for layer in range(last)), total)


def batch_flops(config: ModelConfig, batch: Batch) -> float:
    """Forward and backward model FLOPs of one micro-batch."""
    positions = int((~batch.padding_S).sum())
    pairs_S = batch.mask.visible_counts()
    logit_pairs = int(pairs_S[batch.logit_rows_R[: batch.num_rows].cpu()].sum())
    return STEP * forward_flops(config, positions, int(pairs_S.sum()), batch.num_rows, logit_pairs).total
