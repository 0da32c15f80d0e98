"""Where a run lives, how it is launched and how it is split over processes."""

from __future__ import annotations

from dataclasses import dataclass, field
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

    tp: int = 1  # tensor parallelism
    pp: int = 1  # pipeline stages
    vp: Optional[int] = None  # model chunks a pipeline stage; null: one
    num_layers_in_first_pipeline_stage: Optional[int] = None  # over all its chunks; null: as many as the others
    num_layers_in_last_pipeline_stage: Optional[int] = None  # over all its chunks; null: as many as the others
    cp: int = 1  # context parallelism
    ep: int = 1  # expert parallelism
    etp: int = 1  # tensor parallelism of the experts
    sp: bool = False  # sequence parallelism: activations between the tensor-parallel layers are split too
    dispatcher: str = "alltoall"  # tokens to experts: alltoall | allgather | deepep | hybridep (library deep_ep)
    recompute: str = "none"  # none | selective | full: activations made again in the backward pass
    recompute_modules: list[str] = field(default_factory=list)  # of selective recomputation, which needs them named
    offload_layers: int = 0  # so many layers keep their activations in host memory; needs TransformerEngine
    distributed_optimizer: bool = False
    overlap: bool = False  # gradient reduction and parameter gathering run beside the backward and forward pass
    gradient_accumulation_fusion: Optional[bool] = None  # in the matrix product; null: where TE or apex has a kernel
    backend: str = "auto"  # auto | nccl | gloo; auto: nccl with CUDA
    timeout_minutes: int = 30  # a collective that waits longer ends the run
