"""A node's launcher: what it refuses, and whole runs without a scheduler."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.hardware import Hardware, find_hardware
from launch.node import checkpoint_bytes, main, make_plan, preflight_arguments, summary
from launch.processes import TorchRun
from launch.restarts import AGAIN, GIVE_UP, MISTAKE, UNFIT
from llada_mega.config.compose import compose
from llada_mega.config.schema import Config
from llada_mega.errors import LladaMegaError

ROOT = Path(__file__).resolve().parents[2]
TINY = ("data.train=corpus", "trainer.max_steps=2", "trainer.global_batch_size=4", "logging.progress=false")


@pytest.fixture
def free_port() -> int:
    """One that nobody listens to now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, without asking torch."""
    monkeypatch.setattr("launch.node.find_hardware", lambda: Hardware(cpus=4))


@pytest.mark.parametrize(
    ("variables", "overrides", "message"),
    [
        ({"NPROC_PER_NODE": "x"}, (), "NPROC_PER_NODE=x is no number"),
        ({"PREFLIGHT": "maybe"}, (), "PREFLIGHT=maybe; use on, off, only"),
        ({"FABRIC": "string"}, (), "FABRIC=string is unknown"),
        ({"SLURM_GPUS_ON_NODE": "8"}, (), "Slurm gave this node 8 GPUs, and PyTorch finds 0"),
        ({"SLURM_GPUS_ON_NODE": "8", "NPROC_PER_NODE": "8"}, (), "8 GPUs, and PyTorch finds 0"),
        ({"PREFLIGHT_MIN_GBPS": "fast"}, (), "PREFLIGHT_MIN_GBPS=fast is no number"),
        ({"PREFLIGHT_MIN_GBPS": "nan"}, (), "PREFLIGHT_MIN_GBPS=nan is no number"),
        ({}, ("parallel.pp=2",), "does not divide the 1 processes"),
        ({}, ("data.train=nowhere",), "there is no nowhere.bin"),
        ({}, ("optimiser.lr=1",), "optimiser"),
    ],
)
def test_mistakes_end_before_anything_starts(
    corpus: Path, hardware: None, variables: dict[str, str], overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises((LladaMegaError, ValueError), match=message):
        make_plan([*TINY, *overrides], variables)


def test_a_mistake_is_one_line_that_names_the_node(
    corpus: Path, hardware: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data.train=nowhere"]) == MISTAKE
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"launch: error on {os.uname().nodename}: data.train.0.path=nowhere")


def test_a_lost_gpu_is_said_before_what_follows_from_it(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """On any node, first or not; without Slurm's number nothing is lost, and NPROC_PER_NODE may ask for fewer."""
    monkeypatch.setattr("launch.node.find_hardware", lambda: Hardware(gpu_architecture=9, gpus=3))
    verdict = tmp_path / "verdict"
    variables = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "VERDICT_FILE": str(verdict)}
    for name, value in {"SLURM_GPUS_ON_NODE": "4", **variables}.items():
        monkeypatch.setenv(name, value)
    assert main(TINY) == UNFIT
    said = f"launch: error on {os.uname().nodename}: Slurm gave this node 4 GPUs, and PyTorch finds 3;"
    assert capsys.readouterr().out.startswith(said)
    assert verdict.read_text() == "3\n"
    options = [*TINY, "trainer.global_batch_size=12"]
    assert make_plan(options, variables).processes == 3
    assert make_plan(TINY, {"SLURM_GPUS_ON_NODE": "4", "NPROC_PER_NODE": "2", **variables}).processes == 2


def test_a_pytorch_that_cannot_be_asked_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.hardware._ASK_TORCH", "raise ImportError('libcudnn.so.9 is missing')")
    with pytest.raises(ValueError, match=r"^PyTorch cannot be asked for GPUs: ImportError: libcudnn.so.9 is missing$"):
        find_hardware()


@pytest.mark.parametrize(
    ("received", "expected"), [(signal.SIGTERM, AGAIN), (signal.SIGUSR1, AGAIN), (None, UNFIT)], ids=str
)
def test_a_signal_that_ends_the_preflight_leaves_no_node_unfit(
    corpus: Path, hardware: None, monkeypatch: pytest.MonkeyPatch, received: signal.Signals | None, expected: int
) -> None:
    def run(torchrun: TorchRun) -> int:
        torchrun.received = received
        return 1

    monkeypatch.setattr("launch.node.TorchRun.run", run)
    assert main(TINY) == expected


def test_the_preflight_asks_for_the_checkpoints_that_are_still_to_come(corpus: Path, hardware: None) -> None:
    plan = make_plan([*TINY, "checkpoint.keep_last=3"], {})
    plan.config.checkpoint.merge_at_end = 2
    sizes = []
    for present in range(8):
        arguments = dict(argument.split("=") for argument in preflight_arguments(plan))
        sizes.append(int(arguments["--need-bytes"]) / checkpoint_bytes(plan.config))
        directory = plan.run_dir / "checkpoints" / f"step_{present:08d}"
        directory.mkdir(parents=True)
        (directory / "COMPLETE").touch()
    assert sizes == [6, 5, 4, 3, 2, 1, 1, 1]


