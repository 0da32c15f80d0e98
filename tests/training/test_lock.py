"""Two processes never train in one directory."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from llada_mega.errors import TrainingError
from llada_mega.training.lock import only_run_in

HOLDER = """
import sys, time
from pathlib import Path
from llada_mega.training.lock import only_run_in
with only_run_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def hold(directory: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(directory), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_another_process_is_named(tmp_path: Path) -> None:
    with hold(tmp_path, 600) as holder:
        with pytest.raises(TrainingError, match=f"process {holder.pid} on "), only_run_in(tmp_path, patience=0.0):
            pass
        holder.kill()
        holder.wait()
        with only_run_in(tmp_path):  # however it ended
            pass


def test_a_start_waits_for_the_one_before_it(tmp_path: Path) -> None:
    with hold(tmp_path, 1.0) as holder, only_run_in(tmp_path, patience=60.0):
        assert holder.wait() == 0
    with only_run_in(tmp_path, patience=0.0):
        pass


def test_only_the_first_rank_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with only_run_in(tmp_path):
        monkeypatch.setenv("RANK", "1")
        began = time.monotonic()
        with only_run_in(tmp_path, patience=600.0):
            assert time.monotonic() - began < 300
