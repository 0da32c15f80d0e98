"""Which layouts of a run fit on a number of devices, and which of them are fastest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from llada_mega.config.checks import at_least, divisors
from llada_mega.config.run import ParallelConfig
from llada_mega.config.validate import validate
from llada_mega.errors import ConfigError
from llada_mega.planning.options import PlanOptions
from llada_mega.planning.plan import Planner
from llada_mega.planning.results import Plan

MICRO_BATCHES = (1, 2, 4)
CHUNKS = (None, 2, 4)


@dataclass(frozen=True)
class Search:
    """The fastest layouts that fit, how many others there are, and how many are left out because they do not fit."""

    best: tuple[Plan, ...]
    fitting: int
    too_large: int


def search_layouts(options: PlanOptions) -> Search:
    """Try every layout that the model, the batch and the devices allow; ``options.gpus`` must be given.

    Sequence parallelism goes with tensor parallelism, the optimizer's state is split over the data-parallel ranks, and
    tensor parallelism stays inside a node. Recomputation is none, of what is cheap to make again, or full.

    Raises:
        ConfigError: ``gpus`` is not given.
    """
    if options.gpus is None:
        raise ConfigError("search=true needs the number of devices; give gpus=N, as in gpus=512")
    at_least(1, top=options.top)
    planner, too_large = Planner(options), 0
    fitting: list[tuple[float, ParallelConfig, int]] = []
    for parallel, micro_batch_size in candidates(options, planner.device.node_size, planner.implementation):
        if not all(rank.fits for rank in planner.memory(parallel, micro_batch_size, options.gpus)):
            too_large += 1
            continue
        fitting.append((planner.days(parallel, micro_batch_size, options.gpus), parallel, micro_batch_size))
    fitting.sort(key=lambda found: found[0])
    best = tuple(
        planner.plan(parallel, micro_batch_size, options.gpus)
        for _, parallel, micro_batch_size in fitting[: options.top]
    )
    return Search(best, len(fitting), too_large)


def candidates(options: PlanOptions, node_size: int, implementation: str) -> Iterator[tuple[ParallelConfig, int]]:
    """Layouts and micro-batch sizes that :func:`validate` accepts on ``options.gpus`` devices."""
    model, gpus = options.model, options.gpus or 1
    if implementation == "te":  # a shared expert would communicate again under tensor parallelism
        cheap = ["layernorm", "moe_act"] if model.is_moe else ["layernorm"]
    else:
        cheap = ["shared_experts"] if model.is_moe else []
    inside = [size for size in divisors(gpus) if size <= node_size]
    experts = [size for size in divisors(model.moe.num_experts) if gpus % size == 0] if model.is_moe else [1]
    stages = [size for size in divisors(gpus) if size <= model.num_layers]
    choices = itertools.product(inside, stages, CHUNKS, (1, 2), experts, ("none", "selective", "full"), MICRO_BATCHES)
    for tp, pp, vp, cp, ep, recompute, micro_batch_size in choices:
        if recompute == "selective" and not cheap:
            continue
        if (vp and pp == 1) or tp * pp * cp > gpus or ep * pp > gpus:
            continue
        parallel = replace(
            options.parallel,
            tp=tp,
            pp=pp,
            vp=vp,
            cp=cp,
            ep=ep,
            etp=1,
            sp=tp > 1,
            recompute=recompute,
            recompute_modules=cheap if recompute == "selective" else [],
            offload_layers=0,
            distributed_optimizer=True,
            num_layers_in_first_pipeline_stage=None,
            num_layers_in_last_pipeline_stage=None,
        )
        trainer = replace(options.trainer, micro_batch_size=micro_batch_size)
        try:
            validate(replace(options, parallel=parallel, trainer=trainer), gpus)
        except ConfigError:
            continue
        yield parallel, micro_batch_size
