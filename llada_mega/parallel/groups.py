"""Process groups: one typed object, made once a process, for a single process and for every launcher."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from llada_mega.config.layout import check_group_sizes
from llada_mega.config.run import ParallelConfig
from llada_mega.errors import ConfigError
from llada_mega.parallel import cpu_runtime
from llada_mega.ranks import record_failure

COORDINATES = ("dp", "pp", "cp", "tp", "ep")

_groups: ParallelGroups | None = None
_owns_world = False


@dataclass(frozen=True)
class ParallelGroups:
    """The process groups of this rank, under the names of Megatron's ``ProcessGroupCollection``.

    ``dp`` does not include context parallelism, ``dp_cp`` does; ``tp_dp_cp`` are the ranks that hold the same layers.
    """

    config: ParallelConfig
    collection: Any  # megatron.core.process_groups_config.ProcessGroupCollection, for Megatron's own calls
    tp: ProcessGroup
    pp: ProcessGroup
    cp: ProcessGroup
    ep: ProcessGroup
    dp: ProcessGroup
    dp_cp: ProcessGroup
    tp_dp_cp: ProcessGroup
    expt_tp: ProcessGroup
    expt_dp: ProcessGroup
    mp: ProcessGroup  # tensor x pipeline
    device: torch.device

    @property
    def coordinates(self) -> dict[str, int]:
        """Place of this rank in the layout: its rank in dp, pp, cp, tp and ep."""
        return {name: getattr(self, name).rank() for name in COORDINATES}

    def __str__(self) -> str:
        return rank_name(self.rank, self.coordinates)

    @property
    def is_first_stage(self) -> bool:
        """True on the ranks that hold the embedding."""
        return self.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """True on the ranks that compute the loss."""
        return self.pp.rank() == self.pp.size() - 1

    @property
    def rank(self) -> int:
        """Rank in the world."""
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return dist.get_world_size()


def rank_name(rank: int, coordinates: Mapping[str, int]) -> str:
    """How messages name a rank: ``rank 5 (dp 1, pp 0, cp 1, tp 0, ep 1)``."""
    return f"rank {rank} ({', '.join(f'{name} {place}' for name, place in coordinates.items())})"


def initialize(parallel: ParallelConfig, seed: int = 1234) -> ParallelGroups:
    """Create the process groups, from torchrun's environment or, without one, for this process alone.

    Args:
        parallel: sizes of the groups, backend and timeout.
        seed: of Megatron's generators. Nothing in this project draws from them: dropout is zero, initial weights and
            noise have their own counters.

    Raises:
        ConfigError: the sizes do not fit the number of processes, each other, or what is supported.
    """
    global _groups, _owns_world
    if _groups is not None:
        raise ConfigError("process groups exist already; call llada_mega.parallel.destroy() first")
    cpu_runtime.install()
    with warnings.catch_warnings():  # Megatron-Core lists what is not installed: llada-mega doctor does that
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    check_group_sizes(parallel, world_size)
    device = _device()
    if not dist.is_initialized():
        _init_world(parallel, device, world_size)
        _owns_world = True
    try:
        # Megatron's default order, tp fastest, then cp, ep, dp, pp; given here because the layout of checkpoints and
        # the meaning of "neighbour" hang on it.
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tp,
            pipeline_model_parallel_size=parallel.pp,
            virtual_pipeline_model_parallel_size=parallel.vp,
            context_parallel_size=parallel.cp,
            expert_model_parallel_size=parallel.ep,
            expert_tensor_parallel_size=parallel.etp,
            order="tp-cp-ep-dp-pp",
            distributed_timeout_minutes=parallel.timeout_minutes,
        )
    except BaseException:
        _destroy_world()
        raise
    model_parallel_cuda_manual_seed(seed)
    collection = ProcessGroupCollection.use_mpu_process_groups()
    names = ("tp", "pp", "cp", "ep", "dp", "dp_cp", "tp_dp_cp", "expt_tp", "expt_dp", "mp")
    groups = {name: getattr(collection, name) for name in names}
    _groups = ParallelGroups(config=parallel, collection=collection, device=device, **groups)
    return _groups


def ensure_single_process() -> ParallelGroups:
    """The groups of this process; when there are none yet, those of one process alone.

    For the Python API and for commands that run in one process. Opens no port of a fixed number.
    """
    return _groups if _groups is not None else initialize(ParallelConfig())


def current_groups() -> ParallelGroups:
    """The groups made by :func:`initialize`.

    Raises:
        ConfigError: there are none.
    """
    if _groups is None:
        raise ConfigError("process groups are not initialised; call llada_mega.parallel.initialize(...) first")
    return _groups


def destroy() -> None:
    """Undo :func:`initialize`; harmless when there is nothing to undo."""
    global _groups
    if _groups is None:
        return
    if (error := sys.exception()) is not None:
        record_failure(error)  # before the other ranks notice that this one hangs up, and fail of that
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    _groups = None
    _destroy_world()


def _destroy_world() -> None:
    global _owns_world
    if _owns_world and dist.is_initialized():
        dist.destroy_process_group()
    _owns_world = False


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _init_world(parallel: ParallelConfig, device: torch.device, world_size: int) -> None:
    backend = parallel.backend
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    elif backend == "nccl" and device.type != "cuda":
        raise ConfigError("parallel.backend=nccl needs a CUDA device; set parallel.backend=auto or gloo")
    if backend == "gloo" and parallel.etp > 1 and parallel.dispatcher == "alltoall":
        raise ConfigError(
            f"parallel.etp={parallel.etp} with parallel.dispatcher=alltoall needs NCCL: gloo gathers only tensors of "
            "one size; set parallel.dispatcher=allgather or parallel.etp=1"
        )
    timeout = timedelta(minutes=parallel.timeout_minutes)
    if world_size > 1 or "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
