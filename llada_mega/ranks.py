"""What a process of a distributed run does besides its work: it keeps a log, hears when to stop, leaves its last words.

Launchers, torchrun and ``launch.nproc`` alike, name a file for the error of each process in the environment
(``TORCHELASTIC_ERROR_FILE``, the protocol of ``torch.distributed.elastic.multiprocessing.errors``). They show the
earliest error, because the others only follow from it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from llada_mega.errors import LladaMegaError

ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
STOPPED_STATUS = 85  # exit status of a process that was asked to stop, saved its work and can go on later
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def launched_rank() -> int:
    """This process's rank as its launcher says, before there are process groups; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def usable_cores() -> int:
    """Cores that this process may run on: of a container, a job or ``taskset`` fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS


def has_launcher() -> bool:
    """True when errors of this process are shown by the one that started it."""
    return ERROR_FILE_VARIABLE in os.environ


def log_path(run_dir: str | Path, rank: int) -> Path:
    """``RUN/logs/rank_0005.log``."""
    return Path(run_dir) / "logs" / f"rank_{rank:04d}.log"


def describe_failure(error: BaseException) -> str:
    """One line for what a user can mend, a traceback for everything else."""
    if isinstance(error, LladaMegaError) and os.environ.get("LLADA_MEGA_DEBUG") != "1":
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()


def record_failure(error: BaseException) -> bool:
    """Write ``error`` where the launcher looks for it; the first call of a process counts.

    To be called before the process lets go of anything that other ranks wait for: their errors must be later.

    Returns:
        whether there is a launcher that will show it.
    """
    if not has_launcher() or isinstance(error, KeyboardInterrupt | SystemExit):
        return False
    words = {"py_callstack": describe_failure(error), "timestamp": str(int(time.time()))}
    with (
        contextlib.suppress(FileExistsError),
        Path(os.environ[ERROR_FILE_VARIABLE]).open("x", encoding="utf-8") as file,
    ):
        json.dump({"message": {"message": str(error), "extraInfo": words}}, file)
    return True


class StopSignals:
    """Notes the first of :data:`STOP_SIGNALS` while the context lasts, for the work to end when it can.

    A second Ctrl-C interrupts at once. The other signals may come again: launchers repeat them.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """Processes and threads that start in the context do not get :data:`STOP_SIGNALS`; this one does, afterwards.

    Terminals and Slurm signal every process of a group, and a data worker that died would end the run before it saved.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def rank_log(run_dir: str | Path) -> Iterator[None]:
    """Keep ``RUN/logs/rank_NNNN.log`` while the context lasts.

    It holds the log records and warnings of this process, its last error, and the stacks of a fatal signal. All but
    rank 0 also write there what they would have written to the terminal, C and C++ libraries included.
    """
    rank = launched_rank()
    path = log_path(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("a", encoding="utf-8"))
        stack.enter_context(_logging_to(path))
        if not faulthandler.is_enabled():
            faulthandler.enable(file)
            stack.callback(faulthandler.disable)
        if rank:
            stack.enter_context(_output_to(file.fileno()))
        try:
            yield
        except BaseException as error:
            file.write(describe_failure(error) + "\n")
            raise


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, ours = logging.getLogger(), logging.getLogger("llada_mega")
    level = ours.level
    root.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        ours.setLevel(level)
        root.removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def _output_to(descriptor: int) -> Iterator[None]:
    """Standard output and error of the whole process, not only Python's streams, go to ``descriptor``."""
    _flush()
    saved = [(number, os.dup(number)) for number in (1, 2)]
    for number, _ in saved:
        os.dup2(descriptor, number)
    try:
        yield
    finally:
        _flush()
        for number, copy in saved:
            os.dup2(copy, number)
            os.close(copy)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
