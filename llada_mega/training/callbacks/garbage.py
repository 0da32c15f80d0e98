"""Collects Python's garbage on all ranks in the same step.

Left alone, each rank collects when its own counters say so, and all others wait for it: at any step some rank of
thousands is at it.
"""

from __future__ import annotations

import gc

from llada_mega.training.callback import Callback
from llada_mega.training.state import StepMeasurement
from llada_mega.training.trainer import Trainer


class GarbageCallback(Callback):
    """Turns the collector off and runs it after every multiple of ``every`` steps.

    What exists before the first step (modules, parameters, the libraries) is not looked at again.
    """

    name = "garbage"

    def __init__(self, every: int) -> None:
        self._every = every
        self._was_on: bool | None = None  # None: not begun

    def on_train_begin(self, trainer: Trainer) -> None:
        self._was_on = gc.isenabled()
        gc.disable()
        gc.collect()
        gc.freeze()

    def on_step_end(self, trainer: Trainer, measured: StepMeasurement, applied: bool) -> None:
        if trainer.state.step % self._every == 0:
            gc.collect()

    def close(self) -> None:
        if self._was_on is None:
            return
        gc.unfreeze()
        if self._was_on:
            gc.enable()
        self._was_on = None
