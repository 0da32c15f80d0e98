"""A training run inside this process, with a clock at the places where the loop may wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console

from llada_mega.config.compose import compose
from llada_mega.config.schema import Config
from llada_mega.config.validate import validate
from llada_mega.training.callbacks.checkpointing import CheckpointCallback
from llada_mega.training.data import TrainingData
from llada_mega.training.run import run_training
from llada_mega.training.step import TrainStep


@dataclass
class Seconds:
    """Wall time of every step: waiting for its batches, the step itself, the checkpoint's hook after it; of the hook
    also the training thread's CPU time, which does not count what it waits for and what other programs take."""

    data: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    checkpoint: list[float] = field(default_factory=list)
    checkpoint_cpu: list[float] = field(default_factory=list)


def observe(run_dir: Path, overrides: Sequence[str]) -> Seconds:
    """Train a new run in ``run_dir``, which must not hold one."""
    config = compose(Config, [*overrides, f"run.dir={run_dir}", "logging.progress=false"])
    validate(config)
    seconds = Seconds()
    batches = TrainingData.batches

    def timed_batches(*args: Any, **kwargs: Any) -> Iterator[Any]:
        source = iter(batches(*args, **kwargs))
        draw = _timed(source.__next__, seconds.data)
        while True:
            try:
                yield draw()
            except StopIteration:
                return

    on_step_end = _timed(CheckpointCallback.on_step_end, seconds.checkpoint)
    with (
        mock.patch.object(TrainingData, "batches", timed_batches),
        mock.patch.object(TrainStep, "__call__", _timed(TrainStep.__call__, seconds.step)),
        mock.patch.object(
            CheckpointCallback, "on_step_end", _timed(on_step_end, seconds.checkpoint_cpu, time.thread_time)
        ),
    ):
        run_training(config, Console(quiet=True))
    return seconds


def _timed(
    function: Callable[..., Any], seconds: list[float], clock: Callable[[], float] = time.perf_counter
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = clock()
        result = function(*args, **kwargs)
        seconds.append(clock() - start)
        return result

    return call
