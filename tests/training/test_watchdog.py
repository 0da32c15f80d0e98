"""A run that stands still ends, names who is late, and leaves the stacks of all ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llada_mega.training.callbacks.watchdog import Place, Watchdog, late_ranks

TRAINER: Any = SimpleNamespace(state=SimpleNamespace(step=6))


def test_who_is_behind_is_late() -> None:
    ahead, behind = Place(7, 30, True, "step.py:1 (a)"), Place(7, 29, False, "loader.py:2 (b)")
    assert (
        late_ranks([ahead, behind, ahead]) == "rank 1 came no further than loader.py:2 (b) in step 7, the others wait"
    )


def test_of_equals_who_does_not_wait_is_late() -> None:
    waiting, working = Place(7, 30, True, "step.py:1 (a)"), Place(7, 30, False, "experts.py:2 (b)")
    assert late_ranks([working, waiting]).startswith("rank 0 came no further than experts.py:2 (b)")


def test_who_says_nothing_is_late() -> None:
    assert late_ranks([Place(7, 30, True), None, None]).startswith("ranks 1, 2 did not answer")


def test_equal_ranks_are_all_named() -> None:
    assert late_ranks([Place(7, 30, True, "x.py:1 (f)")] * 2) == "all ranks are at step 7, in x.py:1 (f)"


@pytest.fixture
def dogs(tmp_path: Path) -> Callable[[int], tuple[list[Watchdog], list[str]]]:
    def make(count: int) -> tuple[list[Watchdog], list[str]]:
        said: list[str] = []
        watch = [Watchdog(tmp_path, rank, count, 0.4, said.append) for rank in range(count)]
        return watch, said

    return make


def test_a_standstill_leaves_stacks_and_a_report(dogs: Any, tmp_path: Path) -> None:
    watch, said = dogs(2)
    for dog in watch:
        dog.on_train_begin(TRAINER)
    watch[0].on_step_begin(TRAINER)  # one hook further than rank 1
    for dog in watch:
        dog._thread.join(30)
    assert len(said) == 2 and said[0] == said[1]
    assert "no progress for 0.4 s; rank 1 came no further than test_watchdog.py:" in said[0]
    for rank in range(2):
        text = (tmp_path / "logs" / "hang" / f"rank_{rank:04d}.txt").read_text()
        assert "test_a_standstill_leaves_stacks_and_a_report" in text  # the main thread's
    assert json.loads((tmp_path / "logs" / "hang" / "rank_0000.json").read_text())["step"] == 7


@pytest.mark.parametrize("broken", [False, True])
def test_on_gpus_the_flight_recorder_is_left_beside_the_stacks(
    dogs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    """A stand-in for NCCL's; one that fails takes nothing else along."""

    def dump() -> bytes:
        if broken:
            raise RuntimeError("no recorder")
        return b"collectives"

    monkeypatch.setattr("torch._C._distributed_c10d._dump_nccl_trace", dump, raising=False)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    (dog,), said = dogs(1)
    dog.on_train_begin(TRAINER)
    dog._thread.join(30)
    traces = {path.name: path.read_bytes() for path in (tmp_path / "logs" / "hang").glob("nccl*")}
    assert traces == ({} if broken else {"nccl_trace_rank_0": b"collectives"})
    assert len(said) == 1


def test_signs_of_life_keep_it_quiet(dogs: Any, tmp_path: Path) -> None:
    """As long as hooks come in time; the clock is the watchdog's own."""
    (dog,), said = dogs(1)
    dog._patience = 1000.0
    dog.on_train_begin(TRAINER)
    dog.on_step_begin(TRAINER)
    dog.close()
    assert not dog._thread.is_alive() and not said
    assert not (tmp_path / "logs").exists()


def test_an_error_that_follows_from_the_standstill_does_not_hide_it(dogs: Any) -> None:
    """Another rank has ended: this one's main thread wakes up with an error while the stacks are gathered."""
    (dog,), said = dogs(1)
    dog.on_train_begin(TRAINER)
    while not dog._directory.joinpath("rank_0000.json").exists():
        time.sleep(0.01)
    dog.close()
    assert len(said) == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sleep", pytest.param("stop", marks=pytest.mark.full)])
def test_a_hung_rank_is_named(corpus: Path, tmp_path: Path, how: str) -> None:
    """Two real processes: rank 1 sleeps in its data, or is stopped by a signal."""
    action = "time.sleep(3600)" if how == "sleep" else "os.kill(os.getpid(), signal.SIGSTOP)"
    program = f"""
import os, signal, sys, time
from llada_mega.cli import main
from llada_mega.training import run
from llada_mega.training.callback import Callback
class Hang(Callback):
    def on_step_begin(self, trainer):
        if trainer.state.step == 2 and os.environ["RANK"] == "1":
            {action}
build = run.build_callbacks
run.build_callbacks = lambda *a: [Hang(), *build(*a)]
sys.exit(main(sys.argv[1:]))
"""
    run_dir = tmp_path / "run"
    arguments = ["train", f"run.dir={run_dir}", f"data.train={corpus}", "data.sequence_length=64"]
    arguments += ["trainer.hang_minutes=0.1", "curriculum.stages=[{block_size: 4, tokens: 5120}]"]
    launcher = f"""
import sys
from llada_mega.commands.processes import start_processes
sys.exit(start_processes(2, {arguments!r}, {str(run_dir)!r}, command=[sys.executable, "-c", {program!r}]))
"""
    finished = subprocess.run(
        [sys.executable, "-c", launcher], capture_output=True, text=True, timeout=300, check=False, env=os.environ
    )
    assert finished.returncode == 1
    late = "rank 1 came no further than" if how == "sleep" else "rank 1 did not answer"
    ended = json.loads((run_dir / "exit.json").read_text())
    assert (ended["status"], ended["step"]) == ("failed", 2)
    for told in (finished.stderr, ended["reason"]):
        assert f"no progress for 6 s; {late}" in told
    stacks = sorted(path.name for path in (run_dir / "logs" / "hang").glob("*.txt"))
    assert stacks == ["rank_0000.txt", "rank_0001.txt"][: 2 if how == "sleep" else 1]
