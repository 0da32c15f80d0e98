"""Runs on every rank of ``test_traffic.py``."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from bench.layout_worker import measure
from bench.traffic import TrafficCounter
from llada_mega.config.run import ParallelConfig
from llada_mega.parallel import destroy, initialize


def measure_layout(overrides: list[str]) -> list[dict[str, Any]]:
    """What the ranks of a layout count in one step, and what the formula says."""
    return [asdict(rank) for rank in measure(overrides, timed_steps=0)]


def planted() -> dict[tuple[str, str], float]:
    """One of every collective over two tensor-parallel ranks, 1 KiB each, and some that must not count."""
    groups = initialize(ParallelConfig(tp=2))
    group, rank = groups.tp, groups.tp.rank()
    kib = torch.zeros(256)
    half = torch.zeros(128)
    with TrafficCounter(groups) as counter:
        dist.all_reduce(kib, group=group)
        dist.all_gather_into_tensor(kib, half, group=group)
        dist.reduce_scatter_tensor(half, kib, group=group)
        dist.all_gather([torch.empty(128), torch.empty(128)], half, group=group)
        dist.all_to_all_single(torch.empty(256), kib, group=group)
        splits = [[192, 64], [64, 192]]  # rank 0 keeps 192 elements and sends 64, rank 1 likewise
        dist.all_to_all_single(torch.empty(256), kib, splits[rank], splits[rank], group=group)
        with dist._coalescing_manager(group=group, async_ops=True) as work:
            dist.all_reduce(kib, group=group)
            dist.all_reduce(kib, group=group)
        work.wait()
        for request in dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, kib, group=group, group_peer=1 - rank),
                dist.P2POp(dist.irecv, torch.empty(256), group=group, group_peer=1 - rank),
            ]
        ):
            request.wait()
        _Planted.apply(half.requires_grad_(), group).sum().backward()
        dist.all_reduce(kib, group=groups.cp)  # alone in its group
        dist.barrier(group)
        with suppress(NotImplementedError):
            functional.all_reduce(kib, "sum", group)
            raise AssertionError("a functional collective was let through")
    dist.all_reduce(kib, group=group)  # after the counting
    destroy()
    return dict(counter.sent)


class _Planted(torch.autograd.Function):
    """Broadcasts in its backward pass."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        whole = torch.zeros(256)
        dist.broadcast(whole, group=ctx.group, group_src=0)
        return gradients[0], None
