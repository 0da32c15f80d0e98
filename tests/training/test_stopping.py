"""A run that is asked to stop saves, says so, and goes on later as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llada_mega.checkpoint.checkpoint import list_checkpoints
from llada_mega.config.schema import Config
from llada_mega.errors import TrainingError
from llada_mega.ranks import STOPPED_STATUS, StopSignals
from llada_mega.training import run as run_module
from llada_mega.training.callback import Callback
from llada_mega.training.run import run_training
from llada_mega.training.trainer import Trainer
from tests.parallel.harness import run_ranks
from tests.training.conftest import Train
from tests.training.rows import read_rows

Configure = Callable[..., Config]


class Event(Callback):
    """Calls a function when a step begins."""

    name = "event"

    def __init__(self, step: int, action: Callable[[], Any]) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, trainer: Trainer) -> None:
        if trainer.state.step + 1 == self.step:
            self.action()


def with_event(patch: pytest.MonkeyPatch, step: int, action: Callable[[], Any]) -> None:
    build = run_module.build_callbacks
    patch.setattr(run_module, "build_callbacks", lambda *a: [Event(step, action), *build(*a)])


def exit_file(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "exit.json").read_text())


def test_a_stop_file_in_the_last_step_does_not_stop_the_next_start(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        with_event(patch, 10, (tmp_path / "run" / "STOP").touch)
        assert run_training(configure("run"), Console(quiet=True)).stop_reason is None
    assert not (tmp_path / "run" / "STOP").exists()


@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "SIGINT", "STOP", "exit_after"])
def test_a_stopped_run_continues_bit_for_bit(
    configure: Configure, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    validation = ("trainer.validation.every=2", "trainer.validation.windows=4", "trainer.validation.block_sizes=[4]")
    whole = train("whole", *validation)
    config = configure("parts", *validation)
    run_dir = tmp_path / "parts"
    with monkeypatch.context() as patch, StopSignals() as signals:
        if how == "exit_after":
            config.trainer.exit_after = 0.5
            now = time.monotonic
            with_event(patch, 3, lambda: patch.setattr(time, "monotonic", lambda: now() + 31))
        elif how == "STOP":
            with_event(patch, 3, (run_dir / "STOP").touch)
        else:
            with_event(patch, 3, lambda: os.kill(os.getpid(), signal.Signals[how]))
        outcome = run_training(config, Console(quiet=True), signals)
    assert outcome.state.step == 3
    expected = {"STOP": "a STOP file", "exit_after": "trainer.exit_after=0.5 minutes are over"}.get(how, how)
    assert outcome.stop_reason == expected
    ended = {"status": "stopped", "step": 3, "consumed_samples": 12, "reason": expected, "start_again": how != "STOP"}
    assert exit_file(run_dir) == ended
    assert not (run_dir / "STOP").exists()
    assert [path.name for path in list_checkpoints(run_dir / "checkpoints")] == ["step_00000003"]

    assert train("parts", *validation) == whole
    assert exit_file(run_dir) == {"status": "finished", "step": 10, "consumed_samples": 40, "reason": "the last step"}
    for kind in ("loss", "valid/ar_nll"):
        assert read_rows(run_dir, kind) == read_rows(tmp_path / "whole", kind)


def test_a_signal_before_the_first_step_trains_nothing(configure: Configure, tmp_path: Path) -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        outcome = run_training(configure("run"), Console(quiet=True), signals)
    assert (outcome.state.step, outcome.stop_reason) == (0, "SIGTERM")
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []


def test_a_request_at_the_last_step_is_a_finished_run(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_event(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with StopSignals() as signals:
        outcome = run_training(configure("run", "trainer.max_steps=2"), Console(quiet=True), signals)
    assert outcome.stop_reason is None and exit_file(tmp_path / "run")["status"] == "finished"


def test_a_failure_is_recorded_and_an_older_record_goes_first(
    configure: Configure, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("run", "trainer.max_steps=2")
    seen = []

    def fail() -> None:
        seen.append((tmp_path / "run" / "exit.json").exists())
        raise TrainingError("the sky falls\nin two lines")

    with_event(monkeypatch, 4, fail)
    with pytest.raises(TrainingError):
        train("run")
    assert seen == [False]
    reason = "TrainingError: the sky falls"
    assert exit_file(tmp_path / "run") == {"status": "failed", "step": 3, "consumed_samples": 12, "reason": reason}


def test_a_second_interrupt_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)  # ignored where the tests run in the background of a script
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def stop_on_rank(config: Config, rank: int) -> tuple[int, str | None]:
    """Rank ``rank`` alone gets a signal during step 2."""

    def kill() -> None:
        if int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.MonkeyPatch.context() as patch, StopSignals() as signals:
        with_event(patch, 2, kill)
        outcome = run_training(config, Console(quiet=True), signals)
    return outcome.state.step, outcome.stop_reason


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_the_same_step(configure: Configure, tmp_path: Path) -> None:
    results = run_ranks(stop_on_rank, 2, config=configure("run", "trainer.micro_batch_size=1"), rank=1)
    assert results == [(2, "SIGUSR1")] * 2
    assert exit_file(tmp_path / "run")["step"] == 2


@pytest.mark.slow
def test_the_launcher_passes_a_signal_on_and_returns_the_status(corpus: Path, tmp_path: Path) -> None:
    """Two processes with data workers, asked by one Ctrl-C to the whole group, as a terminal sends it."""
    run_dir = tmp_path / "run"
    stages = "curriculum.stages=[{name: long, block_size: 4, tokens: 10000000}]"
    arguments = [f"run.dir={run_dir}", f"data.train={corpus}", "data.sequence_length=64", stages, "data.num_workers=1"]
    command = [sys.executable, "-m", "llada_mega", "train", *arguments, "launch.nproc=2"]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL) as process:
        metrics = run_dir / "metrics.jsonl"
        deadline = time.monotonic() + 300
        while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(300) == STOPPED_STATUS
    ended = exit_file(run_dir)
    assert (ended["status"], ended["reason"]) == ("stopped", "SIGINT")
    assert [path.name for path in list_checkpoints(run_dir / "checkpoints")] == [f"step_{ended['step']:08d}"]
