"""Router of the mixtures of experts of Ling 2.0 / LLaDA2 and Qwen3, and the load-driven update of its expert bias.

Ling: scores are fp32 sigmoids; a per-expert bias takes part in the selection only; groups of experts are ranked by the
sum of their two best biased scores; the weights are the unbiased scores of the chosen experts, normalised and scaled.
Qwen3: the weights are the fp32 softmax over the chosen experts' logits; there is no bias. All of that is Megatron's
``TopKRouter``. The load is counted here: Megatron-Core 0.16 and 0.19 combine the routing map
[T, E] and the padding mask [T] in a way that fails or counts wrongly, and update the bias inside the gradient
reduction, where a step that is skipped afterwards would have changed the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class BalancedRouter(TopKRouter):
    """``TopKRouter`` with an expert bias of its own and a load count that ignores padding.

    Buffers: ``expert_bias`` float32 [E] (saved; None with softmax scores), ``local_tokens_per_expert`` int64 [E] (this
    rank's tokens since the last update, not saved).
    """

    expert_bias: Tensor | None
    local_tokens_per_expert: Tensor

    def __init__(self, config: TransformerConfig, pg_collection: Any = None, **version_specific: Any) -> None:
        super().__init__(config=config, pg_collection=pg_collection, **version_specific)
        num_experts = config.num_moe_experts
        del self.expert_bias, self.local_tokens_per_expert  # None: the config leaves Megatron's own bias off
        has_bias = config.moe_router_score_function == "sigmoid"
        bias = torch.zeros(num_experts, dtype=torch.float32, device=self.weight.device) if has_bias else None
        self.register_buffer("expert_bias", bias)
        self.register_buffer(
            "local_tokens_per_expert",
            torch.zeros(num_experts, dtype=torch.int64, device=self.weight.device),
            persistent=False,
        )

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count the load: ``routing_map`` bool [T, E], ``padding_mask`` bool [T], True = padding.

        Counts in training with gradients only: evaluation does not count, and of a recomputed layer the first,
        gradient-free pass does not.
        """
        if not (self.training and torch.is_grad_enabled()):
            return
        with torch.no_grad():
            if padding_mask is not None:
                routing_map = routing_map & ~padding_mask[:, None]
            self.local_tokens_per_expert += routing_map.sum(dim=0)


def update_expert_bias(model: torch.nn.Module | Iterable[torch.nn.Module], rate: float | None = None) -> Tensor | None:
    """Add ``rate`` to the bias of experts below the mean load and take it from those above; reset the counts.

    Call it once after every optimizer step that was taken, on every rank. Loads are summed over all ranks that hold
    the same layers (tensor x data x context parallel). A router without a bias reports its load and resets it.

    Args:
        model: the model, or its chunks under virtual pipeline parallelism.
        rate: step of the bias; default ``model.moe.bias_update_rate``.

    Returns:
        The global loads, int64 [MoE layers on this stage, E] (tokens), or None when there are none.
    """
    mine = routers(model)
    if not mine:
        return None
    load_LE = torch.stack([router.local_tokens_per_expert for router in mine])
    dist.all_reduce(load_LE, group=mine[0].tp_dp_cp_group)
    excess_LE = load_LE * load_LE.shape[1] - load_LE.sum(dim=1, keepdim=True)  # E x (load - mean), exact in integers
    for router, excess_E in zip(mine, excess_LE, strict=True):
        step = router.config.moe_router_bias_update_rate if rate is None else rate
        if router.expert_bias is not None:
            router.expert_bias -= step * torch.sign(excess_E).to(torch.float32)
        router.local_tokens_per_expert.zero_()
    return load_LE


def discard_expert_load(model: torch.nn.Module | Iterable[torch.nn.Module]) -> None:
    """Forget the counts since the last update: for a step that is skipped."""
    for router in routers(model):
        router.local_tokens_per_expert.zero_()


def routers(model: torch.nn.Module | Iterable[torch.nn.Module]) -> list[BalancedRouter]:
    """The routers of this rank, by chunk and layer; ``layer_number`` is their global layer, from 1."""
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, BalancedRouter)]
