"""One optimizer step over a global batch, through Megatron-Core's schedules.

Legend of shape suffixes: B batch (always 1), S positions, R rows with logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from llada_mega.data.batch import Batch
from llada_mega.evaluation.losses import level_name
from llada_mega.models import EmbeddingNoise, RowLosses, discard_expert_load, mask_carrier, update_expert_bias
from llada_mega.parallel import ParallelGroups
from llada_mega.training.flops import batch_flops
from llada_mega.training.state import NOISE_BINS, StepMeasurement

Accept = Callable[[StepMeasurement], bool]


class TrainStep:
    """Forward and backward over micro-batches, gradient reduction, clipping, AdamW.

    The loss is the sum of weighted token losses of the whole global batch over one denominator: Megatron sums
    gradients and divides once by the all-reduced count (``calculate_per_token_loss``), so micro-batch and rank
    splits do not change it.

    Args:
        model: the Megatron DDP wrapper of a ``BlockDiffusionModel``.
        optimizer: from ``get_megatron_optimizer``.
        groups: process groups.
        seed: the run's seed, for the embedding noise.
        device: where batches go.
    """

    def __init__(
        self, model: Any, optimizer: MegatronOptimizer, groups: ParallelGroups, *, seed: int, device: torch.device
    ) -> None:
        self.model, self.optimizer, self.groups, self.seed, self.device = model, optimizer, groups, seed, device
        self.bare_model = model.module
        self._forward_backward = get_forward_backward_func()
        megatron_config = self.bare_model.config
        megatron_config.grad_scale_func = optimizer.scale_loss
        megatron_config.finalize_model_grads_func = finalize_model_grads

    def __call__(
        self, batches: list[Batch], *, learning_rate: float, embedding_noise_std: float, accept: Accept
    ) -> tuple[StepMeasurement, bool]:
        """Run one step.

        Args:
            batches: this rank's micro-batches.
            learning_rate: for every parameter group (times its ``lr_mult``).
            embedding_noise_std: std of the noise on MASK embeddings; 0 for none.
            accept: sees the measurements before the optimizer runs; False leaves the weights unchanged.
        Returns:
            measurements over all ranks, and whether the optimizer ran.
        """
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = self._forward_backward(
            forward_step_func=partial(self._forward_step, embedding_noise_std=embedding_noise_std),
            data_iterator=iter(batches),
            model=self.model,
            num_microbatches=len(batches),
            seq_length=batches[0].input_ids_S.numel(),
            micro_batch_size=1,
            forward_only=False,
        )
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        measured = self._reduce(outputs, grad_norm)
        measured.flops = sum(batch_flops(self.bare_model.model_config, batch) for batch in batches)
        applied = accept(measured)
        if applied:
            self._update(learning_rate, grad_norm)
            measured.expert_load = update_expert_bias(self.bare_model)
        else:
            discard_expert_load(self.bare_model)
        return measured, applied

    def _forward_step(
        self, data_iterator: Iterator[Batch], model: Any, *, embedding_noise_std: float
    ) -> tuple[Any, Callable[[RowLosses], tuple[Tensor, Tensor, Tensor]]]:
        batch = next(data_iterator).to(self.device)
        noise = None
        if embedding_noise_std > 0.0:
            rows = batch.logit_rows_R[: batch.num_rows]
            sample, position = batch.row_sample_R[: batch.num_rows], batch.row_position_R[: batch.num_rows]
            noise = EmbeddingNoise(embedding_noise_std, self.seed, rows, sample, position)
        output = model(
            batch.input_ids_S[None],
            batch.position_ids_S[None],
            mask_carrier.pack(batch.mask),
            padding_mask_BS=batch.padding_S[None],
            logit_rows_R=batch.logit_rows_R,
            labels_R=batch.labels_R,
            weights_R=batch.weights_R,
            embedding_noise=noise,
        )
        return output, partial(_loss, batch)

    def _reduce(self, outputs: list[Tensor], grad_norm: float) -> StepMeasurement:
        """Sum the micro-batches' metric vectors over all data-parallel ranks."""
        total = torch.stack(outputs).sum(0)
        torch.distributed.all_reduce(total, group=self.groups.dp_cp)
        loss, denominator, ce, rows, correct, tokens, positions = total[:7].tolist()
        bins = total[7:].reshape(2, NOISE_BINS).tolist()
        by_noise = {level_name(i, NOISE_BINS): c / n for i, (c, n) in enumerate(zip(*bins, strict=True)) if n}
        return StepMeasurement(
            loss=loss / max(denominator, 1.0),
            ce_masked=ce / max(rows, 1.0),
            accuracy=correct / max(rows, 1.0),
            num_rows=int(rows),
            num_tokens=int(tokens),
            num_positions=int(positions),
            grad_norm=grad_norm,
            ce_by_noise=by_noise,
        )

    def _update(self, learning_rate: float, grad_norm: float) -> None:
        """Clip by the global norm and step, as Megatron's ``ChainedOptimizer.step`` does, with our learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_mult", 1.0)
        for optimizer in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            parameters = optimizer.get_parameters()
            if parameters and optimizer.config.clip_grad > 0.0:
                megatron_optimizer.clip_grad_by_total_norm_fp32(parameters, optimizer.config.clip_grad, grad_norm)
        self.optimizer.step_with_ready_grads()


def _loss(batch: Batch, output: RowLosses) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's (loss sum, denominator, what to collect): the last is the vector that ``_reduce`` unpacks."""
    n = batch.num_rows
    ce_R = output.cross_entropy_R[:n].double()
    bin_R = (batch.noise_levels_R[:n] * NOISE_BINS).ceil().long().clamp(1, NOISE_BINS) - 1
    by_noise = torch.zeros(2, NOISE_BINS, dtype=torch.float64, device=ce_R.device)
    by_noise[0].index_add_(0, bin_R, ce_R)
    by_noise[1].index_add_(0, bin_R, torch.ones_like(ce_R))
    counts = torch.tensor(
        [batch.denominator, n, batch.num_tokens, batch.input_ids_S.numel()], dtype=torch.float64, device=ce_R.device
    )
    denominator, rows, tokens, positions = counts.unbind()
    head = [output.loss_sum.detach().double(), denominator, ce_R.sum(), rows, output.correct_R[:n].sum().double()]
    metrics = torch.cat([torch.stack([*head, tokens, positions]), by_noise.flatten()])
    return output.loss_sum, torch.tensor(batch.denominator, dtype=torch.int32, device=ce_R.device), metrics
