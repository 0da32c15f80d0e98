"""Self-attention of a transformer layer: Megatron's projections around per-token rotary positions and our attention."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from llada_mega.models.rotary import rotate


class IntervalSelfAttention(SelfAttention):
    """Megatron's module with the training path alone, and rotary factors instead of angles."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, *, rotary_pos_emb: Tensor, **unused: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states ``[S (/tp), B, H]``, mask carrier, factors of :func:`rotary_factors` -> output, its bias."""
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        query, key = rotate(query, rotary_pos_emb), rotate(key, rotary_pos_emb)
        recomputes = self.checkpoint_core_attention and self.training
        attend = self._checkpointed_attention_forward if recomputes else self.core_attention
        return self.linear_proj(attend(query, key, value, attention_mask, attn_mask_type=self.attn_mask_type))
