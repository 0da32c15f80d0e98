"""Tokens to experts and back where one rank has all experts: nothing is sent.

Megatron's dispatchers go through the motions of an exchange: with one rank the all-to-all one copies every routed token
four times each way.

Legend: T tokens, H hidden size, E experts, N routed tokens (sorted by expert, then by token).
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from llada_mega.parallel import ParallelGroups


def dispatch_locally(model: torch.nn.Module, groups: ParallelGroups) -> None:
    """Give the MoE layers of ``model`` a :class:`LocalDispatcher` if each rank has all experts whole.

    To be called after the layers are built: which dispatcher a layer makes for itself is no part of Megatron's specs.
    """
    if groups.collection.tp_ep.size() == 1:
        for module in model.modules():
            if isinstance(module, MoELayer):
                module.token_dispatcher = LocalDispatcher(module.config, groups.collection)


class LocalDispatcher(MoETokenDispatcher):
    """Sorts tokens by expert and adds the outputs of a token's experts up, both without leaving this rank.

    Like Megatron's dispatchers it remembers the routing of one forward pass from dispatch to combination.
    """

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``[..., H]``, choices bool ``[T, E]``, shares ``[T, E]`` -> sorted tokens ``[N, H]`` and shares."""
        self.shape = tokens.shape
        self.counts_E = routing_map.sum(dim=0)
        by_expert = routing_map.t().flatten().nonzero().squeeze(1)  # e * T + t
        self.token_N = by_expert % len(routing_map)
        shares_N = probs.t().flatten().index_select(0, by_expert)
        return tokens.view(-1, self.shape[-1]).index_select(0, self.token_N), shares_N

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing to send."""
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sorted already: tokens, their number for each expert, shares."""
        return hidden_states, self.counts_E, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Outputs ``[N, H]`` -> sums ``[T, H]`` over each token's experts."""
        sums = hidden_states.new_zeros(self.shape.numel() // self.shape[-1], self.shape[-1])
        return torch.index_add(sums, 0, self.token_N, hidden_states)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Nothing to fetch."""
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Back to the shape that came in."""
        return hidden_states.view(self.shape)
