"""A Slurm of one's own on one machine: munge, a controller and several node daemons, as root, without systemd.

All files lie in one directory, all processes are known by their pid files there, and every port follows from one
number, so that clusters of parallel test processes do not meet. The nodes have eight GPUs each that are copies of
``/dev/null``: scripts that ask for ``--gpus-per-node=8`` are accepted as they are.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "squeue", "scancel", "srun")
_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge/socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmctldPidFile={directory}/slurmctld.pid
SlurmctldLogFile={directory}/log/slurmctld.log
SlurmdSpoolDir={directory}/spool/%n
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmdLogFile={directory}/log/slurmd.%n.log
# Neither control groups nor systemd; a node may claim more CPUs than there are.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
JobRequeue=1
KillWait={kill_wait}
MinJobAge=3600
# A requeued job would otherwise wait two minutes before it starts again.
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmctldTimeout=30
SlurmdTimeout={node_timeout}
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port={first}-{last} CPUs=4 RealMemory=4000 Gres=gpu:8
PartitionName=main Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE State=UP OverTimeLimit=0
"""


def obstacle() -> str | None:
    """Why no cluster can be started here, or None."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not found; install the Debian packages slurm-wlm and munge"
    return None if os.geteuid() == 0 else "Slurm's daemons run as root here"


class SlurmCluster:
    """``nodes`` virtual nodes n1, n2, ... on this machine.

    Args:
        directory: for configuration, state, logs; must be short, munge's socket lies in it.
        kill_wait: seconds between TERM and KILL when a job is cancelled or its time is over; Slurm's own default.
        node_timeout: seconds after which a node whose daemon does not answer is down.
    """

    def __init__(self, directory: Path, *, nodes: int = 2, kill_wait: int = 30, node_timeout: int = 10) -> None:
        self.directory, self.nodes = directory, [f"n{index}" for index in range(1, nodes + 1)]
        self.config = directory / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self.config)}
        port = _free_ports(nodes + 1)
        directory.mkdir(parents=True)
        directory.chmod(0o755)
        for name, mode in (("state", 0o755), ("log", 0o755), ("munge", 0o711)):
            (directory / name).mkdir(mode=mode)
        for node in self.nodes:
            (directory / "spool" / node).mkdir(parents=True)
        host = socket.gethostname().split(".")[0]
        self.config.write_text(
            _CONFIG.format(
                host=host,
                port=port,
                directory=directory,
                nodes=nodes,
                first=port + 1,
                last=port + nodes,
                kill_wait=kill_wait,
                node_timeout=node_timeout,
            )
        )
        gpus = [directory / f"gpu{index}" for index in range(8)]
        for gpu in gpus:
            os.mknod(gpu, 0o600 | 0o020000, os.makedev(1, 3))
        (directory / "gres.conf").write_text(
            f"AutoDetect=off\nNodeName=n[1-{nodes}] Name=gpu File={directory}/gpu[0-{len(gpus) - 1}]\n"
        )
        (directory / "munge" / "key").write_bytes(os.urandom(128))
        (directory / "munge" / "key").chmod(0o400)

    def start(self) -> None:
        """Start all daemons and wait until every node is idle."""
        munge = self.directory / "munge"
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._run("munged", "--force", *(f"--{option}={munge / name}" for option, name in files.items()))
        self._run("slurmctld", "-c", "-f", str(self.config))
        self.wait_for(lambda: self.command("scontrol", "ping", check=False).returncode == 0, "the controller")
        for node in self.nodes:
            self.start_node(node)
        self.wait_for(lambda: self.node_states() == dict.fromkeys(self.nodes, "idle"), "idle nodes")

    def start_node(self, node: str) -> None:
        """Start the daemon of one node."""
        self._run("slurmd", "-N", node, "-f", str(self.config))

    def stop(self) -> None:
        """Cancel what runs, stop the daemons, remove the directory."""
        self.command("scancel", "--partition=main", check=False)
        with contextlib.suppress(TimeoutError):
            self.wait_for(
                lambda: not self.command("squeue", "--noheader", check=False).stdout.strip(), "an empty queue"
            )
        pid_files = [
            *self.directory.glob("slurmd.*.pid"),
            self.directory / "slurmctld.pid",
            self.directory / "munge/pid",
        ]
        for pid_file in pid_files:
            with contextlib.suppress(OSError, ValueError):
                _stop_process(int(pid_file.read_text()))
        shutil.rmtree(self.directory, ignore_errors=True)

    def node_pid(self, node: str) -> int:
        """Process of a node's daemon."""
        return int((self.directory / f"slurmd.{node}.pid").read_text())

    def node_states(self) -> dict[str, str]:
        """``{"n1": "idle", ...}``"""
        lines = self.command("sinfo", "--noheader", "--Node", "--format=%N %T", check=False).stdout.splitlines()
        return dict(line.split() for line in lines)

    def command(self, *words: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a client command of this cluster."""
        return subprocess.run(
            words, env=self.environment | environment, capture_output=True, text=True, timeout=60, check=check
        )

    def job(self, job_id: str) -> dict[str, str]:
        """The fields that ``scontrol show job`` prints, as JobState, ExitCode, Restarts."""
        words = self.command("scontrol", "show", "job", "--oneliner", job_id).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_job(self, job_id: str, *states: str, timeout: float = 300) -> dict[str, str]:
        """The job's fields once it is in one of ``states``."""
        self.wait_for(lambda: self.job(job_id)["JobState"] in states, f"job {job_id} to be {states}", timeout)
        return self.job(job_id)

    def wait_for(self, condition: Callable[[], bool], what: str, timeout: float = 60) -> None:
        """Return when ``condition()`` holds. Raises TimeoutError with the ends of the daemons' logs."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                ends = [f"{path.name}: {path.read_text()[-600:]}" for path in (self.directory / "log").glob("*.log")]
                raise TimeoutError(f"waited {timeout:.0f} s for {what}\n" + "\n".join(ends))
            time.sleep(0.2)

    def _run(self, *words: str) -> None:
        subprocess.run(words, env=self.environment, check=True, timeout=60)


def _free_ports(count: int) -> int:
    """The first of ``count`` ports in a row that nobody listens to now."""
    for first in range(21000 + os.getpid() % 500 * 10, 32000, 10):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise OSError("no free ports")


def _stop_process(pid: int) -> None:
    """End a daemon; it is no child of this process, so it is asked whether it lives."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        for _ in range(100):
            time.sleep(0.05)
            os.kill(pid, 0)
        os.kill(pid, signal.SIGKILL)
