"""One row a logged step: composed here, written by the sinks in ``sinks.py``."""

from __future__ import annotations

import operator
import time
from functools import reduce
from typing import Any

import psutil
import torch

from llada_mega.data.batch import Batch
from llada_mega.data.context import RankWork
from llada_mega.training.callback import Callback
from llada_mega.training.state import StepMeasurement
from llada_mega.training.trainer import Trainer

# Dense bf16 peak of one device in FLOP/s, from the vendors' data sheets; MFU is null for a device not listed.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "GB200": 2500e12, "A100": 312e12}


class MetricsCallback(Callback):
    """Turns measurements into rows (names fixed in the documentation of ``metrics.jsonl``)."""

    name = "metrics"

    def __init__(self) -> None:
        self._context_work: RankWork | None = None
        self._reset()

    def on_step_begin(self, trainer: Trainer) -> None:
        self._step_began = time.perf_counter()

    def on_batches(self, trainer: Trainer, batches: list[Batch]) -> None:
        ranks = trainer.step.groups.cp.size()
        if ranks > 1:
            parts = [RankWork.of(batch, ranks, trainer.step.work_tile) for batch in batches]
            self._context_work = reduce(operator.add, parts)

    def on_step_end(self, trainer: Trainer, measured: StepMeasurement, applied: bool) -> None:
        # Steps alone, with their data: validation and checkpoints between them do not count.
        self._seconds += time.perf_counter() - self._step_began
        self._tokens += measured.num_tokens
        self._positions += measured.num_positions
        self._flops += measured.flops
        if trainer.state.step % trainer.config.trainer.log_every and trainer.state.step != trainer.last_step:
            return
        seconds = self._seconds
        # The row describes the step that was just made, so the stage is the one at its first sample.
        consumed = trainer.state.consumed_samples - trainer.config.trainer.global_batch_size
        stage = trainer.curriculum.stage_at(consumed)
        flops_per_s = self._flops / seconds
        peak = peak_flops()
        row: dict[str, Any] = {
            "step": trainer.state.step,
            "stage": stage.name,
            "block_size": stage.block_size,
            "layout": stage.layout,
            "consumed_samples": trainer.state.consumed_samples,
            "consumed_tokens": trainer.state.consumed_tokens,
            "loss": measured.loss,
            "ce_masked": measured.ce_masked,
            "accuracy": measured.accuracy,
            "mask_ratio": measured.mask_ratio,
            "grad_norm": measured.grad_norm,
            "lr": trainer.curriculum.learning_rate(consumed),
            "embedding_noise_std": trainer.curriculum.embedding_noise_std(consumed, trainer.state.embedding_rms),
            "mask_embedding_rms": measured.mask_embedding_rms,
            "ce_by_noise": measured.ce_by_noise,
            "applied": applied,
            "tokens_per_s": self._tokens / seconds,
            "positions_per_s": self._positions / seconds,
            "tflops_per_device": flops_per_s / 1e12,
            "mfu": flops_per_s / peak if peak else None,
            "memory_gib": memory_gib(),
        }
        if measured.expert_load is not None:
            load = measured.expert_load.float()
            row["expert_load_max_over_mean"] = float((load.amax(1) / load.mean(1).clamp(min=1e-9)).max())
            row["dead_experts"] = int((load == 0).sum())
        if self._context_work is not None:  # of the first data-parallel rank's samples
            row["cp_positions"] = self._context_work.positions_R.tolist()
            row["cp_position_imbalance"] = self._context_work.position_imbalance
            row["cp_attention_pairs"] = self._context_work.pairs_R.tolist()
            row["cp_attention_imbalance"] = self._context_work.pair_imbalance
        trainer.log(row)
        self._reset()

    def _reset(self) -> None:
        self._tokens = self._positions = 0
        self._flops = self._seconds = 0.0


def peak_flops() -> float | None:
    """Peak FLOP/s of this device in bf16, or None when it is not known (every CPU)."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for key, peak in sorted(PEAK_FLOPS.items(), reverse=True) if key in name), None)


def memory_gib() -> float:
    """Device memory in use at its peak in GiB; on a CPU the resident set of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30