def test_a_plan_counts_processes_of_all_nodes_and_says_what_it_sets(corpus: Path, hardware: None) -> None:
    variables = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "NPROC_PER_NODE": "2", "FABRIC": "roce"}
    plan = make_plan([*TINY, "parallel.pp=2"], variables)
    assert plan.config.launch.nproc == 4
    command = plan.torchrun("train", "llada_mega", "train")
    assert command[1:5] == ["-m", "launch.agent", "--nproc-per-node=2", "--max-restarts=0"]
    assert command[-3:] == ["-m", "llada_mega", "train"]
    text = summary(plan)
    assert "2 nodes x 2 processes, no GPU, 4 cores a node" in text
    assert "OMP_NUM_THREADS=2" in text


def test_fake_gpus_are_no_obstacle_for_a_run_on_cpus(corpus: Path, hardware: None) -> None:
    assert make_plan([*TINY, "parallel.backend=gloo"], {"SLURM_GPUS_ON_NODE": "8"}).processes == 1


@pytest.mark.parametrize("experiment", ["cpt_16b", "cpt_100b"])
def test_checkpoints_of_the_experiments(experiment: str) -> None:
    """14 bytes a parameter: bf16 weights, an fp32 copy, two fp32 moments."""
    config = compose(Config, [f"experiment={experiment}"])
    assert checkpoint_bytes(config) / 14e9 == pytest.approx({"cpt_16b": 16.3, "cpt_100b": 103.0}[experiment], rel=0.01)


def test_a_start_that_is_counted_is_taken_off_the_batch_scripts_count(
    corpus: Path, hardware: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And a run that is given up is told apart, whatever the other nodes end with."""
    count, told = tmp_path / "job.starts", tmp_path / "job.verdict"
    variables = {
        "RUN_ID": "job",
        "MAX_RESTARTS": "1",
        "PREFLIGHT": "off",
        "STARTS_FILE": str(count),
        "VERDICT_FILE": str(told),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("launch.node.TorchRun.run", lambda run: -9)
    found = []
    for expected in (AGAIN, GIVE_UP, GIVE_UP):
        count.write_text("1\n")
        assert main(TINY) == expected
        found.append((count.exists(), told.read_text() if told.exists() else None))
        told.unlink(missing_ok=True)
    # The third start is refused before it is counted.
    assert found == [(False, None), (False, "86\n"), (True, "86\n")]


def start_node(rank: int, overrides: tuple[str, ...], **variables: str) -> subprocess.Popen[str]:
    """``launch/torchrun.sh`` as on one of two nodes."""
    environment = os.environ | {"PYTHON": sys.executable, "NNODES": "2", "NODE_RANK": str(rank)} | variables
    return subprocess.Popen(
        [str(ROOT / "launch" / "torchrun.sh"), *TINY, *overrides],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.full
@pytest.mark.parametrize("backend", ["c10d", "static"])
def test_two_nodes_without_slurm(corpus: Path, free_port: int, backend: str) -> None:
    """By variables, as over SSH or in Kubernetes; two processes a node."""
    variables = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port), "RDZV_BACKEND": backend}
    variables |= {"NPROC_PER_NODE": "2"}
    nodes = [start_node(rank, ("run.name=two",), **variables) for rank in (0, 1)]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)
    assert "launch: runs/two: finished" in said[0]
    # By rank 0, which c10d may have given to either node; both have this machine's name.
    assert "all-reduce inside a node" in "".join(said)
    run = corpus / "runs" / "two"
    assert sorted(path.name for path in (run / "logs").glob("rank_*")) == [f"rank_{rank:04d}.log" for rank in range(4)]
    assert json.loads((run / "logs" / "node_0001.json").read_text())["rendezvous"]["node_rank"] == 1
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()][-1] == 2


@pytest.mark.full
def test_a_checkpoint_is_as_large_as_the_preflight_asks_for(corpus: Path) -> None:
    model = ["trainer.dtype=bfloat16", "model.hidden_size=256", "model.vocab_size=384"]  # no padding of the vocabulary
    environment = os.environ | {"PYTHON": sys.executable, "PREFLIGHT": "off"}
    command = [str(ROOT / "launch" / "torchrun.sh"), *TINY, "run.name=one", *model]
    subprocess.run(command, env=environment, check=True, timeout=300)
    checkpoint = corpus / "runs" / "one" / "checkpoints" / "step_00000002"
    size = sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors"))
    assert size == pytest.approx(checkpoint_bytes(compose(Config, [*TINY, *model])), rel=0.01)
