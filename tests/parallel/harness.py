"""Runs functions on N gloo processes without paying N imports.

``run_ranks(function, world_size, **arguments)`` sends a job to one server process per pytest process. The server has
imported torch, Megatron-Core and this project once and forks the ranks of each job. Ranks find each other as under
torchrun (the environment of torchelastic), at a port that the server has bound, so jobs of several pytest processes
never meet. A rank that raises, dies or hangs ends its job with a :class:`RankError`; the server lives on.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, BinaryIO

TIMEOUT_SECONDS = 120.0
_GRACE_SECONDS = 2.0  # for the other ranks to say why they fail, once one has failed
_ROOT = Path(__file__).resolve().parents[2]


class RankError(Exception):
    """A rank raised, died or hung; the message holds its traceback or stack and what it printed."""


def run_ranks(
    function: Callable[..., Any] | str, world_size: int, *, timeout: float = TIMEOUT_SECONDS, **arguments: Any
) -> list[Any]:
    """The results of ``function(**arguments)`` on every rank, in the order of ranks.

    Args:
        function: of a module that the server can import, or "module:name". RANK, WORLD_SIZE and the rest of
            torchrun's environment are set when it is called; it makes its process groups itself.
        timeout: seconds for all ranks together.
        arguments: anything that can be pickled, like the results.

    Raises:
        RankError: the first error of a rank, or the stacks of all ranks that were still running at the timeout.
    """
    name = function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"
    server = _server()
    server.send_bytes(pickle.dumps((name, world_size, timeout, arguments)))
    try:
        error, results = pickle.loads(server.recv_bytes())
    except EOFError:
        _server.cache_clear()
        raise RankError("the server of the ranks died; its error is on standard error") from None
    if error is not None:
        raise RankError(error)
    return [pickle.loads(result) for result in results]


@functools.cache
def _server() -> Connection:
    """The connection to this process's server, which is started on first use and ends with this process."""
    ours, theirs = Pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.parallel.harness", str(theirs.fileno())],
        cwd=_ROOT,
        env=os.environ | {"PYTHONPATH": f"{_ROOT}:{_ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    atexit.register(lambda: (ours.close(), process.wait()))
    return ours


# ---- the server ------------------------------------------------------------------------------------------------------


@dataclass
class _Rank:
    number: int
    pid: int
    connection: Connection
    output: BinaryIO
    result: bytes | None = None
    error: str | None = None

    @property
    def is_running(self) -> bool:
        return self.result is None and self.error is None

    def printed(self) -> str:
        self.output.seek(0)
        return self.output.read().decode(errors="replace")[-4000:]

    def receive(self) -> None:
        try:
            succeeded, content = pickle.loads(self.connection.recv_bytes())
        except EOFError:
            _, status = os.waitpid(self.pid, 0)
            self.pid = 0
            self.error = f"rank {self.number} died: {describe_exit(os.waitstatus_to_exitcode(status))}"
        else:
            self.result, self.error = (content, None) if succeeded else (None, f"rank {self.number}: {content}")

    def end(self) -> None:
        """Ranks wait for this after their result, so that none loses a peer that it still talks to."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self.connection.close()
        self.output.close()


def describe_exit(code: int) -> str:
    """``exit status 3`` or ``signal SIGSEGV`` from the return code of a process."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def serve(client: Connection) -> None:
    """Run jobs until the client is gone."""
    _import_everything()
    while True:
        try:
            name, world_size, timeout, arguments = pickle.loads(client.recv_bytes())
        except EOFError:
            return
        try:
            module, _, function = name.partition(":")
            work = functools.partial(getattr(importlib.import_module(module), function), **arguments)
        except Exception:
            answer: tuple[str | None, list[bytes | None]] = (traceback.format_exc(), [])
        else:
            answer = _run_job(client, work, world_size, timeout)
        client.send_bytes(pickle.dumps(answer))


def _import_everything() -> None:
    from llada_mega.parallel import cpu_runtime

    cpu_runtime.install()
    warnings.simplefilter("ignore")  # Megatron-Core lists what is not installed
    for module in ("llada_mega.training.run", "megatron.core.pipeline_parallel.schedules", "tests.models.helpers"):
        importlib.import_module(module)


def _run_job(
    client: Connection, work: Callable[[], Any], world_size: int, timeout: float
) -> tuple[str | None, list[bytes | None]]:
    listener = socket.create_server(("127.0.0.1", 0))
    ranks = [_fork(rank, world_size, listener, client, work) for rank in range(world_size)]
    listener.close()
    deadline = time.monotonic() + timeout
    first_error: str | None = None
    try:
        while running := {rank.connection: rank for rank in ranks if rank.is_running}:
            ready = wait([*running, client], max(0.0, deadline - time.monotonic()))
            if client in ready:  # nothing is sent during a job: the client is gone
                sys.exit(1)
            if not ready:
                break
            for connection in ready:
                rank = running[connection]  # type: ignore[index]
                rank.receive()
                if rank.error is not None and first_error is None:
                    first_error = f"{rank.error}\n{rank.printed()}"
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if first_error is None and (late := [rank for rank in ranks if rank.is_running]):
            first_error = _stacks(late, timeout)
        return first_error, [rank.result for rank in ranks]
    finally:
        for rank in ranks:
            rank.end()


def _stacks(ranks: list[_Rank], timeout: float) -> str:
    for rank in ranks:
        os.kill(rank.pid, signal.SIGUSR1)
    time.sleep(0.5)
    numbers = ", ".join(str(rank.number) for rank in ranks)
    return f"rank {numbers}: not done after {timeout:g} s\n" + "\n".join(f"{r.number}: {r.printed()}" for r in ranks)


def _fork(rank: int, world_size: int, listener: socket.socket, client: Connection, work: Callable[[], Any]) -> _Rank:
    ours, theirs = Pipe()
    output = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the rank)
    pid = os.fork()
    if pid:
        theirs.close()
        return _Rank(rank, pid, ours, output)
    try:
        client.close()
        ours.close()
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        faulthandler.register(signal.SIGUSR1, file=output, all_threads=False)
        store = _rendezvous(rank, world_size, listener)
        try:
            answer = (True, pickle.dumps(work()))
        except BaseException:
            answer = (False, traceback.format_exc())
        sys.stdout.flush()
        theirs.send_bytes(pickle.dumps(answer))
        theirs.recv_bytes()  # until the server ends this process
        del store
    finally:
        os._exit(1)


def _rendezvous(rank: int, world_size: int, listener: socket.socket) -> Any:
    """torchelastic's environment; rank 0 plays the agent that holds the store."""
    from torch.distributed import TCPStore

    host, port = listener.getsockname()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    if rank:
        listener.close()
        return None
    return TCPStore(host, port, is_master=True, master_listen_fd=listener.detach(), wait_for_workers=False)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
