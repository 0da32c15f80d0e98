"""Which parallel layouts a model, a batch and a number of processes allow. Needs no torch and no processes.

Each refusal is a ConfigError of one line that names the keys, their values and values that work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from llada_mega.config.checks import at_least, divides, divisors, one_of, require, words
from llada_mega.config.data import DataConfig
from llada_mega.config.model import ModelConfig
from llada_mega.config.run import ParallelConfig
from llada_mega.config.training import TrainerConfig
from llada_mega.errors import ConfigError

DEEP_EP_DISPATCHERS = (
    "deepep",
    "hybridep",
)  # of one library; the second is for NVLink across nodes
RECOMPUTABLE = ("core_attn", "layernorm", "mlp")
RECOMPUTABLE_MOE = ("moe", "moe_act", "shared_experts")


def check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raises ConfigError when ``model`` cannot be split as ``parallel`` says."""
    check_group_sizes(parallel)
    one_of("parallel.dispatcher", parallel.dispatcher, ("alltoall", "allgather", *DEEP_EP_DISPATCHERS))
    _check_activations(model, parallel)
    one_of("parallel.backend", parallel.backend, ("auto", "nccl", "gloo"))
    for key in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        divides("parallel.tp", parallel.tp, f"model.{key}", getattr(model, key))
    _check_stages(model.num_layers, parallel)
    if model.is_moe:
        _check_experts(model, parallel)
    else:
        split = f"parallel.ep={parallel.ep} parallel.etp={parallel.etp}"
        require(parallel.ep == parallel.etp == 1, f"{split} split experts, and the model has none; set both to 1")


def check_group_sizes(parallel: ParallelConfig, world_size: int | None = None) -> None:
    """Raises ConfigError when group sizes contradict each other or do not tile ``world_size`` processes."""
    at_least(
        1,
        parallel__tp=parallel.tp,
        parallel__pp=parallel.pp,
        parallel__vp=parallel.vp,
        parallel__cp=parallel.cp,
        parallel__ep=parallel.ep,
        parallel__etp=parallel.etp,
        parallel__timeout_minutes=parallel.timeout_minutes,
    )
    require(
        not parallel.sp or parallel.tp > 1, "parallel.sp=true needs parallel.tp of 2 or more; set parallel.sp=false"
    )
    virtual = parallel.vp or 1
    require(
        virtual == 1 or parallel.pp > 1,
        f"parallel.vp={virtual} needs a pipeline, but parallel.pp=1; set parallel.vp=null or raise parallel.pp",
    )
    if world_size is None:
        return
    for names in (("tp", "pp", "cp"), ("etp", "ep", "pp")):
        product = math.prod(getattr(parallel, name) for name in names)
        sizes = " x ".join(f"{name}={getattr(parallel, name)}" for name in names)
        require(
            world_size % product == 0,
            f"parallel.{sizes} = {product} does not divide the {world_size} processes of this run; start a multiple of "
            f"{product}, or choose sizes whose product is {words(divisors(world_size))}",
        )


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Ranks that read different samples."""
    return world_size // (parallel.tp * parallel.pp * parallel.cp)


def check_batches(trainer: TrainerConfig, parallel: ParallelConfig, world_size: int | None) -> None:
    """Raises ConfigError when a global batch is not the same number of whole micro-batches on every rank.

    With interleaved stages the schedule deals out micro-batches in groups of ``parallel.pp``, and the last group must
    not be short (Megatron-Core, ``forward_backward_pipelining_with_interleaving``).
    """
    ranks = data_parallel_size(parallel, world_size) if world_size else 1
    rounds = parallel.pp if parallel.vp else 1
    unit = trainer.micro_batch_size * ranks * rounds
    factors = f"trainer.micro_batch_size={trainer.micro_batch_size} x {ranks} data-parallel ranks"
    if rounds > 1:
        factors += f" x parallel.pp={rounds} (interleaved stages take micro-batches by {rounds})"
    batch = trainer.global_batch_size
    lower = batch - batch % unit
    choices = f"{lower} or {lower + unit}" if lower else f"{unit}"
    require(
        batch % unit == 0,
        f"trainer.global_batch_size={batch} is no multiple of {factors}; use a multiple of {unit}, as in {choices}",
    )


def check_lengths(data: DataConfig, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raises ConfigError when ranks that exchange tokens by all-gather could have micro-batches of unequal lengths.

    How many clean copies a micro-batch needs depends on its samples, and the ranks of an expert group that reaches
    across data-parallel ranks have different samples.
    """
    crosses_samples = parallel.ep * parallel.etp > parallel.tp * parallel.cp
    require(
        not (model.is_moe and parallel.dispatcher == "allgather" and crosses_samples) or data.clean_tokens == "all",
        f"parallel.dispatcher=allgather over parallel.etp={parallel.etp} x ep={parallel.ep} ranks with different "
        "samples needs micro-batches of one length; set data.clean_tokens=all or parallel.dispatcher=alltoall",
    )


