"""Starts the processes of one machine for ``launch.nproc``; across machines, torchrun does it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack

COMMAND = (sys.executable, "-m", "llada_mega")
_POLL_SECONDS = 0.1
_ALIKE_SECONDS = 5.0  # between ranks that fail for the same reason
_GRACE_SECONDS = 10.0  # to end after SIGTERM


def start_processes(count: int, arguments: Sequence[str], command: Sequence[str] = COMMAND) -> int:
    """Runs ``<command> <arguments>`` as ``count`` ranks and returns the status of the first that failed.

    When one rank fails the others are stopped: they would wait for it for ever. Rank 0 speaks for all; what another
    rank wrote to standard error is shown only if it was the one to fail.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leave no rank behind
        stack.callback(signal.signal, signal.SIGTERM, previous)
        stack.callback(_stop, processes)
        errors = [None, *(stack.enter_context(tempfile.TemporaryFile()) for _ in range(1, count))]
        for rank, stream in enumerate(errors):
            processes.append(
                subprocess.Popen([*command, *arguments], env=_environment(rank, count, port), stderr=stream)
            )
        failed = _wait(processes)
        if failed is None:
            return 0
        stream = errors[failed]
        if stream is not None:
            stream.seek(0)
            sys.stderr.write(stream.read().decode(errors="replace"))
        return abs(processes[failed].returncode)


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    return environment


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """The rank that failed, or None when all have ended well.

    A mistake that all ranks find ends each of them at its own time: rank 0 gets some seconds to be the one that failed.
    """
    deadline = None
    while True:
        statuses = [process.poll() for process in processes]
        failed = [rank for rank, status in enumerate(statuses) if status]
        if failed:
            deadline = deadline or time.monotonic() + _ALIKE_SECONDS
            if statuses[0] is not None or time.monotonic() > deadline:
                return failed[0]
        elif all(status == 0 for status in statuses):
            return None
        time.sleep(_POLL_SECONDS)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    for process in running:
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
