"""One row a logged step: composed here, written by the sinks in ``sinks.py``; docs/monitoring.md explains it."""

from __future__ import annotations

import operator
import time
from functools import reduce
from typing import Any

import psutil
import torch

from llada_mega.config.model import ModelConfig
from llada_mega.data.batch import Batch
from llada_mega.data.context import RankWork
from llada_mega.training.callback import Callback
from llada_mega.training.peak import peak_flops
from llada_mega.training.state import StepMeasurement
from llada_mega.training.trainer import Trainer


class MetricsCallback(Callback):
    """Turns measurements into rows.

    Times are those of the first rank. Its state keeps the times of a run over all its processes.

    Args:
        peak_tflops: what a device does at most, in place of the table's value.
    """

    name = "metrics"

    def __init__(self, peak_tflops: float | None = None) -> None:
        self._peak_tflops = peak_tflops
        self._context_work: RankWork | None = None
        self._began: float | None = None  # when the run began, in seconds of the epoch
        self._step_seconds = 0.0  # of every step up to here, once each, whichever process made it
        self._earlier_seconds = 0.0  # of training in earlier processes, up to the checkpoint that followed
        self._process_began = time.perf_counter()
        self._reset()

    def on_train_begin(self, trainer: Trainer) -> None:
        self._began = self._began or time.time()
        self._process_began = time.perf_counter()
        self._peak = peak_flops(trainer.config.trainer.dtype, self._peak_tflops)
        trainer.step.timeline.take()  # what came before is not the run's

    def on_step_begin(self, trainer: Trainer) -> None:
        self._step_began = time.perf_counter()

    def on_batches(self, trainer: Trainer, batches: list[Batch]) -> None:
        ranks = trainer.step.groups.cp.size()
        if ranks > 1:
            parts = [RankWork.of(batch, ranks, trainer.step.work_tile) for batch in batches]
            self._context_work = reduce(operator.add, parts)

    def on_step_end(self, trainer: Trainer, measured: StepMeasurement, applied: bool) -> None:
        # Steps alone, with their data: validation and checkpoints between them do not count.
        seconds = time.perf_counter() - self._step_began
        self._seconds += seconds
        self._step_seconds += seconds
        self._tokens += measured.num_tokens
        self._positions += measured.num_positions
        self._flops += measured.flops
        if trainer.state.step % trainer.config.trainer.log_every and trainer.state.step != trainer.last_step:
            return
        row = self._position(trainer) | self._losses(trainer, measured) | self._speed(trainer)
        row["applied"] = applied
        if measured.expert_load is not None:
            row |= expert_balance(trainer.config.model, measured.expert_load)
        if self._context_work is not None:  # of the first data-parallel rank's samples
            row["cp_positions"] = self._context_work.positions_R.tolist()
            row["cp_position_imbalance"] = self._context_work.position_imbalance
            row["cp_attention_pairs"] = self._context_work.pairs_R.tolist()
            row["cp_attention_imbalance"] = self._context_work.pair_imbalance
        trainer.log(row)
        self._reset()

    def _position(self, trainer: Trainer) -> dict[str, Any]:
        """Where the run stands. The row describes the step just made: its stage is that of its first sample."""
        consumed = trainer.state.consumed_samples - trainer.config.trainer.global_batch_size
        stage = trainer.curriculum.stage_at(consumed)
        return {
            "step": trainer.state.step,
            "stage": stage.name,
            "block_size": stage.block_size,
            "layout": stage.layout,
            "consumed_samples": trainer.state.consumed_samples,
            "consumed_tokens": trainer.state.consumed_tokens,
            "lr": trainer.curriculum.learning_rate(consumed),
            "embedding_noise_std": trainer.curriculum.embedding_noise_std(consumed, trainer.state.embedding_rms),
        }

    def _losses(self, trainer: Trainer, measured: StepMeasurement) -> dict[str, Any]:
        return {
            "loss": measured.loss,
            "ce_masked": measured.ce_masked,
            "accuracy": measured.accuracy,
            "mask_ratio": measured.mask_ratio,
            "grad_norm": measured.grad_norm,
            "mask_embedding_rms": measured.mask_embedding_rms,
            "ce_by_noise": measured.ce_by_noise,
        }

    def _speed(self, trainer: Trainer) -> dict[str, Any]:
        """Rates since the last row, shares of all the time since then, and the run's account of time."""
        flops_per_s = self._flops / self._seconds
        spent = trainer.step.timeline.take()
        total = sum(spent.values())
        return {
            "tokens_per_s": self._tokens / self._seconds,
            "positions_per_s": self._positions / self._seconds,
            "tflops_per_device": flops_per_s / 1e12,
            "mfu": flops_per_s / self._peak if self._peak else None,
            "memory_gib": memory_gib(),
            "time_share": {phase: seconds / total for phase, seconds in spent.items() if total > 0},
            "train_seconds": self._train_seconds(),
            "goodput": self._goodput(),
        }

    def _train_seconds(self) -> float:
        return self._earlier_seconds + time.perf_counter() - self._process_began

    def _goodput(self) -> float:
        """Time in steps that the run is made of over all time since it began."""
        assert self._began is not None
        return self._step_seconds / max(time.time() - self._began, self._step_seconds)

    def _reset(self) -> None:
        self._tokens = self._positions = 0
        self._flops = self._seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"began": self._began, "step_seconds": self._step_seconds, "train_seconds": self._train_seconds()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._began, self._step_seconds = state["began"], state["step_seconds"]
        self._earlier_seconds = state["train_seconds"]
        self._process_began = time.perf_counter()  # a rollback loads while the process goes on


def expert_balance(config: ModelConfig, load_LE: torch.Tensor) -> dict[str, Any]:
    """How evenly the tokens went to the experts.

    Args:
        config: says which layers are mixtures.
        load_LE: int64 [MoE layers, experts], tokens that went to each.
    """
    load_LE = load_LE.cpu().double()
    over_mean_L = (load_LE.amax(1) / load_LE.mean(1).clamp(min=1e-9)).tolist()
    layers = [layer for layer in range(config.num_layers) if config.is_moe_layer(layer)]
    return {
        "expert_load_max_over_mean": max(over_mean_L),
        "expert_load_by_layer": {str(layer): value for layer, value in zip(layers, over_mean_L, strict=True)},
        "dead_experts": int((load_LE == 0).sum()),
    }


def memory_gib() -> float:
    """Device memory in use at its peak in GiB; on a CPU the resident set of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30
