"""When a run is started again, and when it is given up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.restarts import AGAIN, FAILED, FINISHED, GIVE_UP, begin, judge, newest_step

LIMIT = 2


def save(run_dir: Path, step: int) -> None:
    directory = run_dir / "checkpoints" / f"step_{step:08d}"
    directory.mkdir(parents=True)
    (directory / "COMPLETE").touch()


def leave(run_dir: Path, **content: Any) -> None:
    (run_dir / "exit.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("status", "content", "verdict"),
    [
        (0, {}, FINISHED),
        (1, {"status": "finished", "step": 9}, FINISHED),
        (1, {"status": "stopped", "step": 9, "reason": "SIGUSR1", "start_again": True}, AGAIN),
        (1, {"status": "stopped", "step": 9, "reason": "trainer.exit_after=3600"}, AGAIN),
        (1, {"status": "stopped", "step": 9, "reason": "a STOP file", "start_again": False}, FINISHED),
        (1, {"status": "failed", "step": 9, "reason": "loss is not finite"}, AGAIN),
        (1, {}, AGAIN),  # a killed rank says nothing
        (-9, {}, AGAIN),
    ],
)
def test_verdicts_of_the_first_start(tmp_path: Path, status: int, content: dict[str, Any], verdict: int) -> None:
    assert begin(tmp_path, "job", LIMIT) is None
    if content:
        leave(tmp_path, **content)
    assert judge(tmp_path, status, LIMIT).status == verdict


def test_starts_without_a_newer_checkpoint_end(tmp_path: Path) -> None:
    """The first start and LIMIT restarts; the last one already says that there will be no other."""
    verdicts = []
    for _ in range(LIMIT + 1):
        assert begin(tmp_path, "job", LIMIT) is None
        leave(tmp_path, status="failed", reason="always")
        verdicts.append(judge(tmp_path, 1, LIMIT))
    assert [verdict.status for verdict in verdicts] == [AGAIN, AGAIN, GIVE_UP]
    assert "failed: always; given up: 2 restarts brought no checkpoint beyond step 0" in verdicts[-1].reason


def test_starts_that_end_without_a_verdict_are_counted_too(tmp_path: Path) -> None:
    """A lost node takes the launcher along; Slurm requeues by itself."""
    assert [begin(tmp_path, "job", LIMIT) is None for _ in range(LIMIT + 2)] == [True, True, True, False]
    refused = begin(tmp_path, "job", LIMIT)
    assert refused is not None
    assert refused.status == GIVE_UP


def test_progress_and_a_new_job_begin_a_new_count(tmp_path: Path) -> None:
    for step in (1, 2):
        for _ in range(LIMIT):
            assert begin(tmp_path, "job", LIMIT) is None
        save(tmp_path, step)
        assert judge(tmp_path, 1, LIMIT).status == AGAIN
    for _ in range(LIMIT + 1):
        begin(tmp_path, "job", LIMIT)
    assert begin(tmp_path, "job", LIMIT) is not None
    assert begin(tmp_path, "another job", LIMIT) is None


def test_without_a_scheduler_nothing_is_counted(tmp_path: Path) -> None:
    for _ in range(LIMIT + 3):
        assert begin(tmp_path, None, LIMIT) is None
    assert judge(tmp_path, 1, LIMIT).status == FAILED
    leave(tmp_path, status="stopped", reason="SIGTERM")
    assert judge(tmp_path, 1, LIMIT).status == AGAIN


def test_a_start_forgets_how_the_last_one_ended(tmp_path: Path) -> None:
    leave(tmp_path, status="finished")
    begin(tmp_path, "job", LIMIT)
    assert judge(tmp_path, 1, LIMIT).status == AGAIN


@pytest.mark.parametrize("damage", ["", "[1]", '{"step": 3}'])
def test_a_damaged_record_begins_anew(tmp_path: Path, damage: str) -> None:
    (tmp_path / "restarts.json").write_text(damage)
    assert begin(tmp_path, "job", LIMIT) is None


def test_the_newest_step_is_that_of_a_complete_checkpoint(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == 0
    save(tmp_path, 5)
    (tmp_path / "checkpoints" / "step_00000007").mkdir()
    (tmp_path / "checkpoints" / "superseded" / "step_00000009").mkdir(parents=True)
    assert newest_step(tmp_path) == 5
