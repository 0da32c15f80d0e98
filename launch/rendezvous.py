"""How the nodes of a run find each other: everything comes from environment variables, whoever has set them.

| what | read from, the first that is set |
|---|---|
| nodes | ``NNODES``, ``PET_NNODES`` (Kubeflow), ``SLURM_NNODES`` |
| rank of this node | ``NODE_RANK``, ``PET_NODE_RANK``, ``JOB_COMPLETION_INDEX`` (Kubernetes), ``SLURM_NODEID`` |
| address of node 0 | ``MASTER_ADDR``, ``PET_MASTER_ADDR`` |
| its port | ``MASTER_PORT``, ``PET_MASTER_PORT``, 29500 |
| name of the run | ``RUN_ID``, ``PET_RDZV_ID``, ``SLURM_JOB_ID`` |
| backend | ``RDZV_BACKEND``, ``PET_RDZV_BACKEND``: ``c10d`` (default) or ``static`` |
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

BACKENDS = ("c10d", "static")
DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Rendezvous:
    """Where this node stands among the others.

    Attributes:
        nodes: how many there are.
        node_rank: of this one; the node with rank 0 decides how the run goes on.
        address, port: of node 0; every other node must be able to connect there.
        run_id: the same for all starts of one run by a scheduler; None when nobody counts starts.
        start: which start of it this is; torchruns of different starts must not meet.
        backend: ``c10d`` (torchrun deals out the ranks) or ``static`` (ranks follow ``node_rank``).
    """

    nodes: int = 1
    node_rank: int = 0
    address: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    run_id: str | None = None
    start: str = "0"
    backend: str = "c10d"

    @property
    def is_head(self) -> bool:
        return self.node_rank == 0

    @classmethod
    def from_environment(cls, variables: Mapping[str, str]) -> Rendezvous:
        """Read the variables of this module's table.

        Raises:
            ValueError: a variable is missing or makes no sense; the message names it.
        """
        in_step = "SLURM_STEP_ID" in variables  # not a shell of salloc, which has the variables of a job but one node

        def first(*names: str) -> str | None:
            return next((variables[name] for name in names if variables.get(name)), None)

        def number(default: int, *names: str) -> int:
            text = first(*names)
            if text is not None and not text.isdecimal():
                raise ValueError(f"{'/'.join(names)}={text} is no number")
            return default if text is None else int(text)

        nodes = number(1, "NNODES", "PET_NNODES", *(["SLURM_NNODES"] if in_step else []))
        rank_names = ("NODE_RANK", "PET_NODE_RANK", "JOB_COMPLETION_INDEX", *(["SLURM_NODEID"] if in_step else []))
        if nodes > 1 and first(*rank_names) is None:
            raise ValueError(f"there are {nodes} nodes, and NODE_RANK is not set; give every node its own, from 0")
        node_rank = number(0, *rank_names)
        if node_rank >= nodes:
            raise ValueError(f"NODE_RANK={node_rank} with NNODES={nodes}; ranks go from 0 to {nodes - 1}")
        address = first("MASTER_ADDR", "PET_MASTER_ADDR")
        if address is None and nodes > 1:
            raise ValueError(f"there are {nodes} nodes, and MASTER_ADDR is not set; give all the address of node 0")
        backend = first("RDZV_BACKEND", "PET_RDZV_BACKEND") or "c10d"
        if backend not in BACKENDS:
            raise ValueError(f"RDZV_BACKEND={backend}; use {' or '.join(BACKENDS)}")
        return cls(
            nodes=nodes,
            node_rank=node_rank,
            address=address or "127.0.0.1",
            port=number(DEFAULT_PORT, "MASTER_PORT", "PET_MASTER_PORT"),
            run_id=first("RUN_ID", "PET_RDZV_ID", *(["SLURM_JOB_ID"] if in_step else [])),
            start=variables.get("SLURM_RESTART_COUNT", "0"),
            backend=backend,
        )

    def torchrun_arguments(self, *, purpose: str) -> list[str]:
        """Options with which the torchruns of all nodes meet for ``purpose`` (they meet once for each)."""
        if self.nodes == 1:
            return ["--standalone"]
        common = [f"--nnodes={self.nodes}", f"--local-addr={self.local_address()}"]
        if self.backend == "static":
            at = [f"--master-addr={self.address}", f"--master-port={self.port}"]
            return [*common, "--rdzv-backend=static", f"--node-rank={self.node_rank}", *at]
        # Told who the host is: torchrun would compare names, which fails behind aliases and with nodes on one machine.
        return [
            *common,
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.address}:{self.port}",
            f"--rdzv-id={self.run_id or 'run'}-{self.start}-{purpose}",
            f"--rdzv-conf=is_host={int(self.is_head)}",
        ]

    def local_address(self) -> str:
        """The address from which this node reaches node 0.

        Ranks connect to the one that torchrun announces, by default the host's full name, which need not resolve.

        Raises:
            ValueError: the address of node 0 does not resolve, or nothing leads there.
        """
        try:
            family, kind, protocol, _, target = socket.getaddrinfo(self.address, self.port, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind, protocol) as probe:  # connecting a UDP socket sends nothing
                probe.connect(target)
                return str(probe.getsockname()[0])
        except OSError as error:
            raise ValueError(f"MASTER_ADDR={self.address} cannot be reached from here: {error}") from error
