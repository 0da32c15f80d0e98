"""The steps of :mod:`tests.models.meta_gpu`, apart from it because importing that changes what torch says of CUDA."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from llada_mega.config.run import ParallelConfig

MICRO_BATCHES = 2
LAYER_PASSES = 2 * MICRO_BATCHES  # of the two MoE layers in a step


@dataclass(frozen=True)
class Case:
    """A model under a layout, seen from rank 0."""

    model: str  # dense | moe
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    world_size: int = 1
    only_build: bool = False


CASES = {
    "dense": Case("dense"),
    "dense, distributed optimizer, overlap": Case("dense", ParallelConfig(distributed_optimizer=True, overlap=True), 2),
    "moe": Case("moe"),
    "moe, recompute": Case("moe", ParallelConfig(recompute="selective", recompute_modules=["core_attn", "mlp", "moe"])),
    "moe, full recompute": Case("moe", ParallelConfig(recompute="full")),
    "moe, tp2 sp": Case("moe", ParallelConfig(tp=2, sp=True), 2),
    "moe, ep2": Case("moe", ParallelConfig(ep=2), 2),
    "moe, ep2, deepep": Case("moe", ParallelConfig(ep=2, dispatcher="deepep"), 2, only_build=True),
    "moe, ep2, hybridep": Case("moe", ParallelConfig(ep=2, dispatcher="hybridep"), 2, only_build=True),
}
