"""Where a run lives, how it is launched and how it is split over processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional


@dataclass
class RunSection:
    """Name and directory of a run; everything it writes lies under ``dir``."""

    name: str = "run"
    dir: str = "runs/${run.name}"


@dataclass
class LaunchConfig:
    """Processes on this machine. ``nproc=1`` runs in the calling process."""

    nproc: int = 1


@dataclass
class ParallelConfig:
    """Sizes of the parallel groups; data parallelism is what remains of the world size."""

    tp: int = 1
    pp: int = 1
    vp: Optional[int] = None
    cp: int = 1
    ep: int = 1
    etp: int = 1
    sp: bool = False
    dispatcher: str = "alltoall"  # alltoall | allgather
    recompute: str = "none"  # none | selective | full
    distributed_optimizer: bool = False
