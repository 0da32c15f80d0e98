"""Loss, gradients and expert loads of a global batch under a layout; run on every rank by test_context.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llada_mega.config.run import ParallelConfig
from llada_mega.data.batch import Batch, build_batch
from llada_mega.data.context import key_exchange, shard_batch
from llada_mega.data.sample import Sample
from llada_mega.diffusion.objectives import DiffusionObjective
from llada_mega.diffusion.schedule import get_schedule
from llada_mega.parallel import ParallelGroups, cpu_runtime, destroy, initialize
from tests.models.helpers import MASK_ID, dense_config, moe_config

cpu_runtime.install()

MODELS = {
    "dense": dense_config("qwen3", num_layers=2, qk_norm=True, init_std=0.1),
    "moe": moe_config(num_layers=2, init_std=0.1),
}
LINEAR = get_schedule("linear")
NOISE_STD = 0.1


def documents(length: int, seed: int, alignment: int) -> tuple[list[int], list[bool]]:
    """Unequal documents of a sample at multiples of ``alignment``, one of them long, and padding after each."""
    generator = torch.Generator().manual_seed(seed)
    lengths, padding, start = [], [], 0
    spans = [length // 2, *torch.randint(1, 40, (length,), generator=generator).tolist()]
    for span in spans:
        end = min(-(-(start + span) // alignment) * alignment, length)
        gap = min(alignment // 4, end - start - 1)
        lengths += [end - start - gap] + [gap] * (gap > 0)
        padding += [False] + [True] * (gap > 0)
        if end == length:
            return lengths, padding
        start = end
    raise AssertionError("spans of at least one token fill the sample")


def make_batch(length: int, layout: str, block_size: int, seed: int, alignment: int, multiple: int) -> Batch:
    """Two samples of unequal lengths with several documents each, one micro-batch."""
    samples = []
    for index, eighths in ((2 * seed, 5), (2 * seed + 1, 3)):
        lengths, padding = documents(length * eighths // 8, index, alignment)
        real = torch.repeat_interleave(~torch.tensor(padding), torch.tensor(lengths))
        tokens = torch.randint(MASK_ID + 1, 150, real.shape, generator=torch.Generator().manual_seed(index))
        samples.append(Sample(tokens * real, lengths, padding, real, index))
    return build_batch(
        samples,
        layout=layout,
        block_size=block_size,
        objective=DiffusionObjective("elbo", LINEAR),
        schedule=LINEAR,
        seed=11,
        mask_token_id=MASK_ID,
        pad_token_id=0,
        t_min=0.2,
        t_max=0.9,
        clean_tokens="all",
        length_multiple=multiple,
        row_multiple=8,
    )


def compute(
    model_name: str,
    parallel: dict[str, Any],
    data: dict[str, Any],
    dtype: torch.dtype = torch.float64,
    expected: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Two micro-batches of different masks through Megatron's schedule.

    Args:
        data: arguments of :func:`make_batch`.
        expected: whole gradients by name.

    Returns:
        Loss (sum / denominator over all ranks), gradient norm, whose keys crossed, expert loads of this stage's layers;
        without ``expected`` the gradients, else the largest differences from it, relative to each tensor's maximum.
    """
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from llada_mega.models import build_model, update_expert_bias
    from llada_mega.models.naming import global_names, local_slice

    groups = initialize(ParallelConfig(**parallel))
    model = build_model(MODELS[model_name], seed=5, dtype=dtype)
    model.config.finalize_model_grads_func = finalize_model_grads
    ddp = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=dtype == torch.bfloat16), model
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="sgd", lr=0.0, params_dtype=dtype, bf16=dtype == torch.bfloat16), [ddp]
    )
    ddp.zero_grad_buffer()
    whole = [make_batch(seed=seed, **data) for seed in range(2)]
    ranks = groups.cp.size()
    batches = [shard_batch(batch, groups.cp.rank(), ranks, row_multiple=8) for batch in whole]
    outputs = get_forward_backward_func()(
        forward_step_func=partial(forward_step, groups=groups),
        data_iterator=iter(batches),
        model=[ddp],
        num_microbatches=len(batches),
        seq_length=len(batches[0].input_ids_S) * ranks,
        micro_batch_size=1,
        forward_only=False,
    )
    total = sum(outputs, torch.zeros(3, dtype=torch.float64))
    dist.all_reduce(total, group=groups.dp_cp)
    dist.broadcast(total, src=dist.get_process_group_ranks(groups.pp)[-1], group=groups.pp)
    loads = update_expert_bias(model)
    optimizer.prepare_grads()
    result = {
        "loss": float(total[0] / total[1]),
        "rows": int(total[2]),
        "gradient_norm": float(optimizer.get_grad_norm()),
        "halves": {key_exchange(batch, ranks).halves for batch in whole},
        "loads": None if loads is None else loads.tolist(),
    }
    names = global_names(model)
    gradients = {names[name]: parameter for name, parameter in model.named_parameters()}
    if expected is None:
        result["gradients"] = {name: parameter.main_grad.clone() for name, parameter in gradients.items()}
    else:
        result["differences"] = {
            name: relative_difference(parameter.main_grad, local_slice(model, name, parameter, expected[name]))
            for name, parameter in gradients.items()
        }
    destroy()
    return result


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; NaN where anything is not finite."""
    if actual.shape != expected.shape:
        return math.inf
    return float((actual.double() - expected.double()).abs().max() / (expected.double().abs().max() or 1.0))


def forward_step(data: Iterator[Batch], model: torch.nn.Module, *, groups: ParallelGroups) -> tuple[Any, Any]:
    from llada_mega.models import EmbeddingNoise, run_batch

    batch = next(data)
    n = batch.num_rows
    noise = EmbeddingNoise(NOISE_STD, 3, batch.logit_rows_R[:n], batch.row_sample_R[:n], batch.row_position_R[:n])
    output = run_batch(model, batch, noise)

    def loss_function(losses: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss_sum = losses.loss_sum
        counts = torch.tensor([float(loss_sum.detach()), batch.denominator, n], dtype=torch.float64)
        return loss_sum, torch.tensor(batch.denominator, dtype=torch.int32), counts

    return output, loss_function


def gather_on(parts: dict[str, Any]) -> dict[str, Tensor]:
    """One rank's keys after an exchange, and the gradients of its own keys, for given inputs and output gradients."""
    from llada_kernels.exchange import RankExchange

    from llada_mega.parallel.context import gather_keys

    groups = initialize(ParallelConfig(cp=len(parts["key"])))
    rank = groups.cp.rank()
    key, value = (parts[name][rank].clone().requires_grad_() for name in ("key", "value"))
    exchange = RankExchange(parts["num_sent"], parts["places"][rank])
    gathered = gather_keys(key, value, exchange, groups.cp)
    torch.autograd.backward(gathered, [parts["key_grad"][rank], parts["value_grad"][rank]])
    assert key.grad is not None and value.grad is not None
    result = {
        "key": gathered[0].detach(),
        "value": gathered[1].detach(),
        "key_grad": key.grad,
        "value_grad": value.grad,
    }
    destroy()
    return result
