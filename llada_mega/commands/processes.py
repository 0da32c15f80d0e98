"""Starts the processes of one machine for ``launch.nproc``; across machines, torchrun does it.

The processes see the same environment as under torchrun and report errors in the same way (:mod:`llada_mega.ranks`).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from llada_mega.ranks import ERROR_FILE_VARIABLE, STOP_SIGNALS, STOPPED_STATUS, log_path, usable_cores

COMMAND = (sys.executable, "-m", "llada_mega")
GRACE_SECONDS = 10.0  # for the other ranks to end by themselves, and again after they were asked to
_POLL_SECONDS = 0.05
_BURIAL_SECONDS = 1.0  # between the moment at which a killed process lets go of others and its end
_LAST_LINES = 20  # of the log of a rank that died without a word


@dataclass
class _Process:
    rank: int
    process: subprocess.Popen[bytes]
    error_file: Path
    log: Path
    seen_alive: float = 0.0

    @property
    def has_failed(self) -> bool:
        return self.process.poll() not in (None, 0, STOPPED_STATUS) or (
            self.process.returncode is None and self.error_file.exists()
        )

    @property
    def failed_at(self) -> float:
        """When it said so, else the last time it was known to live: who died silently died before who complained.

        The connections of a killed process close some time before its end can be seen.
        """
        if self.error_file.exists():
            return self.error_file.stat().st_mtime
        return self.seen_alive - _BURIAL_SECONDS * (self.process.returncode == -signal.SIGKILL)


def start_processes(count: int, arguments: Sequence[str], run_dir: str | Path, command: Sequence[str] = COMMAND) -> int:
    """Runs ``<command> <arguments>`` as ``count`` ranks and returns 0, or the status of the rank that failed first.

    When one rank fails the others are stopped: they would wait for it for ever. The earliest error is shown, whichever
    rank's it is. Rank 0 has the terminal; the output of the others goes to their logs in ``run_dir``.

    Signals that ask to stop go to all ranks, which may take their time to save: the status is then
    ``STOPPED_STATUS``. After a second Ctrl-C they have ``GRACE_SECONDS``.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; the ranks were interrupted and have ended.
    """
    processes: list[_Process] = []
    with ExitStack() as stack:
        # Bound until the end, so that nobody else is given the port while the ranks still import; not listening, and
        # open to reuse, so that the first rank can listen there.
        holder = stack.enter_context(socket.socket())
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        received: list[signal.Signals] = []
        for number in STOP_SIGNALS:
            previous = signal.signal(number, lambda caught, _: received.append(signal.Signals(caught)))
            stack.callback(signal.signal, number, previous)
        errors = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llada_mega_")))
        stack.callback(_stop, processes, signal.SIGTERM)
        for rank in range(count):
            error_file, log = errors / f"{rank}.json", log_path(run_dir, rank)
            log.parent.mkdir(parents=True, exist_ok=True)
            output = stack.enter_context(log.open("ab")) if rank else None
            process = subprocess.Popen(
                [*command, *arguments],
                env=_environment(rank, count, port, error_file),
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches this process, which passes it on once
            )
            processes.append(_Process(rank, process, error_file, log, time.time()))
        first = _wait(processes, received)
        stopped = any(process.process.returncode == STOPPED_STATUS for process in processes)
        if signal.SIGINT in received and (first is not None or not stopped):
            _stop(processes, signal.SIGINT)
            raise KeyboardInterrupt
        if first is None:
            return STOPPED_STATUS if stopped else 0
        _settle(processes)
        if first.process.poll() in [-number for number in received]:  # the ranks did not listen yet
            return 128 - first.process.returncode
        print(_last_words(first), file=sys.stderr)
        code = first.process.poll()
        return 1 if not code else 128 - code if code < 0 else code


def _environment(rank: int, count: int, port: int, error_file: Path) -> dict[str, str]:
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        ERROR_FILE_VARIABLE: error_file,
    }
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // count)))
    return environment


def _wait(processes: Sequence[_Process], received: Sequence[signal.Signals]) -> _Process | None:
    """The rank that failed first, or None when all have ended well. Passes on what is ``received`` meanwhile."""
    passed_on = 0
    while True:
        if any(process.has_failed for process in processes):
            _settle(processes, _BURIAL_SECONDS)
            return min((process for process in processes if process.has_failed), key=lambda process: process.failed_at)
        if all(process.process.returncode is not None for process in processes):
            return None
        for number in received[passed_on:]:
            passed_on += 1
            if number == signal.SIGINT and signal.SIGINT in received[: passed_on - 1]:
                _stop(processes, signal.SIGINT)
                raise KeyboardInterrupt
            for process in processes:
                process.process.send_signal(number)
        now = time.time()
        for process in processes:
            if process.process.returncode is None:
                process.seen_alive = now
        time.sleep(_POLL_SECONDS)


def _settle(processes: Sequence[_Process], seconds: float | None = None) -> None:
    """Ranks that lost a peer notice it and close their files; those that do not are stopped later."""
    deadline = time.monotonic() + (GRACE_SECONDS if seconds is None else seconds)
    while any(process.process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _last_words(process: _Process) -> str:
    name = "error" if process.rank == 0 else f"error (rank {process.rank})"
    if process.error_file.exists():
        words = json.loads(process.error_file.read_text("utf-8"))["message"]["extraInfo"]["py_callstack"]
        if "\n" not in words:
            return f"{name}: {words}"
        return f"{words}\n{name}: the traceback is above, more in {process.log}"
    code = process.process.returncode
    cause = f"ended with status {code}"
    if code < 0:
        cause = f"was killed by {signal.Signals(-code).name}"
        cause += " (was there enough memory?)" if -code == signal.SIGKILL else ""
    said = process.log.read_text("utf-8", errors="replace").splitlines()[-_LAST_LINES:] if process.log.exists() else []
    return "\n".join([*said, f"{name}: rank {process.rank} {cause}; its log is {process.log}"])


def _stop(processes: Sequence[_Process], with_signal: signal.Signals) -> None:
    running = [process.process for process in processes if process.process.poll() is None]
    for process in running:
        process.send_signal(with_signal)
    deadline = time.monotonic() + GRACE_SECONDS
    try:
        for process in running:
            process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:  # also when Ctrl-C is pressed a second time
        for process in running:
            process.kill()
            process.wait()
