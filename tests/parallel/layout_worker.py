"""Trains a tiny model for two steps under a given layout; test_layouts.py runs it on every rank."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from llada_mega.parallel import cpu_runtime, initialize

cpu_runtime.install()
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402

from llada_mega.config.run import ParallelConfig  # noqa: E402
from llada_mega.models import EmbeddingNoise, build_model, update_expert_bias  # noqa: E402
from tests.models.helpers import bdlm_inputs, dense_config, moe_config  # noqa: E402

MODELS = {
    "dense": dense_config("qwen3", num_layers=4, qk_norm=True, init_std=0.1),
    "tied": dense_config("llama", num_layers=4, tie_embeddings=True, init_std=0.1),
    "moe": moe_config(num_layers=4, init_std=0.1),
}
MICRO_BATCHES, STEPS, DOCUMENTS = 4, 2, [10, 6]
ROW_DENOMINATOR = 100  # loss = sum over all rows / 100, whatever the layout


def train(model_name: str, parallel: ParallelConfig) -> dict[str, Any]:
    """Losses and gradient norms of the steps, and this rank's expert loads [steps][MoE layers][experts]."""
    groups = initialize(parallel)
    config = MODELS[model_name]
    stages: list[int | None] = [None] if parallel.vp is None else list(range(parallel.vp))
    bare = [build_model(config, seed=5, vp_stage=stage) for stage in stages]
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=parallel.distributed_optimizer
    )
    chunks = [DistributedDataParallel(model.config, ddp_config, model) for model in bare]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            weight_decay=0.1,
            clip_grad=1.0,
            params_dtype=torch.float32,
            use_distributed_optimizer=parallel.distributed_optimizer,
        ),
        chunks,
    )
    for model in bare:
        model.config.grad_scale_func = optimizer.scale_loss
        model.config.finalize_model_grads_func = finalize_model_grads
    result: dict[str, Any] = {"losses": [], "gradient_norms": [], "loads": []}
    for step in range(STEPS):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        mine = MICRO_BATCHES // groups.dp.size()
        first = step * MICRO_BATCHES + groups.dp.rank() * mine
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[samples(config, first, mine) for _ in chunks],
            model=chunks,
            num_microbatches=mine,
            seq_length=2 * sum(DOCUMENTS),
            micro_batch_size=1,
            forward_only=False,
        )
        _, gradient_norm, _ = optimizer.step()
        loads = update_expert_bias(bare)
        loss = torch.tensor(sum(float(output["loss"]) for output in outputs), dtype=torch.float64)
        dist.all_reduce(loss)
        copies = groups.tp.size() * groups.cp.size()
        result["losses"].append(float(loss) / copies)
        result["gradient_norms"].append(float(gradient_norm))
        result["loads"].append(None if loads is None else loads.tolist())
    return result


def samples(config: Any, first: int, count: int) -> Iterator[tuple[int, Any]]:
    for index in range(first, first + count):
        yield index, bdlm_inputs(config, DOCUMENTS, 4, seed=10 + index)


def forward_step(data: Iterator[Any], model: torch.nn.Module) -> tuple[Any, Any]:
    index, (ids, position, carrier, masked) = next(data)
    rows = masked.nonzero()[:, 0]
    noise = EmbeddingNoise(0.1, 3, rows, torch.full_like(rows, index), rows)
    output = model(
        ids,
        position,
        carrier,
        padding_mask_BS=torch.zeros_like(ids, dtype=torch.bool),
        logit_rows_R=rows,
        labels_R=ids[0, rows + len(masked)],
        embedding_noise=noise,
    )

    def loss_function(losses: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        count = torch.tensor(ROW_DENOMINATOR // MICRO_BATCHES, dtype=torch.int)
        return losses.loss_sum, count, {"loss": losses.loss_sum.detach() / ROW_DENOMINATOR}

    return output, functools.partial(loss_function)