def stage_layers(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """Layers of every pipeline stage, all its chunks together, of a layout that :func:`check_layout` accepts."""
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    middle = parallel.pp - (first is not None) - (last is not None)
    each = (num_layers - (first or 0) - (last or 0)) // middle if middle else 0
    return [*([] if first is None else [first]), *([each] * middle), *([] if last is None else [last])]


# ---- pipeline stages -------------------------------------------------------------------------------------------------


def _check_stages(num_layers: int, parallel: ParallelConfig) -> None:
    pp, virtual = parallel.pp, parallel.vp or 1
    ends = {
        f"parallel.num_layers_in_{end}_pipeline_stage": getattr(parallel, f"num_layers_in_{end}_pipeline_stage")
        for end in ("first", "last")
    }
    given = {key: layers for key, layers in ends.items() if layers is not None}
    for key, layers in given.items():
        require(pp > 1, f"{key}={layers} needs a pipeline, but parallel.pp=1; set {key}=null or raise parallel.pp")
        require(
            layers >= virtual and layers % virtual == 0,
            f"{key}={layers} does not split into parallel.vp={virtual} chunks; use a multiple of {virtual}",
        )
    rest, stages = num_layers - sum(given.values()), pp - len(given)
    if rest == stages == 0 or (stages > 0 and rest > 0 and rest % (stages * virtual) == 0):
        return
    what = f"parallel.pp={pp} x parallel.vp={virtual} does not divide model.num_layers={num_layers}"
    if given:
        stated = " ".join(f"{key}={layers}" for key, layers in given.items())
        what = (
            f"{stated} leave {rest} of model.num_layers={num_layers} to {stages} stages of parallel.vp={virtual} chunks"
        )
    choices = (
        ["parallel.vp=null"] if num_layers % virtual else [f"parallel.pp={words(divisors(num_layers // virtual))}"]
    )
    if uneven := _lighter_ends(num_layers, pp, virtual):
        choices.append(" ".join(f"{key}={layers}" for key, layers in zip(ends, uneven, strict=True)))
    raise ConfigError(f"{what}; use {', or '.join(choices)}")


def _lighter_ends(num_layers: int, pp: int, virtual: int) -> tuple[int, int] | None:
    """Layers of the first and last stage such that the others are equal and not lighter, as even as possible."""

    def candidates() -> Iterator[tuple[int, int, int]]:
        for first in range(virtual, num_layers, virtual):
            for last in range(virtual, first + 1, virtual):  # the output projection weighs more than the embedding
                rest = num_layers - first - last
                if pp == 2:
                    if rest == 0:
                        yield first - last, first, last
                elif rest % ((pp - 2) * virtual) == 0 and rest // (pp - 2) >= first:
                    yield rest // (pp - 2) - last, first, last

    best = min(candidates(), default=None)
    return best and (best[1], best[2])


# ---- activations -----------------------------------------------------------------------------------------------------


def _check_activations(model: ModelConfig, parallel: ParallelConfig) -> None:
    """What is kept for the backward pass, what is made again, and what waits in host memory."""
    one_of("parallel.recompute", parallel.recompute, ("none", "selective", "full"))
    modules = parallel.recompute_modules
    for module in modules:
        choices = RECOMPUTABLE + RECOMPUTABLE_MOE if model.is_moe else RECOMPUTABLE
        require(
            module in choices,
            f"parallel.recompute_modules={modules}: {module} is no part of this model that can be recomputed; "
            f"use {words(choices)}",
        )
    require(
        parallel.recompute == "selective" or not modules,
        f"parallel.recompute_modules={modules} has no effect with parallel.recompute={parallel.recompute}; "
        "set parallel.recompute=selective",
    )
    require(
        parallel.recompute != "selective" or bool(modules),
        "parallel.recompute=selective needs parallel.recompute_modules; name modules, as in "
        f"[{'shared_experts' if model.is_moe else 'mlp'}] or with TransformerEngine "
        f"[{'layernorm, moe_act' if model.is_moe else 'layernorm'}]",
    )
    layers = parallel.offload_layers
    require(
        0 <= layers < model.num_layers,
        f"parallel.offload_layers={layers} is out of range; use 0 to {model.num_layers - 1}: the last layer's "
        "activations are needed at once",
    )
    require(
        layers == 0 or parallel.recompute == "none",
        f"parallel.offload_layers={layers} does not go with parallel.recompute={parallel.recompute}; "
        "set parallel.recompute=none",
    )
    require(
        layers == 0 or parallel.pp == 1,
        f"parallel.offload_layers={layers} does not go with parallel.pp={parallel.pp}; set parallel.pp=1 or recompute",
    )


# ---- experts ---------------------------------------------------------------------------------------------------------


def _check_experts(model: ModelConfig, parallel: ParallelConfig) -> None:
    moe = model.moe
    divides("parallel.ep", parallel.ep, "model.moe.num_experts", moe.num_experts)
    divides("parallel.etp", parallel.etp, "model.moe.expert_ffn_hidden_size", moe.expert_ffn_hidden_size)
    if moe.shared_expert_ffn_hidden_size:
        shared = moe.shared_expert_ffn_hidden_size
        divides("parallel.tp", parallel.tp, "model.moe.shared_expert_ffn_hidden_size", shared)
    require(
        parallel.tp == 1 or parallel.sp,
        f"parallel.tp={parallel.tp} with experts needs sequence parallelism; set parallel.sp=true",
    )
    # Micro-batches of a pipeline differ in length, and Megatron-Core's all-gather dispatcher wants one length.
    require(
        parallel.dispatcher != "allgather" or parallel.pp == 1,
        f"parallel.dispatcher=allgather does not work with parallel.pp={parallel.pp}; use parallel.dispatcher=alltoall",
    )
    require(
        parallel.dispatcher not in DEEP_EP_DISPATCHERS or parallel.ep * parallel.etp > 1,
        f"parallel.dispatcher={parallel.dispatcher} sends tokens between the ranks of experts, and parallel.ep="
        f"{parallel.ep} has none; use parallel.dispatcher=alltoall",
    )
