"""``slurm/cpt_100b.sh`` and ``slurm/job.sh`` on a real Slurm, with a stand-in for what runs on the nodes.

How a job ends is decided in the batch script from the launcher's exit status and signals; each way is taken here.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster

ROOT = Path(__file__).resolve().parents[2]

FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Checkout:
    """A directory with our job scripts and the stand-in as launcher, from which jobs are submitted."""

    def __init__(self, directory: Path, cluster: SlurmCluster) -> None:
        self.directory, self.cluster = directory, cluster
        (directory / "slurm").symlink_to(ROOT / "slurm")
        (directory / "launch").mkdir()
        launcher = directory / "launch" / "torchrun.sh"
        launcher.write_text(f'#!/bin/sh\nexec {sys.executable} -S {ROOT}/tests/slurm/stand_in.py "$@"\n')
        launcher.chmod(0o755)

    def submit(self, plan: str, *options: str, **variables: str) -> str:
        """Submit ``slurm/cpt_100b.sh`` unchanged; returns the job's number."""
        environment = {"PLAN": plan, "NOTES": str(self.directory)} | variables
        command = ["sbatch", "--parsable", "--nodes=2", "--mem=500", "--time=60", f"--chdir={self.directory}"]
        environment |= {"LLADA_MEGA_HOME": str(self.directory)}
        script = str(self.directory / "slurm" / "cpt_100b.sh")
        sent = self.cluster.command(*command, *options, script, "run.name=a b", "seed=1", **environment)
        return sent.stdout.strip()

    def notes(self, node: int, start: int = 0) -> list[str]:
        path = self.directory / f"{node}.{start}"
        return path.read_text().splitlines() if path.exists() else []

    def wait_until_running(self, start: int = 0) -> list[int]:
        """The processes of both tasks, once they have set themselves up."""
        ready = lambda node: any(line.startswith("master") for line in self.notes(node, start))  # noqa: E731
        self.cluster.wait_for(lambda: ready(0) and ready(1), "both tasks")
        return [int(self.notes(node, start)[0].split()[1]) for node in (0, 1)]

    def log(self, job: str) -> str:
        return (self.directory / f"cpt_100b_{job}.log").read_text()


@pytest.fixture
def checkout(tmp_path: Path, cluster: SlurmCluster) -> Checkout:
    tmp_path.chmod(0o755)
    return Checkout(tmp_path, cluster)


@pytest.mark.parametrize(
    ("status", "state"), [(0, "COMPLETED"), (1, "FAILED"), (2, "FAILED"), (3, "FAILED"), (86, "FAILED")]
)
def test_statuses_that_end_a_job(checkout: Checkout, status: int, state: str) -> None:
    job = checkout.submit(str(status))
    ended = checkout.cluster.wait_for_job(job, *FINAL)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == (state, f"{status}:0", "0")
    assert f"ends with status {status}" in checkout.log(job)


def test_both_nodes_get_the_overrides_and_the_address_of_the_first(checkout: Checkout) -> None:
    job = checkout.submit("0")
    checkout.cluster.wait_for_job(job, *FINAL)
    port = 20000 + int(job) % 10000
    for node in (0, 1):
        assert checkout.notes(node)[1:] == [
            "arguments experiment=cpt_100b run.name=a b seed=1",
            f"master 127.0.0.1:{port}",
        ]


