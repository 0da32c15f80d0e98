"""How a run ended: for its caller, and as ``RUN/exit.json`` for whoever starts it again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llada_mega.checkpoint.directory import write_json
from llada_mega.training.state import TrainState

EXIT_FILE = "exit.json"


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
    path = run_dir / EXIT_FILE
    is_first = int(os.environ.get("RANK", "0")) == 0
    if is_first:
        path.unlink(missing_ok=True)
    status, reason = "failed", ""
    try:
        yield
        status, reason = ("stopped", outcome.stop_reason) if outcome.stop_reason else ("finished", "the last step")
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise
    finally:
        if is_first and run_dir.is_dir():
            state = outcome.state
            content = {
                "status": status,
                "step": state.step,
                "consumed_samples": state.consumed_samples,
                "reason": reason,
            }
            with contextlib.suppress(OSError):  # a full disk: what ended the run matters more
                write_json(path, content)
