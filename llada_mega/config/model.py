"""Shape of a model: everything that decides its parameters, and nothing about how it is trained or split."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional


@dataclass
class MoEConfig:
    """Mixture of experts of the Ling 2.0 / LLaDA2 kind (LLaDA2.0 report, arXiv 2512.15745) or of the Qwen3 kind.

    sigmoid: ``top_k`` experts of ``group_top_k`` groups are chosen by sigmoid score plus expert bias; their weights are
    the unbiased scores, normalised and multiplied by ``routed_scaling_factor``.
    softmax: the ``top_k`` experts of the largest logits, weighted by the softmax over these logits; no groups, no
    expert bias, no shared expert, no scaling.
    """

    num_experts: int = 0  # 0: a dense model
    top_k: int = 8
    num_groups: int = 8
    group_top_k: int = 4
    expert_ffn_hidden_size: int = 512
    shared_expert_ffn_hidden_size: int = 512  # 0: no shared expert
    first_dense_layers: int = 1
    score_function: str = "sigmoid"  # sigmoid | softmax: Ling's routing or Qwen3's
    routed_scaling_factor: float = 2.5
    bias_update_rate: float = 1.0e-3  # of the expert bias; softmax routing has none


@dataclass
class ModelConfig:
    """A dense Llama/Qwen, Ling/LLaDA2 MoE or Qwen3 MoE model. Sizes are counts; ``rope_theta`` is the rotary base."""

    architecture: str = "llama"  # llama | qwen2 | qwen3 | llada2_moe | qwen3_moe: the Hugging Face family it exports to
    num_layers: int = 2
    hidden_size: int = 64
    num_attention_heads: int = 4
    num_query_groups: int = 2
    head_dim: int = 16
    ffn_hidden_size: int = 128
    vocab_size: int = 256  # real tokens, MASK included, without the padding for tensor parallelism
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rotary_percent: float = 1.0  # share of each head's channels that rotate, from the first one on
    norm_eps: float = 1.0e-6
    qk_norm: bool = False
    qkv_bias: bool = False
    tie_embeddings: bool = False
    init_std: float = 0.02
    mask_token_id: Optional[int] = None
    pad_token_id: Optional[int] = None
    eos_token_id: Optional[int] = None
    bos_token_id: Optional[int] = None
    moe: MoEConfig = field(default_factory=MoEConfig)
    attention_backend: str = "auto"
    implementation: str = "auto"  # auto | local | te

    @property
    def is_moe(self) -> bool:
        """True when some layers have routed experts."""
        return self.moe.num_experts > 0

    def is_moe_layer(self, layer_index: int) -> bool:
        """True when the 0-based ``layer_index`` has routed experts."""
        return self.is_moe and layer_index >= self.moe.first_dense_layers
