"""One optimizer step over a global batch, through Megatron-Core's schedules, under every parallel layout.

Legend of shape suffixes: B batch (always 1), S positions, R rows with logits, L MoE layers, E experts, M metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from llada_mega.data.batch import Batch
from llada_mega.data.context import attention_tile, logit_row_multiple, shard_batch
from llada_mega.evaluation.losses import level_name
from llada_mega.models import (
    BlockDiffusionModel,
    EmbeddingNoise,
    RowLosses,
    discard_expert_load,
    run_batch,
    update_expert_bias,
)
from llada_mega.models.router import routers
from llada_mega.parallel import ParallelGroups
from llada_mega.training.flops import batch_flops
from llada_mega.training.state import NOISE_BINS, StepMeasurement
from llada_mega.training.timeline import Timeline

Accept = Callable[[StepMeasurement], bool]
_NUM_SUMS = 7  # loss, denominator, cross entropy, rows, correct rows, tokens, positions


class TrainStep:
    """Forward and backward over micro-batches, gradient reduction, clipping, AdamW.

    The loss is the sum of weighted token losses of the whole global batch over one denominator: Megatron sums
    gradients and divides once by the all-reduced count (``calculate_per_token_loss``), so micro-batch and rank
    splits do not change it.

    Args:
        chunks: Megatron's DDP wrappers of this rank's ``BlockDiffusionModel`` parts: one, or one a virtual stage.
        optimizer: from ``get_megatron_optimizer``.
        groups: process groups.
        seed: the run's seed, for the embedding noise.
        device: where batches go.

    Attributes:
        bare_models: the parts without their wrappers.
        timeline: where this rank's time goes.
        work_tile, row_multiple: see :func:`llada_mega.data.context.shard_batch`.
        num_updates: optimizer steps taken; skipped steps make it smaller than the run's step.
    """

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        groups: ParallelGroups,
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        self.chunks, self.optimizer, self.groups, self.seed, self.device = list(chunks), optimizer, groups, seed, device
        self.bare_models: list[BlockDiffusionModel] = [chunk.module for chunk in chunks]
        self.model_config = self.bare_models[0].model_config
        self.num_updates = 0
        self.work_tile, self.row_multiple = attention_tile(device), logit_row_multiple(groups.config, device)
        self.timeline = Timeline.on(device)
        self._forward_backward = get_forward_backward_func()
        # Without this, overlapped gradient reduction would reduce after every micro-batch.
        no_sync = [chunk.no_sync for chunk in chunks]
        for model in self.bare_models:
            model.config.grad_scale_func = optimizer.scale_loss
            model.config.finalize_model_grads_func = finalize_model_grads
            model.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
            model.config.timers = self.timeline
        for chained in _chained(optimizer):
            chained.config.timers = self.timeline

    def __call__(
        self, batches: list[Batch], *, learning_rate: float, embedding_noise_std: float, accept: Accept
    ) -> tuple[StepMeasurement, bool]:
        """Run one step.

        Args:
            batches: this data-parallel rank's whole micro-batches, the same on all its model-parallel ranks.
            learning_rate: for every parameter group (times its ``lr_mult``).
            embedding_noise_std: std of the noise on MASK embeddings; 0 for none.
            accept: sees the measurements before the optimizer runs; False leaves the weights unchanged. Must answer
                alike on all ranks.
        Returns:
            measurements over all ranks, the same on every rank, and whether the optimizer ran.
        """
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        context = self.groups.cp
        with self.timeline.phase("data"):
            mine = [
                shard_batch(
                    batch, context.rank(), context.size(), work_tile=self.work_tile, row_multiple=self.row_multiple
                )
                for batch in batches
            ]
            on_device = [batch.to(self.device) for batch in mine]
        outputs = self._forward_backward(
            forward_step_func=partial(self._forward_step, embedding_noise_std=embedding_noise_std),
            data_iterator=[iter(on_device) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(batches),
            seq_length=mine[0].input_ids_S.numel(),
            micro_batch_size=1,
            forward_only=False,
        )
        with self.timeline.phase("optimizer"):
            self.optimizer.prepare_grads()
            grad_norm = float(self.optimizer.get_grad_norm())
        measured = self._measure(outputs, grad_norm, sum(batch_flops(self.model_config, batch) for batch in mine))
        applied = accept(measured)
        if applied:
            with self.timeline.phase("optimizer"):
                self._update(learning_rate, grad_norm)
            measured.expert_load = self._load_of_all_stages(update_expert_bias(self.bare_models))
        else:
            discard_expert_load(self.bare_models)
        return measured, applied

    def gather_parameters(self) -> None:
        """Make the weights whole on every rank before something other than a forward pass reads them.

        With overlap, the distributed optimizer leaves that to the next forward pass. A collective then.
        """
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def embedding_rms(self) -> float:
        """RMS of the whole embedding table, on every rank. A collective."""
        first = self.bare_models[0]
        rms = first.embedding.table_rms(self.model_config.vocab_size) if first.pre_process else 0.0
        return float(self._sum_over_stages(torch.tensor(rms, dtype=torch.float64, device=self.device)))

    def _forward_step(
        self, data_iterator: Iterator[Batch], model: Any, *, embedding_noise_std: float
    ) -> tuple[Any, Callable[[RowLosses], tuple[Tensor, Tensor, Tensor]]]:
        batch = next(data_iterator)
        noise = None
        if embedding_noise_std > 0.0:
            rows = batch.logit_rows_R[: batch.num_rows]
            sample, position = batch.row_sample_R[: batch.num_rows], batch.row_position_R[: batch.num_rows]
            noise = EmbeddingNoise(embedding_noise_std, self.seed, rows, sample, position)
        return run_batch(model, batch, noise), partial(_loss, batch)

    def _measure(self, outputs: list[Tensor], grad_norm: float, flops: float) -> StepMeasurement:
        """Sum over data- and context-parallel ranks what the last stage knows; then every stage knows all."""
        first, last = self.bare_models[0], self.bare_models[-1]
        sums_M = torch.zeros(_NUM_SUMS + 2 * NOISE_BINS + 2, dtype=torch.float64, device=self.device)
        if last.post_process:
            sums_M[:-2] = torch.stack(outputs).sum(0)
            sums_M[-2] = flops
        dist.all_reduce(sums_M, group=self.groups.dp_cp)
        assert self.model_config.mask_token_id is not None  # checked when the data was opened
        if first.pre_process:
            sums_M[-1] = first.embedding.row_rms(self.model_config.mask_token_id)
        *values, flops, rms = self._sum_over_stages(sums_M).tolist()
        loss, denominator, ce, rows, correct, tokens, positions = values[:_NUM_SUMS]
        bins = zip(values[_NUM_SUMS:-NOISE_BINS], values[-NOISE_BINS:], strict=True)
        return StepMeasurement(
            loss=loss / max(denominator, 1.0),
            ce_masked=ce / max(rows, 1.0),
            accuracy=correct / max(rows, 1.0),
            num_rows=int(rows),
            num_tokens=int(tokens),
            num_positions=int(positions),
            grad_norm=grad_norm,
            mask_embedding_rms=rms,
            flops=flops / self.groups.world_size,
            ce_by_noise={level_name(i, NOISE_BINS): c / n for i, (c, n) in enumerate(bins) if n},
        )

    def _sum_over_stages(self, values: Tensor) -> Tensor:
        """Every value is zero on all pipeline stages but the one that knows it."""
        if self.groups.pp.size() > 1:
            dist.all_reduce(values, group=self.groups.pp)
        return values

    def _load_of_all_stages(self, load_LE: Tensor | None) -> Tensor | None:
        """Every MoE layer's load in the order of layers, from the loads of this stage's."""
        config = self.model_config
        if not config.is_moe or self.groups.pp.size() == 1:
            return load_LE
        load = torch.zeros(config.num_layers, config.moe.num_experts, dtype=torch.int64, device=self.device)
        if load_LE is not None:
            load[[router.layer_number - 1 for router in routers(self.bare_models)]] = load_LE
        load = self._sum_over_stages(load)
        return load[[layer for layer in range(config.num_layers) if config.is_moe_layer(layer)]]

    def _update(self, learning_rate: float, grad_norm: float) -> None:
        """Clip by the global norm and step, as Megatron's ``ChainedOptimizer.step`` does, with our learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_mult", 1.0)
        for optimizer in _chained(self.optimizer):
            parameters = optimizer.get_parameters()
            if parameters and optimizer.config.clip_grad > 0.0:
                megatron_optimizer.clip_grad_by_total_norm_fp32(parameters, optimizer.config.clip_grad, grad_norm)
        self.optimizer.step_with_ready_grads()
        self.num_updates += 1


def _chained(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Megatron keeps one optimizer for the experts and one for everything else."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _loss(batch: Batch, output: RowLosses) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's (loss sum, denominator, what to collect): the last is the vector that ``_measure`` unpacks."""
    n = batch.num_rows
    ce_R = output.cross_entropy_R[:n].double()
    bin_R = (batch.noise_levels_R[:n] * NOISE_BINS).ceil().long().clamp(1, NOISE_BINS) - 1
    by_noise = torch.zeros(2, NOISE_BINS, dtype=torch.float64, device=ce_R.device)
    by_noise[0].index_add_(0, bin_R, ce_R)
    by_noise[1].index_add_(0, bin_R, torch.ones_like(ce_R))
    # filled on the device: a copy of numbers from the host would wait for the forward pass
    denominator, rows, tokens, positions = (
        ce_R.new_full((), count) for count in (batch.denominator, n, batch.num_tokens, batch.input_ids_S.numel())
    )
    head = [output.loss_sum.detach().double(), denominator, ce_R.sum(), rows, output.correct_R[:n].sum().double()]
    metrics = torch.cat([torch.stack([*head, tokens, positions]), by_noise.flatten()])
    return output.loss_sum, denominator.int(), metrics
