"""One node of a training run; ``launch/torchrun.sh experiment=NAME [key=value ...]`` starts it.

Checks the configuration, sets the environment, lets the nodes test each other (:mod:`launch.preflight`), starts this
node's ranks under torchrun, and says in its exit status how the run goes on:

0 finished, or stopped by a STOP file; 1 failed; 2 a mistake in configuration or environment; 3 an unfit node; 85 start
again; 86 given up. Nodes other than the first leave the verdict to it and end as torchrun does, unless they refuse.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launch import restarts
from launch.environment import Job, environment
from launch.hardware import Hardware, UnfitNodeError, find_hardware
from launch.processes import TorchRun
from launch.rendezvous import Rendezvous
from llada_mega.commands.train import check
from llada_mega.config.compose import compose
from llada_mega.config.count import total_parameters
from llada_mega.config.schema import Config
from llada_mega.errors import LladaMegaError

PREFLIGHT_CHOICES = ("on", "off", "only")


@dataclass(frozen=True)
class Plan:
    """All that this node needs to know before anything starts."""

    config: Config
    rendezvous: Rendezvous
    hardware: Hardware
    processes: int  # on this node
    added: dict[str, str]  # variables for the ranks that were not set before
    preflight: str
    max_restarts: int

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run.dir)

    def torchrun(self, purpose: str, *program: str) -> list[str]:
        """The command that starts ``program`` on this node's ranks."""
        options = [f"--nproc-per-node={self.processes}", "--max-restarts=0"]
        meeting = self.rendezvous.torchrun_arguments(purpose=purpose)
        return [sys.executable, "-m", "launch.agent", *options, *meeting, "-m", *program]


def main(overrides: Sequence[str]) -> int:
    """Run this node's part and return the exit status of the module's documentation."""
    status = run(overrides)
    restarts.tell_verdict(os.environ, status)
    return status


def run(overrides: Sequence[str]) -> int:
    """:func:`main`, but for telling the batch script."""
    try:
        plan = make_plan(overrides, os.environ)
    except (LladaMegaError, ValueError) as error:
        _say(f"error on {socket.gethostname()}: {error}")
        return restarts.UNFIT if isinstance(error, UnfitNodeError) else restarts.MISTAKE
    _record(plan)
    if plan.rendezvous.is_head:
        _say(summary(plan))
        verdict = restarts.begin(plan.run_dir, plan.rendezvous.run_id, plan.max_restarts)
        if verdict is not None:
            return _conclude(plan, verdict)
        restarts.tell_counted(os.environ)
    # torchrun reads PET_* for itself; what they say is in the plan.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PET_")} | plan.added
    if plan.preflight != "off":
        torchrun = TorchRun(plan.torchrun("preflight", "launch.preflight", *preflight_arguments(plan)), variables)
        status = torchrun.run()
        if torchrun.received is not None:  # it ends the preflight too, which says nothing about the nodes
            _say(f"{torchrun.received.name} before the training began")
            return restarts.AGAIN
        if status:
            _say("the preflight failed and nothing was trained; what is wrong, and on which node, is above")
            return restarts.UNFIT
        if plan.preflight == "only":
            return restarts.FINISHED
    status = TorchRun(plan.torchrun("train", "llada_mega", "train", *overrides), variables).run()
    if not plan.rendezvous.is_head:
        return 0 if restarts.read_exit(plan.run_dir).get("status") == "finished" else int(status != 0)
    return _conclude(plan, restarts.judge(plan.run_dir, status, plan.max_restarts))


def make_plan(overrides: Sequence[str], variables: Mapping[str, str]) -> Plan:
    """Everything that can be refused is refused here, before processes cost time.

    Raises:
        LladaMegaError: the configuration cannot run here.
        UnfitNodeError: PyTorch does not find the GPUs that Slurm gave.
        ValueError: a variable makes no sense.
    """
    rendezvous = Rendezvous.from_environment(variables)
    hardware = find_hardware()
    processes = _number(variables, "NPROC_PER_NODE", hardware.gpus or 1)
    preflight = variables.get("PREFLIGHT", "on")
    if preflight not in PREFLIGHT_CHOICES:
        raise ValueError(f"PREFLIGHT={preflight}; use {', '.join(PREFLIGHT_CHOICES)}")
    _check_bandwidth(variables)
    config = compose(Config, [*overrides, f"launch.nproc={processes * rendezvous.nodes}"])
    if config.parallel.backend != "gloo":
        _check_gpus(variables, hardware)  # first: with a GPU too few the batch sizes do not fit either
    check(config)
    job = Job(
        nodes=rendezvous.nodes,
        processes=processes,
        tensor_parallel=config.parallel.tp > 1,
        overlap=config.parallel.overlap,
        log_dir=(Path(config.run.dir) / "logs").absolute(),
    )
    return Plan(
        config=config,
        rendezvous=rendezvous,
        hardware=hardware,
        processes=processes,
        added=environment(variables.get("FABRIC", "auto"), hardware, job, variables),
        preflight=preflight,
        max_restarts=_number(variables, "MAX_RESTARTS", restarts.DEFAULT_LIMIT),
    )


