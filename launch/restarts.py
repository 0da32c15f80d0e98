"""Whether a run goes on after its processes have ended, and when to give up.

The trainer says how it ended in ``RUN/exit.json``; how far it got is the newest complete checkpoint. A run that is
started again and again without a newer checkpoint is given up.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Exit statuses of a node's launcher. Slurm reports the highest of all nodes: these stand above the 1 of a torchrun.
FINISHED, FAILED, MISTAKE, UNFIT, AGAIN, GIVE_UP = 0, 1, 2, 3, 85, 86
EXIT_FILE, RECORD_FILE = "exit.json", "restarts.json"
DEFAULT_LIMIT = 3
FINAL = (MISTAKE, UNFIT, GIVE_UP)  # end a job, whatever the other nodes end with


@dataclass(frozen=True)
class Record:
    """``RUN/restarts.json``: the starts of one run by one scheduler's job."""

    run_id: str | None
    step: int  # of the newest complete checkpoint when it was started
    without_progress: int = 0  # starts in a row that found no newer checkpoint


@dataclass(frozen=True)
class Verdict:
    """Exit status of the launcher and the reason, for the log."""

    status: int
    reason: str


def newest_step(run_dir: Path) -> int:
    """Step of the newest complete checkpoint; 0 when there is none."""
    steps = [0]
    for marker in (run_dir / "checkpoints").glob("step_*/COMPLETE"):
        with contextlib.suppress(ValueError):
            steps.append(int(marker.parent.name.removeprefix("step_")))
    return max(steps)


def next_record(previous: Record | None, run_id: str | None, step: int) -> Record:
    """The record of a start that finds ``step``. Another job, or none that counts, begins anew."""
    if previous is None or run_id is None or previous.run_id != run_id or step > previous.step:
        return Record(run_id, step)
    return Record(run_id, step, previous.without_progress + 1)


def begin(run_dir: Path, run_id: str | None, limit: int) -> Verdict | None:
    """Count this start and forget how the last one ended; a verdict when the run is to be given up."""
    previous = None
    with contextlib.suppress(OSError, ValueError, TypeError):
        previous = Record(**json.loads((run_dir / RECORD_FILE).read_text()))
    record = next_record(previous, run_id, newest_step(run_dir))
    if record.without_progress > limit:
        return _give_up(record, limit)
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = run_dir / f".{RECORD_FILE}.tmp"
    temporary.write_text(json.dumps(asdict(record)) + "\n")
    temporary.replace(run_dir / RECORD_FILE)
    (run_dir / EXIT_FILE).unlink(missing_ok=True)
    return None


def tell_counted(variables: Mapping[str, str]) -> None:
    """Take this start off the count that ``slurm/job.sh`` keeps in ``STARTS_FILE``: the launcher has counted it."""
    if path := variables.get("STARTS_FILE"):
        Path(path).unlink(missing_ok=True)


def tell_verdict(variables: Mapping[str, str], status: int) -> None:
    """Leave a :data:`FINAL` status to ``slurm/job.sh`` in ``VERDICT_FILE``.

    The other nodes wait for this one in vain, and are killed: their higher status would hide it.
    """
    if status in FINAL and (path := variables.get("VERDICT_FILE")):
        Path(path).write_text(f"{status}\n")


def judge(run_dir: Path, torchrun_status: int, limit: int) -> Verdict:
    """What follows from the way in which the processes of this start ended."""
    ended = read_exit(run_dir)
    if torchrun_status == 0 or ended.get("status") == "finished":
        return Verdict(FINISHED, "finished")
    reason = str(ended.get("reason") or f"torchrun ended with status {torchrun_status}")
    if ended.get("status") == "stopped":
        how = f"stopped at step {ended.get('step')}: {reason}"
        if not ended.get("start_again", True):
            return Verdict(FINISHED, f"{how}; not started again")
    else:
        how = f"failed: {reason}"
    record = Record(**json.loads((run_dir / RECORD_FILE).read_text()))
    if record.run_id is None:  # nobody counts the starts, so whoever started this decides
        return Verdict(AGAIN if ended.get("status") == "stopped" else FAILED, how)
    record = next_record(record, record.run_id, newest_step(run_dir))
    if record.without_progress > limit:
        given_up = _give_up(record, limit)
        return Verdict(given_up.status, f"{how}; {given_up.reason}")
    return Verdict(AGAIN, how)


def read_exit(run_dir: Path) -> dict[str, Any]:
    """``RUN/exit.json``, or nothing when the processes could not write it."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads((run_dir / EXIT_FILE).read_text())
        if isinstance(content, dict):
            return content
    return {}


def _give_up(record: Record, limit: int) -> Verdict:
    return Verdict(
        GIVE_UP, f"given up: {limit} restarts brought no checkpoint beyond step {record.step} (MAX_RESTARTS={limit})"
    )
