"""Starts the processes of one machine for ``launch.nproc``; across machines, torchrun does it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 10.0


def start_processes(count: int, arguments: Sequence[str]) -> int:
    """Runs ``python -m llada_mega <arguments>`` as ``count`` ranks and returns the status of the first that failed.

    When one rank fails the others are stopped: they would wait for it for ever. Rank 0 speaks for all; what another
    rank wrote to standard error is shown only if it was the one to fail.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        stack.callback(_stop, processes)
        errors = [None, *(stack.enter_context(tempfile.TemporaryFile()) for _ in range(1, count))]
        for rank, stream in enumerate(errors):
            command = [sys.executable, "-m", "llada_mega", *arguments]
            processes.append(subprocess.Popen(command, env=_environment(rank, count, port), stderr=stream))
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
    """The rank of the first process that failed, or None when all have ended well."""
    while True:
        statuses = [process.poll() for process in processes]
        for rank, status in enumerate(statuses):
            if status:
                return rank
        if all(status == 0 for status in statuses):
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
