"""``launch.nproc`` and torchrun: logs, the first error, signals, Ctrl-C. All with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llada_mega.cli import main
from llada_mega.commands import processes
from llada_mega.commands.processes import start_processes
from llada_mega.errors import TrainingError
from llada_mega.ranks import ERROR_FILE_VARIABLE, log_path, record_failure

PRELUDE = """
import os, signal, sys, time
from llada_mega.errors import TrainingError
from llada_mega.ranks import record_failure
rank = int(os.environ["RANK"])
def fail(words):
    record_failure(TrainingError(words))
    sys.exit(2)
"""
# torchrun makes a directory of its own in /tmp when it is given none, and leaves it there.
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--log-dir=torchrun")


def run_program(tmp_path: Path, count: int, program: str) -> int:
    """The status of ``program`` on ``count`` ranks; it knows ``rank`` and ``fail(words)``."""
    return start_processes(count, [], tmp_path, command=[sys.executable, "-c", PRELUDE + program])


def train_arguments(name: str) -> list[str]:
    return ["train", "data.train=corpus", "trainer.max_steps=2", "logging.progress=false", f"run.name={name}"]


def metrics(name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_as_one_under_both_launchers(corpus: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(train_arguments("alone")) == 0
    assert main([*train_arguments("nproc"), "launch.nproc=2"]) == 0
    torchrun = [sys.executable, *TORCHRUN, "--master-port=0"]
    subprocess.run([*torchrun, "-m", "llada_mega", *train_arguments("torchrun")], check=True, timeout=300)
    printed = capfd.readouterr()
    assert "not installed" not in printed.err
    alone = metrics("alone")
    assert len(alone) == 2
    for name in ("nproc", "torchrun"):
        for one, two in zip(alone, metrics(name), strict=True):
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert two["consumed_tokens"] == one["consumed_tokens"]
        logs = sorted(path.name for path in Path(f"runs/{name}/logs").glob("rank_*"))
        assert logs == ["rank_0000.log", "rank_0001.log"]


def test_nobody_else_gets_the_port_before_the_first_rank_listens(tmp_path: Path) -> None:
    """Which takes the seconds of its imports."""
    program = """
import socket
port = int(os.environ["MASTER_PORT"])
with socket.socket() as other:
    try:
        other.bind(("127.0.0.1", port))
    except OSError:
        pass
    else:
        sys.exit(3)
from torch.distributed import TCPStore
TCPStore("127.0.0.1", port, 1, is_master=True)
"""
    assert run_program(tmp_path, 1, program) == 0


def test_the_error_that_came_first_is_shown_whatever_its_rank(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = f"""
told = "{tmp_path}/told_"  # each rank fails after the next one has, however long they take to start
while rank < 2 and not os.path.exists(told + str(rank + 1)):
    time.sleep(0.01)
time.sleep(0.1)
fail(f"rank {{rank}} is ill")
open(told + str(rank), "w").close()
time.sleep(9)
"""
    assert run_program(tmp_path, 3, program) == 2
    assert capfd.readouterr().err == "error (rank 2): rank 2 is ill\n"


def test_an_error_that_follows_from_the_first_does_not_hide_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 1 raises while rank 0 waits for it in a collective, and takes its time to go."""
    program = """
from llada_mega.config.run import ParallelConfig
from llada_mega.parallel import destroy, initialize
import torch.distributed as dist
groups = initialize(ParallelConfig())
try:
    try:
        if rank == 1:
            time.sleep(1)
            raise ValueError("the cause")
        dist.barrier()
    finally:
        destroy()
except Exception as error:
    time.sleep(0.5 * rank)
    record_failure(error)
    sys.exit(1)
"""
    assert run_program(tmp_path, 2, program) == 1
    shown = capfd.readouterr().err
    assert "ValueError: the cause" in shown
    assert "error (rank 1): the traceback is above" in shown
    assert "Connection closed" not in shown


def test_a_rank_that_dies_by_a_signal_is_named_with_its_last_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    program = """
if rank == 1:
    time.sleep(0.5)
    print("about to crash", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
time.sleep(60)
"""
    monkeypatch.setattr(processes, "GRACE_SECONDS", 1.0)
    assert run_program(tmp_path, 2, program) == 128 + signal.SIGSEGV
    shown = capfd.readouterr().err
    assert shown.splitlines()[-2:] == [
        "about to crash",
        f"error (rank 1): rank 1 was killed by SIGSEGV; its log is {log_path(tmp_path, 1)}",
    ]


