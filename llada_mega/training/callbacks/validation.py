"""Held-out losses during a run, by the same evaluation that ``llada-mega eval`` uses."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from llada_mega.config.training import ValidationConfig
from llada_mega.data.sample import Sample
from llada_mega.evaluation.losses import evaluate
from llada_mega.evaluation.scoring import ModelScorer
from llada_mega.parallel import ParallelGroups
from llada_mega.training.callback import Callback
from llada_mega.training.state import StepMeasurement
from llada_mega.training.trainer import Trainer


class ValidationCallback(Callback):
    """Every ``validation.every`` steps and at the end; noise, masks and windows are the same each time."""

    name = phase = "validation"

    def __init__(self, config: ValidationConfig, samples: Sequence[Sample], seed: int) -> None:
        self.config, self.samples, self.seed = config, samples, seed
        self._last_step = -1

    def on_train_begin(self, trainer: Trainer) -> None:
        self._last_step = trainer.state.step or -1  # a resumed run was validated when it stopped

    def on_step_end(self, trainer: Trainer, measured: StepMeasurement, applied: bool) -> None:
        if self.config.every and trainer.state.step % self.config.every == 0:
            self._validate(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        if self.config.every and self._last_step != trainer.state.step:
            self._validate(trainer)

    def _validate(self, trainer: Trainer) -> None:
        self._last_step = trainer.state.step
        groups = trainer.step.groups
        result = evaluate(
            ModelScorer(*trainer.step.bare_models),
            self.samples,
            block_sizes=self.config.block_sizes,
            noise_levels=self.config.noise_levels,
            batch_size=self.config.batch_size,
            seed=self.seed,
            block_origin=trainer.config.data.block_origin,
            clean_tokens=trainer.config.data.clean_tokens,
            shard=(groups.dp.rank(), groups.dp.size()),
            reduce=partial(_sum_over, groups),
        )
        row: dict[str, Any] = {"step": trainer.state.step, "valid/ar_nll": result["ar_nll"]}
        for block_size, values in result["block_sizes"].items():
            row.update({f"valid/block_{block_size}/{name}": value for name, value in values.items()})
        trainer.log(row)


def _sum_over(groups: ParallelGroups, sums: Tensor) -> Tensor:
    sums = sums.to(groups.device)
    for group in (groups.dp_cp, groups.pp):
        dist.all_reduce(sums, group=group)
    return sums.cpu()
