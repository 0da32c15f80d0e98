"""Process groups and the CPU runtime of Megatron-Core."""

from __future__ import annotations

from llada_mega.parallel.groups import (
    ParallelGroups,
    check_sizes,
    current_groups,
    destroy,
    ensure_single_process,
    initialize,
)

__all__ = ["ParallelGroups", "check_sizes", "current_groups", "destroy", "ensure_single_process", "initialize"]