def test_near_the_time_limit_the_job_saves_and_is_requeued(checkout: Checkout) -> None:
    job = checkout.submit("wait 0")
    checkout.wait_until_running()
    checkout.cluster.command("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@600 sends
    ended = checkout.cluster.wait_for_job(job, "COMPLETED")
    assert ended["Restarts"] == "1"
    assert [checkout.notes(node)[-1] for node in (0, 1)] == ["SIGUSR1", "SIGUSR1"]
    assert "asking for a checkpoint" in checkout.log(job)
    assert "requeued with status 85, restart 1" in checkout.log(job)


def test_a_killed_launcher_is_requeued(checkout: Checkout) -> None:
    job = checkout.submit("sleep 0")
    tasks = checkout.wait_until_running()
    for task in tasks:  # one alone would do, after the two minutes of srun's --wait
        os.kill(task, signal.SIGKILL)
    assert checkout.cluster.wait_for_job(job, "COMPLETED")["Restarts"] == "1"
    assert "requeued with status 137" in checkout.log(job)


def test_a_launcher_that_never_counts_its_starts_is_not_requeued_without_end(checkout: Checkout) -> None:
    """One that dies in its imports, for want of memory say."""
    job = checkout.submit("137", MAX_RESTARTS="1")
    ended = checkout.cluster.wait_for_job(job, *FINAL)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "86:0", "1")
    assert "given up: the last 2 starts came to nothing (MAX_RESTARTS=1)" in checkout.log(job)
    assert not list(checkout.directory.glob("*.starts"))


def test_a_launcher_that_counts_decides_for_itself(checkout: Checkout) -> None:
    job = checkout.submit("counted counted 0", MAX_RESTARTS="0")
    assert checkout.cluster.wait_for_job(job, *FINAL)["JobState"] == "COMPLETED"
    assert checkout.cluster.job(job)["Restarts"] == "2"
    assert not list(checkout.directory.glob("*.starts"))


def test_a_run_that_is_given_up_ends_whatever_happens_to_the_other_nodes(checkout: Checkout) -> None:
    """srun returns the higher status, of the node that was killed."""
    job = checkout.submit("given_up")
    ended = checkout.cluster.wait_for_job(job, *FINAL)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "86:0", "0")


def test_scancel_asks_for_a_checkpoint_and_does_not_requeue(checkout: Checkout) -> None:
    job = checkout.submit("wait 0")
    checkout.wait_until_running()
    checkout.cluster.command("scancel", job)
    checkout.cluster.wait_for_job(job, "CANCELLED")
    checkout.cluster.wait_for(lambda: not checkout.cluster.command("squeue", "--noheader").stdout, "the job to leave")
    assert [checkout.notes(node)[-1] for node in (0, 1)] == ["SIGTERM", "SIGTERM"]
    assert checkout.cluster.job(job)["Restarts"] == "0"
    assert "requeued" not in checkout.log(job)


def test_a_head_that_does_not_resolve_ends_the_job_at_once(checkout: Checkout) -> None:
    """No fallback to localhost: every node would wait for itself."""
    stand_in = checkout.directory / "bin" / "scontrol"
    stand_in.parent.mkdir()
    real = checkout.cluster.command("which", "scontrol").stdout.strip()
    stand_in.write_text(
        f'#!/bin/sh\n[ "$2" = node ] && echo "NodeName=n1 NodeAddr=nowhere.invalid" && exit\nexec {real} "$@"\n'
    )
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    job = checkout.submit("0", PATH=f"{stand_in.parent}:{os.environ['PATH']}")
    ended = checkout.cluster.wait_for_job(job, *FINAL)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0")
    assert "error: the first node, n1 (nowhere.invalid), does not resolve" in checkout.log(job)
    assert checkout.notes(0) == []


@pytest.mark.full  # a minute, in which Slurm waits
def test_a_killed_node_daemon_requeues_the_job(checkout: Checkout) -> None:
    """Slurm itself requeues: it calls the node down, ends the job, and starts it when two nodes are there again."""
    job = checkout.submit("sleep 0")
    _, task = checkout.wait_until_running()
    os.kill(checkout.cluster.node_pid("n2"), signal.SIGKILL)
    checkout.cluster.wait_for(lambda: checkout.cluster.node_states()["n2"].startswith("down"), "n2 to be down", 90)
    checkout.cluster.wait_for_job(job, "PENDING")
    os.kill(task, signal.SIGKILL)  # a lost machine takes its processes along
    checkout.cluster.start_node("n2")
    assert checkout.cluster.wait_for_job(job, "COMPLETED")["Restarts"] == "1"
