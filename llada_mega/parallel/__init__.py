"""Process groups and the CPU runtime of Megatron-Core."""

from __future__ import annotations

from llada_mega.parallel.groups import (
    ParallelGroups,
    current_groups,
    destroy,
    ensure_single_process,
    initialize,
    rank_name,
)

__all__ = ["ParallelGroups", "current_groups", "destroy", "ensure_single_process", "initialize", "rank_name"]
