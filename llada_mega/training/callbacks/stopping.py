"""Ends a run on request, at the same step on every rank."""

from __future__ import annotations

import enum
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from llada_mega.ranks import StopSignals, has_launcher
from llada_mega.training.callback import Callback
from llada_mega.training.outcome import STOP_FILE_REASON
from llada_mega.training.state import StepMeasurement
from llada_mega.training.trainer import Trainer

STOP_FILE = "STOP"


class Request(enum.IntEnum):
    """What a run may be asked by besides signals; where ranks differ, the largest number counts."""

    NONE = 0
    TIME_IS_UP = 100
    ORPHANED = 101
    STOP_FILE = 102


class StopCallback(Callback):
    """Stops after a signal to any rank, ``trainer.exit_after``, a file ``RUN/STOP``, or when the launcher is gone.

    Ranks agree by one small all-reduce a step, made where the host has just waited for the device anyway.

    Args:
        exit_after: minutes from ``began``, on the first rank's clock.
        signals: those that this process has got; None: it listens to none.
        began: ``time.monotonic()`` when the run began.
    """

    name = "stop"

    def __init__(self, run_dir: Path, exit_after: float | None, signals: StopSignals | None, began: float) -> None:
        self._stop_file, self._signals = run_dir / STOP_FILE, signals
        self._deadline = None if exit_after is None else began + 60 * exit_after
        self._exit_after = exit_after
        # Only a launcher's end counts: a shell that started this process may well go first.
        self._launcher = os.getppid() if has_launcher() else None

    def on_train_begin(self, trainer: Trainer) -> None:
        self._agree(trainer)

    def accept_step(self, trainer: Trainer, measured: StepMeasurement) -> bool:
        self._agree(trainer)
        return True

    def on_train_end(self, trainer: Trainer) -> None:
        if trainer.writes_files:
            self._stop_file.unlink(missing_ok=True)  # it came in the last step: the next start is to train

    def on_stop(self, trainer: Trainer) -> None:
        if trainer.writes_files:
            self._stop_file.unlink(missing_ok=True)  # obeyed: the next start is to train
            trainer.warn(f"stopped: {trainer.stop_reason}")

    def _agree(self, trainer: Trainer) -> None:
        request = torch.tensor(self._request(trainer), device=trainer.step.groups.device)
        dist.all_reduce(request, op=dist.ReduceOp.MAX)
        if number := int(request):
            trainer.stop(self._describe(number))

    def _request(self, trainer: Trainer) -> int:
        if trainer.writes_files and self._stop_file.exists():
            return Request.STOP_FILE
        if self._launcher is not None and os.getppid() != self._launcher:
            return Request.ORPHANED
        if trainer.writes_files and self._deadline is not None and time.monotonic() >= self._deadline:
            return Request.TIME_IS_UP
        received = self._signals.received if self._signals is not None else None
        return Request.NONE if received is None else int(received)

    def _describe(self, number: int) -> str:
        if number == Request.STOP_FILE:
            return STOP_FILE_REASON
        if number == Request.TIME_IS_UP:
            return f"trainer.exit_after={self._exit_after:g} minutes are over"
        return "the launcher is gone" if number == Request.ORPHANED else signal.Signals(number).name
