"""Data-parallel wrapper and AdamW, both Megatron-Core's."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

from llada_mega.config.run import ParallelConfig
from llada_mega.config.training import OptimizerConfig


def wrap_data_parallel(model: Any, parallel: ParallelConfig) -> DistributedDataParallel:
    """Gradients in fp32 buffers, all-reduced over the data-parallel group once a step."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=False,
    )
    return DistributedDataParallel(model.config, ddp_config, model)


def build_optimizer(
    config: OptimizerConfig, model: DistributedDataParallel, parallel: ParallelConfig, dtype: torch.dtype
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
    )
    return get_megatron_optimizer(megatron, [model])
