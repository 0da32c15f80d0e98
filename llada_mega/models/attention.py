"""Core attention of the transformer layers: interval attention under the mask that the carrier names."""

from __future__ import annotations

from typing import Any

from llada_kernels import interval_attention
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from llada_mega.models import mask_carrier
from llada_mega.parallel.context import gather_keys


class IntervalCoreAttention(MegatronModule):
    """Takes the place of Megatron's ``DotProductAttention`` in the layer spec.

    ``attention_mask`` must be a carrier made by :func:`llada_mega.models.mask_carrier.pack`; it holds the mask over all
    S rows of this context-parallel rank, the same for every element of the batch dimension. Where it holds an exchange
    too, keys and values are gathered over ``pg_collection.cp`` first, in every forward pass, recomputed ones included.

    Attributes:
        chosen_rows_only: the queries of the carrier's chosen rows attend, the others are dropped.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        *,
        backend: str = "auto",
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.backend = backend
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp
        self.chosen_rows_only = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query ``[S, B, Hq, D]``, key and value ``[S, B, Hk, D]`` -> ``[S (or R chosen rows), B, Hq * D]``."""
        mask, exchange, chosen = mask_carrier.unpack(attention_mask)
        if self.chosen_rows_only and chosen is not None:
            query, mask = query.index_select(0, chosen.on(query.device)[0]), chosen.mask
        if exchange is not None:
            key, value = gather_keys(key, value, exchange, self.cp_group)
        output_BSHD = interval_attention(
            query.transpose(0, 1),
            key.transpose(0, 1),
            value.transpose(0, 1),
            mask,
            scale=self.softmax_scale,
            backend=self.backend,
        )
        return output_BSHD.transpose(0, 1).flatten(2)
