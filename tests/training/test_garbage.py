"""Garbage is collected in the steps that the configuration names, and Python's own collector comes back."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
from rich.console import Console

from llada_mega.config.schema import Config
from llada_mega.training import run as run_module
from llada_mega.training.callback import Callback
from llada_mega.training.run import run_training
from llada_mega.training.state import StepMeasurement
from llada_mega.training.trainer import Trainer


class Recorder(Callback):
    """After how many whole steps each full collection of a run stopped, and whether the collector was on."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.step, self.collections, self.was_on, self.fail_at = -1, [], set(), fail_at

    def on_train_begin(self, trainer: Trainer) -> None:
        self.step = 0
        gc.callbacks.append(self._note)

    def on_step_begin(self, trainer: Trainer) -> None:
        self.was_on.add(gc.isenabled())
        if trainer.state.step == self.fail_at:
            raise RuntimeError("a failing step")

    def on_step_end(self, trainer: Trainer, measured: StepMeasurement, applied: bool) -> None:
        self.step = trainer.state.step

    def close(self) -> None:
        if self._note in gc.callbacks:
            gc.callbacks.remove(self._note)

    def _note(self, phase: str, info: dict[str, int]) -> None:
        if phase == "stop" and info["generation"] == 2:
            self.collections.append(self.step)


def train(config: Config, recorder: Recorder) -> None:
    with pytest.MonkeyPatch.context() as patch:
        build = run_module.build_callbacks
        patch.setattr(run_module, "build_callbacks", lambda *a: [recorder, *build(*a)])
        run_training(config, Console(quiet=True))


def test_collections_come_at_multiples_only(configure: Callable[..., Config]) -> None:
    recorder = Recorder()
    train(configure("run", "trainer.gc_every=4"), recorder)
    assert recorder.collections == [0, 4, 8]
    assert recorder.was_on == {False}
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_the_collector_comes_back_after_an_error(configure: Callable[..., Config]) -> None:
    with pytest.raises(RuntimeError, match="a failing step"):
        train(configure("run", "trainer.gc_every=4"), Recorder(fail_at=3))
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_python_collects_as_it_likes_by_default(configure: Callable[..., Config]) -> None:
    recorder = Recorder()
    train(configure("run"), recorder)
    assert recorder.was_on == {True}
