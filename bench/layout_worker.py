"""Measures some steps of a run under one layout; runs on every rank: ``layout_worker OUTPUT OVERRIDES...``.

The run is put together as `llada-mega train` does it; only the loop is missing, so that steps alone are timed.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from llada_kernels.partition import TILE

from bench.traffic import TrafficCounter
from llada_mega.config.compose import compose
from llada_mega.config.curriculum import curriculum_of
from llada_mega.config.schema import Config
from llada_mega.config.validate import validate
from llada_mega.data.batch import Batch, round_up
from llada_mega.data.context import shard_batch
from llada_mega.models.router import routers
from llada_mega.parallel import ParallelGroups, destroy, initialize
from llada_mega.parallel.capabilities import choose_software
from llada_mega.planning.communication import MicroBatch, Rank, bytes_of_step
from llada_mega.training.data import TrainingData
from llada_mega.training.run import build_step
from llada_mega.training.step import TrainStep

LEARNING_RATE = 1e-4


@dataclass
class Measured:
    """What one rank saw.

    Attributes:
        seconds: of every timed step.
        peak_mib: the process at its largest; base_mib: before it had a model.
        sent, expected: bytes in the last step by axis, counted and from :mod:`llada_mega.planning.communication`.
        operations: bytes in the last step by "axis operation".
    """

    seconds: list[float]
    peak_mib: float
    base_mib: float
    sent: dict[str, float]
    expected: dict[str, float]
    operations: dict[str, float]


def measure(overrides: list[str], timed_steps: int) -> list[Measured]:
    """A step to warm up, timed steps, and a last one whose traffic is counted. Of all ranks, on every rank."""
    config = compose(Config, overrides)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    validate(config, world_size=world_size)
    software = choose_software(config.model, config.parallel, getattr(torch, config.trainer.dtype))
    data = TrainingData(config, curriculum_of(config))
    groups = initialize(config.parallel, seed=config.seed)
    try:
        base = peak_mib()
        step = build_step(config, groups, None, software, random_weights=True)
        batches = data.batches(0, rank=groups.dp.rank(), world_size=groups.dp.size())
        seconds = []
        for _ in range(1 + timed_steps):
            dist.barrier()
            began = time.perf_counter()
            take_step(step, next(batches))
            seconds.append(time.perf_counter() - began)
        last = next(batches)
        with counted_routes(step, groups) as routes, TrafficCounter(groups) as counter:
            take_step(step, last)
        expected = bytes_of_step(
            config.model,
            config.parallel,
            describe_rank(step, groups, routes[0]),
            [describe(batch, step) for batch in last],
            torch.finfo(getattr(torch, config.trainer.dtype)).bits // 8,
        )
        operations = {f"{axis} {name}": sent for (axis, name), sent in sorted(counter.sent.items())}
        mine = Measured(seconds[1:], peak_mib(), base, counter.by_axis(), expected, operations)
        everyone: list[Any] = [None] * world_size
        dist.all_gather_object(everyone, mine)
        return everyone
    finally:
        destroy()


def take_step(step: TrainStep, batches: list[Batch]) -> None:
    """One step that is always accepted."""
    step(batches, learning_rate=LEARNING_RATE, embedding_noise_std=0.0, accept=lambda measured: True)


def peak_mib() -> float:
    """The largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def describe(batch: Batch, step: TrainStep) -> MicroBatch:
    """Shapes of this rank's part of a micro-batch. Of its keys the clean ones are sent, in whole tiles."""
    context = step.groups.cp
    part = shard_batch(batch, context.rank(), context.size(), work_tile=step.work_tile)
    clean = (batch.input_ids_S.numel() - batch.num_noisy) // context.size()
    return MicroBatch(part.input_ids_S.numel(), part.logit_rows_R.numel(), round_up(clean, TILE))


def describe_rank(step: TrainStep, groups: ParallelGroups, routes_leaving: int) -> Rank:
    """What this rank holds."""
    shared, of_experts = 0, 0
    for model in step.bare_models:
        for parameter in model.parameters():
            if getattr(parameter, "allreduce", True):  # Megatron's mark of an expert's parameter is False
                shared += parameter.numel()
            else:
                of_experts += parameter.numel()
    return Rank(
        layers=sum(len(model.decoder.layers) for model in step.bare_models),
        moe_layers=len(routers(step.bare_models)),
        is_first=groups.is_first_stage,
        is_last=groups.is_last_stage,
        dense_parameters=shared,
        expert_parameters=of_experts,
        dense_copies=groups.dp_cp.size(),
        expert_copies=groups.expt_dp.size(),
        routes_leaving=routes_leaving,
    )


@contextmanager
def counted_routes(step: TrainStep, groups: ParallelGroups) -> Iterator[list[int]]:
    """[number] of (token, expert) pairs, so far, that the routers sent to experts of other ranks."""
    total, rank, size = [0], groups.ep.rank(), groups.ep.size()

    def hook(router: Any, inputs: Any, output: Any) -> None:
        routing_map_TE = output[1]
        of_ranks_TRE = routing_map_TE.unflatten(1, (size, -1))
        if torch.is_grad_enabled():  # a recomputed layer runs once more, without
            total[0] += int(routing_map_TE.sum() - of_ranks_TRE[:, rank].sum())

    handles = [router.register_forward_hook(hook) for router in routers(step.bare_models)]
    try:
        yield total
    finally:
        for handle in handles:
            handle.remove()


def main(output: str, timed_steps: str, *overrides: str) -> None:
    """Rank 0 writes what all ranks measured as JSON."""
    measured = measure(list(overrides), int(timed_steps))
    if os.environ.get("RANK", "0") == "0":
        Path(output).write_text(json.dumps([asdict(rank) for rank in measured]))


if __name__ == "__main__":
    main(*sys.argv[1:])
