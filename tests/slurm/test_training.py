"""The whole: ``sbatch slurm/cpt_100b.sh`` trains a tiny model over two nodes, and over limits, kills and cancels."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from llada_mega.data.index_file import IndexWriter
from tests.slurm.cluster import SlurmCluster

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.full, pytest.mark.xdist_group("slurm")]  # one cluster, one run left alone

COMPARED = ("loss", "ce_masked", "mask_ratio", "grad_norm", "lr", "consumed_samples", "consumed_tokens")
LAST_STEP = 40
# The experiment at the size of a test: two stages, a mixture of experts, validation and checkpoints as wanted here.
TINY = """
model=tiny_ling model.vocab_size=257 model.mask_token_id=256 model.num_layers=3 model.hidden_size=64
model.num_attention_heads=4 parallel=single parallel.backend=gloo data=default data.train=corpus data.valid_fraction=0.1
data.sequence_length=64 data.num_workers=1 trainer=default trainer.init=null trainer.global_batch_size=4
trainer.log_every=1 checkpoint=default logging=default logging.progress=false
"""
STAGES = "curriculum.stages=[{name: a, block_size: 4, tokens: 5120}, {name: b, block_size: 64, tokens: 5120}]"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory to submit from, with a corpus."""
    directory = tmp_path_factory.mktemp("workspace")
    generator = np.random.default_rng(0)
    with IndexWriter(str(directory / "corpus"), np.dtype(np.uint16)) as writer:
        for length in generator.integers(20, 300, 400).tolist():
            steps = generator.integers(1, 4, length)
            writer.add((np.cumsum(steps) % 250).astype(np.uint16), [length])
        writer.finish()
    yield directory


class Job:
    """One submission of ``slurm/cpt_100b.sh``, unchanged, on two nodes with one process each."""

    def __init__(self, cluster: SlurmCluster, workspace: Path, name: str, *overrides: str, **variables: str) -> None:
        self.cluster, self.workspace, self.run = cluster, workspace, workspace / "runs" / name
        variables |= {"LLADA_MEGA_HOME": str(ROOT), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        command = ["sbatch", "--parsable", "--nodes=2", "--mem=1500", "--time=60", f"--chdir={workspace}"]
        arguments = [*TINY.split(), STAGES, f"run.name={name}", *overrides]
        sent = cluster.command(*command, str(ROOT / "slurm" / "cpt_100b.sh"), *arguments, **variables)
        self.number = sent.stdout.strip()

    def wait(self, *states: str) -> dict[str, str]:
        """The job's fields once it is in one of ``states``, or has failed."""
        fields = self.cluster.wait_for_job(self.number, *states, "FAILED", "TIMEOUT", timeout=600)
        assert fields["JobState"] in states, self.log()
        return fields

    def log(self) -> str:
        path = self.workspace / f"cpt_100b_{self.number}.log"
        return path.read_text() if path.exists() else ""

    def _rows(self) -> list[dict[str, Any]]:
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [row for row in (json.loads(line) for line in lines if line.endswith("\n")) if "loss" in row]

    def steps(self) -> list[int]:
        """Steps in the order in which they were trained; those that a restart trained again come twice."""
        return [row["step"] for row in self._rows()]

    def rows(self) -> dict[int, dict[str, Any]]:
        """The last row of every step: what must not depend on interruptions."""
        return {row["step"]: {key: row[key] for key in COMPARED} for row in self._rows()}

    def hold_at(self, step: int) -> list[psutil.Process]:
        """The ranks of both nodes, suspended after ``step`` was trained: what comes next does not depend on speed."""
        self.cluster.wait_for(lambda: bool(self.steps()) and self.steps()[-1] >= step, f"step {step}", 300)
        ranks = [process for process in psutil.process_iter() if self._is_rank(process)]
        assert len(ranks) == 2
        for process in ranks:
            process.suspend()
        assert self.steps()[-1] < LAST_STEP
        return ranks

    def _is_rank(self, process: psutil.Process) -> bool:
        """A training process itself: its data workers have the same command line, but not torchrun as parent."""
        with contextlib.suppress(psutil.Error):
            parent = process.parent()
            own, parents = process.cmdline(), parent.cmdline() if parent else []
            return f"run.name={self.run.name}" in own and "launch.agent" in parents and "launch.agent" not in own
        return False


@pytest.fixture(scope="module")
def uninterrupted(cluster: SlurmCluster, workspace: Path) -> dict[int, dict[str, Any]]:
    """The rows of a run that nothing disturbs."""
    job = Job(cluster, workspace, "uninterrupted", PREFLIGHT="off")
    job.wait("COMPLETED")
    assert job.steps() == list(range(1, LAST_STEP + 1))
    return job.rows()


def test_a_run_over_its_time_limit_equals_an_uninterrupted_one(
    cluster: SlurmCluster, workspace: Path, uninterrupted: dict[int, dict[str, Any]]
) -> None:
    """No checkpoint is due by steps: it is there because Slurm sent USR1 before the limit."""
    job = Job(cluster, workspace, "limited")
    ranks = job.hold_at(10)
    cluster.command("scontrol", "update", f"JobId={job.number}", "TimeLimit=8")  # less than the script's 600 s from now
    cluster.wait_for(lambda: "asking for a checkpoint" in job.log(), "USR1", 120)
    for process in ranks:
        process.resume()
    cluster.wait_for(lambda: cluster.job(job.number)["Restarts"] == "1", "the requeue", 120)
    cluster.command("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    assert job.wait("COMPLETED")["Restarts"] == "1"
    assert "stopped at step" in job.log() and "requeued with status 85, restart 1" in job.log()
    assert job.log().count("preflight:") == 2
    assert job.steps() == list(range(1, LAST_STEP + 1))  # nothing lost, nothing trained twice
    assert job.rows() == uninterrupted


def test_a_killed_rank_goes_on_from_the_last_checkpoint(
    cluster: SlurmCluster, workspace: Path, uninterrupted: dict[int, dict[str, Any]]
) -> None:
    job = Job(cluster, workspace, "killed", "checkpoint.every=10", PREFLIGHT="off")
    first, second = job.hold_at(13)
    second.kill()
    first.resume()
    assert job.wait("COMPLETED")["Restarts"] == "1"
    assert "launch: runs/killed: failed:" in job.log()
    steps = job.steps()
    again = next(index for index in range(1, len(steps)) if steps[index] != steps[index - 1] + 1)
    assert steps[again:] == list(range(steps[again], LAST_STEP + 1))
    assert (steps[again] - 1) % 10 == 0
    assert job.rows() == uninterrupted


def test_scancel_saves_and_the_next_submission_goes_on(
    cluster: SlurmCluster, workspace: Path, uninterrupted: dict[int, dict[str, Any]]
) -> None:
    job = Job(cluster, workspace, "cancelled", PREFLIGHT="off")
    ranks = job.hold_at(10)
    cluster.command("scancel", job.number)
    for process in ranks:
        process.resume()
    assert job.wait("CANCELLED")["Restarts"] == "0"
    cluster.wait_for(lambda: not cluster.command("squeue", "--noheader").stdout, "the job to leave")
    stopped_at = job.steps()[-1]
    job = Job(cluster, workspace, "cancelled", PREFLIGHT="off")
    job.wait("COMPLETED")
    assert job.steps() == list(range(1, LAST_STEP + 1))
    assert stopped_at < LAST_STEP
    assert job.rows() == uninterrupted
