"""The building blocks of a transformer layer: Megatron-Core's own, or those of TransformerEngine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from llada_mega.models.norm import RMSNorm


@dataclass(frozen=True)
class LayerModules:
    """Module classes of one implementation.

    Attributes:
        norm: RMSNorm.
        column, row: linear layers whose output (input) features are split over tensor-parallel ranks.
        norm_column: a norm and the column-parallel linear layer behind it as one module; None where there is none.
        grouped_column, grouped_row: the linear layers of all local experts as one module; None where there is none.
    """

    norm: Any
    column: Any
    row: Any
    norm_column: Any = None
    grouped_column: Any = None
    grouped_row: Any = None


LOCAL = LayerModules(norm=RMSNorm, column=ColumnParallelLinear, row=RowParallelLinear)


def te_modules() -> LayerModules:
    """TransformerEngine's modules in Megatron-Core's wrappers. They need CUDA.

    Raises:
        ImportError: TransformerEngine is not installed.
    """
    import transformer_engine.pytorch  # noqa: F401  Megatron-Core's wrappers import without it, as mocks
    from megatron.core.extensions import transformer_engine as te

    return LayerModules(
        norm=te.TENorm,
        column=te.TEColumnParallelLinear,
        row=te.TERowParallelLinear,
        norm_column=te.TELayerNormColumnParallelLinear,
        grouped_column=te.TEColumnParallelGroupedLinear,
        grouped_row=te.TERowParallelGroupedLinear,
    )
