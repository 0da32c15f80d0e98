"""The last transformer layer: its queries, output projection and feed-forward network run for the logit rows alone.

Nobody looks at what the last layer makes of the other rows: only their keys and values are used. With t uniform half
of the noisy tokens are masked, so of the 2L rows about a quarter is left.

Legend: S rows of the sequence, R logit rows (fillers last), B batch (1), H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from llada_mega.models import mask_carrier


class LastLayer(TransformerLayer):
    """Returns the logit rows ``[R (/tp), B, H]`` where the mask carrier names them, all rows otherwise.

    Of all tokens the logit rows alone count in the expert load. Megatron's all-gather dispatcher wants as many tokens
    on every rank: with it all rows are computed, which gives the same numbers.
    """

    def __init__(self, config: Any, *args: Any, pg_collection: Any = None, **version_specific: Any) -> None:
        super().__init__(config, *args, pg_collection=pg_collection, **version_specific)
        groups, is_moe = pg_collection, config.num_moe_experts is not None
        all_gather = is_moe and config.moe_token_dispatcher_type == "allgather"
        self.computes_all_rows = all_gather and groups.tp_ep.size() > 1
        self.self_attention.core_attention.chosen_rows_only = not self.computes_all_rows
        self.tp_group = groups.tp
        self._chosen: mask_carrier.ChosenRows | None = None
        if not self.computes_all_rows:
            add_to_residual = self.self_attn_bda  # type: ignore[has-type]
            self.self_attn_bda = lambda training, fused: self._adding_to_chosen(add_to_residual(training, fused))

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, *, padding_mask: Tensor | None = None, **unchanged: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states ``[S (/tp), B, H]``, mask carrier, padding bool ``[B, S (/tp)]`` -> hidden states, context."""
        self._chosen = mask_carrier.unpack(attention_mask).chosen
        if self._chosen is not None and padding_mask is not None:
            padding_mask = self._not_predicted(hidden_states.device)
        hidden_states, context = super().forward(
            hidden_states=hidden_states, attention_mask=attention_mask, padding_mask=padding_mask, **unchanged
        )
        if self._chosen is not None and self.computes_all_rows:
            hidden_states = self._of_chosen(hidden_states)
        return hidden_states, context

    def _adding_to_chosen(self, add: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def add_to_chosen(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            return add(output_with_bias, residual if self._chosen is None else self._of_chosen(residual), dropout)

        return add_to_chosen

    def _of_chosen(self, hidden_SBH: Tensor) -> Tensor:
        """The logit rows of hidden states; of both, this rank's part under sequence parallelism."""
        assert self._chosen is not None
        rows_R = self._own_part(self._chosen.on(hidden_SBH.device)[0])
        if self.config.sequence_parallel:
            hidden_SBH = gather_from_sequence_parallel_region(
                hidden_SBH, tensor_parallel_output_grad=True, group=self.tp_group
            )
        return hidden_SBH.index_select(0, rows_R)

    def _own_part(self, values_R: Tensor) -> Tensor:
        """The rows of this tensor-parallel rank, under sequence parallelism."""
        if not self.config.sequence_parallel:
            return values_R
        return values_R.chunk(self.tp_group.size())[self.tp_group.rank()]

    def _not_predicted(self, device: torch.device) -> Tensor:
        """Which of the rows that are computed do not count in the expert load: bool ``[B, R or S (/tp)]``."""
        assert self._chosen is not None
        rows_R, filler_R = self._chosen.on(device)
        if not self.computes_all_rows:
            return self._own_part(filler_R)[None]
        counts_S = torch.zeros(self._chosen.num_positions, dtype=torch.int32, device=rows_R.device)
        return self._own_part(counts_S.index_add_(0, rows_R, (~filler_R).int()) == 0)[None]
