"""Signals on their way from the launcher to the ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from launch.processes import TorchRun

ROOT = Path(__file__).resolve().parents[2]
# Stands for torchrun: starts a rank and a process that is none; ends with the rank's status made 1, as torchrun does.
PARENT = """
import os, subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=os.environ | {"RANK": "0"})
other = subprocess.Popen(["sleep", "60"])
status = rank.wait()
alive = other.poll() is None
other.kill()
sys.exit(1 if status == 85 and alive else 7)
"""
RANK = """
import pathlib, signal, sys, time
heard = []
def stop(number, frame):
    print("heard", signal.Signals(number).name, flush=True)
    sys.exit(85)
time.sleep(float(sys.argv[1]) if len(sys.argv) > 1 else 0)
signal.signal(signal.SIGUSR1, stop)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""
LAUNCHER = """
import os, sys
import launch.processes
launch.processes.REPEAT_SECONDS = 0.2
run = launch.processes.TorchRun([sys.executable, "-c", sys.argv[1], sys.argv[2]], os.environ)
print("started", flush=True)
status = run.run()
print(status, run.received.name, flush=True)
"""


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_ranks_hear_the_signal_and_torchrun_does_not(sent: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, PARENT, RANK], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        lines = iter(launcher.stdout.readline, "")
        assert next(line for line in lines if line == "ready\n")
        launcher.send_signal(sent)
        assert [line.strip() for line in lines] == [f"heard {sent.name}", f"1 {sent.name}"]


def test_a_rank_that_was_still_starting_hears_it_later() -> None:
    """SIGUSR1 to the whole process group, as from Slurm, before anybody but the launcher listens."""
    late = RANK.replace("float(sys.argv[1]) if len(sys.argv) > 1 else 0", "1.5")
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, PARENT, late],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "started\n"
        time.sleep(0.5)
        os.killpg(launcher.pid, signal.SIGUSR1)
        assert [line.strip() for line in launcher.stdout][-2:] == ["heard SIGUSR1", "1 SIGUSR1"]


def test_a_rank_that_has_ended_does_not_keep_the_signal_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[signal.Signals] = []

    def end() -> dict[str, str]:
        raise psutil.NoSuchProcess(1)

    gone = SimpleNamespace(environ=end)
    alive = SimpleNamespace(environ=lambda: {"RANK": "1"}, send_signal=heard.append)
    monkeypatch.setattr("psutil.Process.children", lambda torchrun: [gone, alive])
    run = TorchRun([], {})
    run.received, run._process = signal.SIGTERM, SimpleNamespace(pid=os.getpid())
    run._forward()
    assert heard == [signal.SIGTERM]


@pytest.mark.parametrize(("statuses", "expected"), [("85 85", 85), ("85 1", 1)])
def test_status_85_comes_through_torchrun(tmp_path: Path, statuses: str, expected: int) -> None:
    """The first rank ends last: torchrun terminates it, and the other's status counts. Nothing stays behind."""
    rank = f"set -- {statuses}; shift $RANK; [ $RANK = 1 ] || sleep 0.5; exit $1"
    command = [
        sys.executable,
        "-m",
        "launch.agent",
        "--standalone",
        "--nproc-per-node=2",
        "--no-python",
        "sh",
        "-c",
        rank,
    ]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == expected, ended.stderr
    assert ("Root Cause" in ended.stderr) == (expected == 1)
    assert not list(tmp_path.iterdir())
    assert "launch_agent" not in ended.stderr  # no traceback of torchrun's own
