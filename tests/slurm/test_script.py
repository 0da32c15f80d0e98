"""What the job script asks of Slurm, seen by a stand-in for its commands: needs no Slurm."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launch.restarts import DEFAULT_LIMIT, FINAL
from llada_mega.config.compose import compose
from llada_mega.config.layout import check_batches, check_group_sizes
from llada_mega.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("cpt_*.sh"))


@pytest.fixture
def run_script(tmp_path: Path):
    """Runs a job script with an ``srun`` that prints its arguments; returns its process and output."""
    for name, body in {
        "srun": 'printf "%s\\n" "$@"',
        "scontrol": 'case $2 in hostnames) echo first; echo second;; node) echo "NodeName=first NodeAddr=$HEAD";; esac',
    }.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def run(script: Path, *overrides: str, **variables: str) -> subprocess.CompletedProcess[str]:
        job = {
            "SLURM_JOB_ID": "12",
            "SLURM_JOB_NODELIST": "first,second",
            "SLURM_JOB_NUM_NODES": "2",
            "HEAD": "10.1.2.3",
        }
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT)} | job | variables
        command = ["bash", str(script), *overrides]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_one_task_a_node_runs_the_experiment_of_the_scripts_name(run_script, script: Path) -> None:
    ended = run_script(script, "seed=1", "run.name=with space")
    words = ended.stdout.splitlines()
    start = words.index(f"{ROOT}/launch/torchrun.sh")
    assert words[start + 1 : start + 4] == [f"experiment={script.stem}", "seed=1", "run.name=with space"]
    assert "--ntasks-per-node=1" in words[:start]
    assert not [word for word in words if "container" in word]
    assert ended.returncode == 0


def test_starts_that_no_launcher_counts_end(run_script, tmp_path: Path) -> None:
    """Slurm starts the script again after a lost node, without a word to it: it counts before all else."""
    killed = tmp_path / "srun"
    killed.write_text("#!/bin/bash\nexit 137\n")
    for _ in range(DEFAULT_LIMIT):
        assert "requeued with status 137" in run_script(SCRIPTS[0]).stdout
    (count,) = tmp_path.glob("*_12.starts")
    assert int(count.read_text()) == DEFAULT_LIMIT
    last = run_script(SCRIPTS[0])
    assert (last.returncode, "given up: the last 4 starts" in last.stderr) == (86, True)
    assert not count.exists()
    count.write_text(f"{DEFAULT_LIMIT + 1}\n")  # the last start was lost together with its script
    refused = run_script(SCRIPTS[0])
    assert (refused.returncode, refused.stdout) == (86, "")


@pytest.mark.parametrize("status", FINAL)
def test_a_launchers_verdict_counts_more_than_the_kill_of_another_node(run_script, tmp_path: Path, status: int) -> None:
    """srun tells the higher status, of the node that waited in vain. The verdict of an earlier start is forgotten."""
    srun = tmp_path / "srun"
    srun.write_text(f'#!/bin/bash\n[[ ! -e $VERDICT_FILE ]] && echo {status} >"$VERDICT_FILE"\nexit 137\n')
    verdict = tmp_path / f"{SCRIPTS[0].stem}_12.verdict"
    verdict.write_text("1\n")
    ended = run_script(SCRIPTS[0])
    assert ended.returncode == status
    assert "requeued" not in ended.stdout
    assert not verdict.exists() and not list(tmp_path.glob("*.starts"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_nodes_of_the_script_hold_the_experiments_layout(script: Path) -> None:
    options = dict(
        line.removeprefix("#SBATCH --").split("=", 1)
        for line in script.read_text().splitlines()
        if line.startswith("#SBATCH --") and "=" in line
    )
    config = compose(Config, [f"experiment={script.stem}"])
    processes = int(options["nodes"]) * int(options["gpus-per-node"])
    check_group_sizes(config.parallel, processes)
    check_batches(config.trainer, config.parallel, processes)


def test_a_container_by_variables(run_script, tmp_path: Path) -> None:
    words = run_script(SCRIPTS[0], CONTAINER_IMAGE="registry#team/image:1").stdout.splitlines()
    assert "--container-image=registry#team/image:1" in words
    assert f"--container-workdir={tmp_path}" in words
    assert f"--container-mounts={ROOT}:{ROOT},{tmp_path}:{tmp_path}" in words
    words = run_script(SCRIPTS[0], CONTAINER_IMAGE="i", CONTAINER_MOUNTS="/data:/data").stdout.splitlines()
    assert "--container-mounts=/data:/data" in words


def test_a_head_that_others_cannot_reach_is_refused(run_script, tmp_path: Path) -> None:
    ended = run_script(SCRIPTS[0], HEAD="localhost")
    assert ended.returncode == 2
    assert not list(tmp_path.glob("*.starts"))
    assert "where no other node finds it" in ended.stderr
    assert run_script(SCRIPTS[0], HEAD="localhost", SLURM_JOB_NUM_NODES="1").returncode == 0
