"""Process groups, the CPU runtime of Megatron-Core, and what this machine offers it."""

from __future__ import annotations

from llada_mega.parallel.capabilities import hide_unusable
from llada_mega.parallel.groups import (
    ParallelGroups,
    current_groups,
    destroy,
    ensure_single_process,
    initialize,
    rank_name,
)

hide_unusable()  # every package that imports Megatron-Core imports this one first

__all__ = ["ParallelGroups", "current_groups", "destroy", "ensure_single_process", "initialize", "rank_name"]