def preflight_arguments(plan: Plan) -> list[str]:
    """What :mod:`launch.preflight` cannot know by itself."""
    return [f"--run-dir={plan.run_dir}", f"--need-bytes={missing_checkpoints(plan) * checkpoint_bytes(plan.config)}"]


def missing_checkpoints(plan: Plan) -> int:
    """How many more the run will keep at most, with the one that is being written, than are there already."""
    options = plan.config.checkpoint
    kept = options.keep_last + max(options.keep_best, options.merge_at_end)
    return max(0, kept - len(list((plan.run_dir / "checkpoints").glob("step_*/COMPLETE")))) + 1


def checkpoint_bytes(config: Config) -> int:
    """Of one checkpoint: weights and AdamW's two moments, and for bfloat16 weights an fp32 copy."""
    each = 2 + 3 * 4 if config.trainer.dtype == "bfloat16" else 3 * 4
    return total_parameters(config.model) * each


def summary(plan: Plan) -> str:
    """What is about to start, for the top of the log."""
    rendezvous, hardware = plan.rendezvous, plan.hardware
    devices = f"{hardware.gpus} GPUs of architecture {hardware.gpu_architecture}" if hardware.gpus else "no GPU"
    node = f"{devices}, {hardware.cpus} cores a node"
    lines = [
        f"{plan.run_dir}: {rendezvous.nodes} nodes x {plan.processes} processes, {node}",
        f"rendezvous {rendezvous.backend} at {rendezvous.address}:{rendezvous.port}, start {rendezvous.start}",
        *(f"  {name}={value}" for name, value in plan.added.items()),
    ]
    return "\n".join(lines)


def _conclude(plan: Plan, verdict: restarts.Verdict) -> int:
    _say(f"{plan.run_dir}: {verdict.reason}")
    return verdict.status


def _record(plan: Plan) -> None:
    """``RUN/logs/node_0001.json``: what this node was when it started last; a node that has none never got here."""
    log_dir = plan.run_dir / "logs"
    log_dir.mkdir(parents=True, exist_ok=True)
    content = {
        "host": socket.gethostname(),
        "hardware": asdict(plan.hardware),
        "rendezvous": asdict(plan.rendezvous),
        "environment": plan.added,
    }
    path = log_dir / f"node_{plan.rendezvous.node_rank:04d}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")


def _check_gpus(variables: Mapping[str, str], hardware: Hardware) -> None:
    given = variables.get("SLURM_GPUS_ON_NODE", "")
    if not given.isdecimal() or int(given) == hardware.gpus or (hardware.gpus and "NPROC_PER_NODE" in variables):
        return
    raise UnfitNodeError(
        f"Slurm gave this node {given} GPUs, and PyTorch finds {hardware.gpus}; check driver and container "
        "(NPROC_PER_NODE uses fewer, parallel.backend=gloo trains on CPUs)"
    )


def _check_bandwidth(variables: Mapping[str, str]) -> None:
    """Refuses what :mod:`launch.preflight` could not read, on all ranks."""
    text = variables.get("PREFLIGHT_MIN_GBPS") or "0"
    try:
        usable = math.isfinite(float(text))
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(f"PREFLIGHT_MIN_GBPS={text} is no number")


def _number(variables: Mapping[str, str], name: str, default: int) -> int:
    text = variables.get(name)
    if text is not None and not text.isdecimal():
        raise ValueError(f"{name}={text} is no number")
    return default if text is None else int(text)


def _say(text: str) -> None:
    print("\n".join(f"launch: {line}" for line in text.splitlines()), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
