"""Processes that share out work without sharing a model: conversions and merges under torchrun."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

_TIMEOUT = timedelta(hours=12)  # a barrier waits for the slowest share of a large conversion


@dataclass(frozen=True)
class Workers:
    """This process's number and how many there are; alone by default."""

    rank: int = 0
    size: int = 1

    @classmethod
    def from_launcher(cls) -> Workers:
        """The processes that torchrun has started, connected by gloo; this process alone without it."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_TIMEOUT)
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """True for the process that does what is done once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            dist.barrier()


ALONE = Workers()
