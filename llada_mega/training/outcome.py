"""How a run ended: for its caller, and as ``RUN/exit.json`` for whoever starts it again."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llada_mega.checkpoint.directory import write_json
from llada_mega.errors import TrainingError
from llada_mega.ranks import launched_rank, record_failure
from llada_mega.training.state import TrainState

logger = logging.getLogger("llada_mega")
EXIT_FILE = "exit.json"
STOP_FILE_REASON = "a STOP file"  # the one request after which nobody is to start the run again


@dataclass
class Outcome:
    """Where a run ended, and why when it is to go on later."""

    state: TrainState = field(default_factory=TrainState)
    stop_reason: str | None = None  # None: it finished


@contextlib.contextmanager
def recorded(outcome: Outcome, run_dir: Path) -> Iterator[None]:
    """Write how the body ended to ``RUN/exit.json``, on the first rank: finished, stopped on request, or failed.

    The file of an earlier process goes first: one that is killed leaves none.
    """
    if launched_rank() == 0:
        (run_dir / EXIT_FILE).unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        record_failed(outcome, run_dir, f"{type(error).__name__}: {error}".splitlines()[0])
        raise
    if outcome.stop_reason:
        _write(outcome, run_dir, "stopped", outcome.stop_reason, start_again=outcome.stop_reason != STOP_FILE_REASON)
    else:
        _write(outcome, run_dir, "finished", "the last step")


def record_failed(outcome: Outcome, run_dir: Path, reason: str) -> None:
    """Write ``RUN/exit.json`` of a run that failed, on the first rank."""
    if run_dir.is_dir():
        with contextlib.suppress(OSError):  # a full disk: what ended the run matters more
            _write(outcome, run_dir, "failed", reason)


def end_process(outcome: Outcome, run_dir: Path, message: str) -> None:
    """Leave ``message`` in all places where one looks for it, and go. For a thread, while the main thread cannot."""
    logger.error(message)
    record_failure(TrainingError(message))
    record_failed(outcome, run_dir, f"TrainingError: {message}")
    logging.shutdown()
    os._exit(1)


def _write(outcome: Outcome, run_dir: Path, status: str, reason: str, **more: bool) -> None:
    if launched_rank() == 0:
        position = {"step": outcome.state.step, "consumed_samples": outcome.state.consumed_samples}
        write_json(run_dir / EXIT_FILE, {"status": status, **position, "reason": reason, **more})
