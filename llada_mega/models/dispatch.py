"""Tokens to experts and back where one rank has all experts: nothing is sent.

Megatron's dispatchers go through the motions of an exchange: with one rank the all-to-all one copies every routed token
four times each way.

Legend: T tokens, H hidden size, E experts, N routes (a token and one of its experts).
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from llada_mega.models.experts import FusedExperts, Routes
from llada_mega.models.grouped_experts import DeviceRoutes, GroupedExperts, device_routes
from llada_mega.parallel import ParallelGroups


def dispatch_locally(model: torch.nn.Module, groups: ParallelGroups) -> None:
    """Give the MoE layers of ``model`` with our experts a :class:`LocalDispatcher` if each rank has all experts whole.

    To be called after the layers are built: which dispatcher a layer makes for itself is no part of Megatron's specs.
    """
    if groups.collection.tp_ep.size() == 1:
        for module in model.modules():
            if isinstance(module, MoELayer) and isinstance(module.experts, FusedExperts):
                module.token_dispatcher = LocalDispatcher(module.config, groups.collection)
            elif isinstance(module, MoELayer) and isinstance(module.experts, GroupedExperts):
                module.token_dispatcher = DeviceDispatcher(module.config, groups.collection)


class LocalDispatcher(MoETokenDispatcher):
    """Tells :class:`~llada_mega.models.experts.FusedExperts` where the tokens are, instead of moving them.

    Like Megatron's dispatchers it remembers the routing of a forward pass until the experts have run.
    """

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``[..., H]``, choices bool ``[T, E]``, shares ``[T, E]`` -> tokens ``[T, H]``, shares ``[N]``."""
        self.shape = tokens.shape
        by_expert_N = routing_map.t().flatten().nonzero().squeeze(1)  # e * T + t
        self.routes: Routes | DeviceRoutes = Routes(routing_map.sum(dim=0).tolist(), by_expert_N % len(routing_map))
        return tokens.view(-1, self.shape[-1]), probs.t().flatten().index_select(0, by_expert_N)

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing to send."""
        return hidden_states, probs

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Routes | DeviceRoutes, Tensor]:
        """What the experts take."""
        return hidden_states, self.routes, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """The experts have added up."""
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Nothing to fetch."""
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Back to the shape that came in."""
        return hidden_states.view(self.shape)


class DeviceDispatcher(LocalDispatcher):
    """The same for :class:`~llada_mega.models.grouped_experts.GroupedExperts`, without a wait for the device."""

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """As in :class:`LocalDispatcher`; each token has ``moe_router_topk`` experts."""
        self.shape = tokens.shape
        self.routes, by_expert_N = device_routes(routing_map, self.config.moe_router_topk)
        return tokens.view(-1, self.shape[-1]), probs.t().flatten().index_select(0, by_expert_N)
