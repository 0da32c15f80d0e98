"""The building blocks of a transformer layer: Megatron-Core's own, or those of TransformerEngine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP

from llada_mega.models.experts import ExpertColumn, ExpertRow, FusedExperts
from llada_mega.models.grouped_experts import GroupedExperts
from llada_mega.models.norm import RMSNorm
from llada_mega.models.self_attention import IntervalSelfAttention
from llada_mega.models.swiglu import SwiGLU


@dataclass(frozen=True)
class LayerModules:
    """Module classes of one implementation.

    Attributes:
        norm: RMSNorm.
        self_attention: projections, rotary positions, core attention.
        column, row: linear layers whose output (input) features are split over tensor-parallel ranks.
        experts: all routed experts of a rank.
        expert_column, expert_row: the linear layers that ``experts`` is made of.
        activation: between the two linear layers of an MLP; None: unfused, by Megatron.
        norm_column: a norm and the column-parallel linear layer behind it as one module; None where there is none.
    """

    norm: Any
    self_attention: Any
    column: Any
    row: Any
    experts: Any
    expert_column: Any
    expert_row: Any
    activation: Any = None
    norm_column: Any = None


def local_modules(fused_weight_gradients: bool, grouped_experts: bool = False) -> LayerModules:
    """Megatron-Core's own modules and ours; they need nothing but PyTorch.

    Args:
        fused_weight_gradients: linear layers add to the gradient buffers themselves (a CUDA extension). That is in
            Megatron's linear layers only, so its experts are taken then, unless they can be grouped.
        grouped_experts: one product for all experts; see :func:`llada_mega.models.grouped_experts.can_group`.
    """
    megatron_experts = fused_weight_gradients and not grouped_experts
    our_experts = GroupedExperts if grouped_experts else FusedExperts
    return LayerModules(
        norm=RMSNorm,
        self_attention=IntervalSelfAttention,
        column=ColumnParallelLinear,
        row=RowParallelLinear,
        experts=SequentialMLP if megatron_experts else our_experts,
        expert_column=ColumnParallelLinear if megatron_experts else ExpertColumn,
        expert_row=RowParallelLinear if megatron_experts else ExpertRow,
        activation=SwiGLU,
    )


def te_modules() -> LayerModules:
    """TransformerEngine's modules in Megatron-Core's wrappers. They need CUDA.

    Raises:
        ImportError: TransformerEngine is not installed.
    """
    import transformer_engine.pytorch  # noqa: F401  Megatron-Core's wrappers import without it, as mocks
    from megatron.core.extensions import transformer_engine as te

    return LayerModules(
        norm=te.TENorm,
        self_attention=SelfAttention,
        column=te.TEColumnParallelLinear,
        row=te.TERowParallelLinear,
        norm_column=te.TELayerNormColumnParallelLinear,
        experts=TEGroupedMLP,
        expert_column=te.TEColumnParallelGroupedLinear,
        expert_row=te.TERowParallelGroupedLinear,
    )