def test_who_dies_silently_died_before_who_complains_of_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # Rank 1 holds a lock for as long as it lives; rank 0 complains as soon as it can have it.
    program = f"""
import fcntl
with open({str(tmp_path / "lock")!r}, "w") as lock:
    if rank == 1:
        fcntl.flock(lock, fcntl.LOCK_EX)
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)
    fcntl.flock(lock, fcntl.LOCK_EX)
    fail("lost a peer")
"""
    assert run_program(tmp_path, 2, program) == 128 + signal.SIGKILL
    assert "rank 1 was killed by SIGKILL (was there enough memory?)" in capfd.readouterr().err


def test_a_rank_that_ignores_the_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.5)
    program = """
if rank == 1:
    time.sleep(1)
    fail("ill")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(600)
"""
    start = time.monotonic()
    assert run_program(tmp_path, 2, program) == 2
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_interrupts_end_all_ranks(tmp_path: Path, sent: signal.Signals, status: int) -> None:
    program = f"""
import os, pathlib, time
directory = pathlib.Path({str(tmp_path)!r})
(directory / os.environ["RANK"]).write_text(str(os.getpid()))
try:
    time.sleep(600)
except KeyboardInterrupt:
    (directory / ("interrupted_" + os.environ["RANK"])).touch()
"""
    launcher = f"""
import sys
from llada_mega.commands.processes import start_processes
try:
    sys.exit(start_processes(2, [], {str(tmp_path)!r}, command=[sys.executable, "-c", {program!r}]))
except KeyboardInterrupt:
    sys.exit(130)
"""
    with subprocess.Popen([sys.executable, "-c", launcher]) as process:
        files = [tmp_path / "0", tmp_path / "1"]
        deadline = time.monotonic() + 60
        while not all(file.exists() and file.read_text() for file in files) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(sent)
        assert process.wait(30) == status
    for file in files:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
    assert len(list(tmp_path.glob("interrupted_*"))) == (2 if sent == signal.SIGINT else 0)


def test_torchrun_shows_our_line_once_a_rank(corpus: Path) -> None:
    torchrun = [sys.executable, *TORCHRUN]
    command = [*torchrun, "-m", "llada_mega", "train", "data.train=nowhere", "run.name=bad"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode
    assert (
        "data.train.0.path=nowhere: there is no nowhere.bin; build it with `llada-mega data build`" in finished.stderr
    )
    assert "Root Cause" in finished.stderr
    assert "To enable traceback" not in finished.stderr
    assert 'File "' not in finished.stderr.split("Root Cause")[1]  # no traceback of ours


def test_ranks_that_end_well_return_zero(tmp_path: Path) -> None:
    assert start_processes(2, ["mask", "documents=[4]"], tmp_path) == 0
    assert log_path(tmp_path, 1).stat().st_size > 0


def test_the_first_failure_of_a_process_is_the_one_it_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not record_failure(TrainingError("nobody listens"))
    monkeypatch.setenv(ERROR_FILE_VARIABLE, str(tmp_path / "error.json"))
    assert not record_failure(KeyboardInterrupt())
    assert record_failure(TrainingError("first"))
    assert record_failure(ValueError("second"))
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert message["message"] == message["extraInfo"]["py_callstack"] == "first"
    assert int(message["extraInfo"]["timestamp"]) == pytest.approx(time.time(), abs=60)


def test_a_rank_log_holds_records_and_output_of_all_but_rank_0(tmp_path: Path) -> None:
    program = f"""
import logging, os
from llada_mega.errors import TrainingError
from llada_mega.ranks import rank_log
try:
    with rank_log({str(tmp_path)!r}):
        logging.getLogger("llada_mega.training").info("a record")
        print("printed")
        os.write(2, b"from a C library\\n")
        raise TrainingError("the end")
except TrainingError:
    print("after", flush=True)
"""
    shown = {}
    for rank in (0, 3):
        environment = os.environ | {"RANK": str(rank)}
        command = [sys.executable, "-c", program]
        shown[rank] = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (shown[0].stdout, shown[0].stderr) == ("printed\nafter\n", "from a C library\n")
    assert (shown[3].stdout, shown[3].stderr) == ("after\n", "")
    first, other = log_path(tmp_path, 0).read_text(), log_path(tmp_path, 3).read_text()
    assert "INFO llada_mega.training: a record" in first
    assert "printed" not in first
    for words in ("INFO llada_mega.training: a record", "printed\n", "from a C library", "the end\n"):
        assert words in other
