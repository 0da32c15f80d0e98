"""Data-parallel wrappers and AdamW, both Megatron-Core's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, clip_grads, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from torch import Tensor

from llada_mega.config.run import ParallelConfig
from llada_mega.config.training import OptimizerConfig
from llada_mega.models import BlockDiffusionModel
from llada_mega.parallel import capabilities, cpu_runtime


def wrap_data_parallel(
    models: Sequence[BlockDiffusionModel], parallel: ParallelConfig
) -> list[DistributedDataParallel]:
    """Gradients in fp32 buffers, reduced over the data-parallel group once a step.

    ``parallel.overlap`` reduces them during the backward pass of the last micro-batch and, with the distributed
    optimizer, gathers the new weights during the next forward pass.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap,
        overlap_param_gather=parallel.overlap and parallel.distributed_optimizer,
    )
    # Later virtual stages run while others communicate anyway: one bucket each, as in Megatron's own training.
    return [
        DistributedDataParallel(model.config, ddp_config, model, disable_bucketing=index > 0)
        for index, model in enumerate(models)
    ]


def build_optimizer(
    config: OptimizerConfig, chunks: Sequence[DistributedDataParallel], parallel: ParallelConfig, dtype: torch.dtype
) -> MegatronOptimizer:
    """AdamW with fp32 master weights when ``dtype`` is bfloat16; norms and biases are not decayed.

    Megatron takes its Adam from TransformerEngine, apex or torch, the first that is installed.
    """
    megatron = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=parallel.overlap and parallel.distributed_optimizer,
    )
    if capabilities.clip_library() == "torch" and not cpu_runtime.is_installed():
        clip_grads.l2_norm_impl = _l2_norm
    optimizer = get_megatron_optimizer(megatron, list(chunks))
    if cpu_runtime.is_installed():
        # one pass over memory; torch takes a loop of several passes by default, eight times as slow on one core
        for group in optimizer.param_groups:
            if "fused" in group:
                group["fused"] = True
    return optimizer


def _l2_norm(chunk_size: int, overflow: Tensor, tensor_lists: list[list[Tensor]], *_: Any) -> tuple[Tensor, None]:
    """Apex's ``multi_tensor_l2norm``. What Megatron-Core has without apex waits for the GPU once a parameter."""
    return torch.nn.utils.get_total_norm([tensor for tensors in tensor_lists for tensor in tensors])[None], None
