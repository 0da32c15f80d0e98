"""Peak memory of a rank: what it holds all the time, and the largest moment of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from llada_mega.config.model import ModelConfig
from llada_mega.config.run import ParallelConfig
from llada_mega.planning import activations
from llada_mega.planning.activations import WIDE, Bytes, Sizes
from llada_mega.planning.schedule import states
from llada_mega.planning.share import Share, vocab_rows

GIB = 2**30
# Components in the order of tables: first what is held all the time, then activations, then what a moment needs.
COMPONENTS = (
    "parameters",
    "gradients",
    "optimizer",
    "batch",
    "embedding",
    "residual stream",
    "norms",
    "attention",
    "feed-forward",
    "router",
    "experts",
    "logits",
    "backward work",
    "outside modules",
)


@dataclass(frozen=True)
class Peak:
    """The largest moment of a step on one rank: when it is, and bytes by component then."""

    moment: str
    components: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.components.values())


@dataclass(frozen=True)
class Copies:
    """Ranks among which the distributed optimizer splits the state of dense and of expert parameters."""

    dense: int
    experts: int

    @classmethod
    def of(cls, parallel: ParallelConfig, world_size: int) -> Copies:
        """In a run of ``world_size`` processes."""
        dense = world_size // (parallel.tp * parallel.pp)
        return cls(dense, world_size // (parallel.etp * parallel.ep * parallel.pp))


def sizes_of(
    model: ModelConfig,
    parallel: ParallelConfig,
    positions: int,
    logit_rows: int,
    dtype: torch.dtype,
    *,
    expert_load: float = 1.0,
    fullest_expert: float | None = None,
    te: bool = False,
) -> Sizes:
    """Sizes of a micro-batch of ``positions`` on a context-parallel rank.

    Args:
        expert_load: tokens of the fullest expert-parallel rank over the mean.
        fullest_expert: tokens of the fullest expert over the mean; default: as ``expert_load``.
    """
    split = parallel.tp if parallel.sp else 1
    # Ranks that share an expert's matrices compute the tokens of all of them.
    routes = model.moe.top_k * parallel.etp if model.is_moe else 0
    return Sizes(
        tokens=positions // split,
        positions=positions,
        logit_rows=logit_rows,
        last_tokens=logit_rows // split,
        routes_a_token=routes * (expert_load if parallel.ep > 1 else 1.0),
        expert_share=routes / max(model.moe.num_experts // parallel.ep, 1) * (fullest_expert or expert_load),
        element=dtype.itemsize,
        te=te,
    )


def peak_memory(
    model: ModelConfig, parallel: ParallelConfig, share: Share, copies: Copies, sizes: Sizes, num_micro_batches: int
) -> Peak:
    """The peak of a rank of the pipeline stage that ``share`` describes."""
    held = persistent(parallel, share, copies, sizes)
    held["batch"] = sizes.positions * 21 + sizes.logit_rows * 40.0  # ids, positions, padding, mask; rows with labels
    moments = _moments(model, parallel, share, copies, sizes, num_micro_batches)
    name, extra = max(moments, key=lambda moment: sum(moment[1].values()))
    return Peak(name, {key: value for key, value in _sum([held, extra]).items() if value})


def persistent(parallel: ParallelConfig, share: Share, copies: Copies, sizes: Sizes) -> Bytes:
    """What stays from step to step: weights, fp32 gradient buffers, two fp32 moments, fp32 weights under bf16.

    With the distributed optimizer every rank keeps the last two of its part of the parameters alone.
    """
    state = 2 * WIDE + (WIDE if sizes.element < WIDE else 0)
    split = parallel.distributed_optimizer
    return {
        "parameters": share.total_parameters * sizes.element,
        "gradients": share.total_parameters * WIDE,
        "optimizer": state
        * (
            share.dense_parameters / (copies.dense if split else 1)
            + share.expert_parameters / (copies.experts if split else 1)
        ),
    }


def _moments(
    model: ModelConfig, parallel: ParallelConfig, share: Share, copies: Copies, sizes: Sizes, num_micro_batches: int
) -> Iterator[tuple[str, Bytes]]:
    """Moments of a step that can be the largest, and what they need beyond what is held."""
    vocab = vocab_rows(model, parallel)
    table = vocab * model.hidden_size * sizes.element
    tied = table if model.tie_embeddings and share.is_first and share.is_last else 0
    kept = {layer: activations.layer(model, parallel, layer, sizes) for layer in share.layers}
    stays = {layer: activations.staying(model, parallel, layer, sizes) for layer in share.layers}
    if parallel.recompute == "full":
        # A layer's input is the output of what is before it, which the first one of a chunk gets from outside.
        first = {chunk[0] for chunk in share.chunks}
        stays = {
            layer: {"residual stream": 0.0 if layer in first else activations.layer_input(model, sizes)}
            for layer in share.layers
        }
    starts = [_start(model, share, chunk, sizes) for chunk in range(len(share.chunks))]
    whole = [
        _sum([start, *(stays[layer] for layer in chunk)]) for start, chunk in zip(starts, share.chunks, strict=True)
    ]
    for state in states(parallel.pp, len(share.chunks), share.stage, num_micro_batches):
        chunk = share.chunks[state.going_back]
        waiting = [count - (index == state.going_back) for index, count in enumerate(state.held)]
        others = _sum(_times(count, part) for count, part in zip(waiting, whole, strict=True))
        if share.is_last and state.going_back == len(share.chunks) - 1:
            end = {
                "norms": sizes.last_tokens * model.hidden_size * sizes.element,
                "logits": activations.logits(model, vocab, parallel, sizes),
            }
            yield "logits", _sum([others, whole[state.going_back], end])
        for layer in _last_of_each_kind(model, chunk):
            parts = [others, starts[state.going_back], *(stays[other] for other in chunk if other < layer), kept[layer]]
            parts += [activations.backward_work(model, parallel, layer, sizes), {"backward work": tied}]
            if parallel.recompute == "full":
                parts.append(stays[layer])
            else:  # what it gave to the layer behind it, which is done, is gone
                parts.append({"residual stream": -activations.layer_output(model, parallel, layer, sizes)})
            yield f"backward of layer {layer}", _sum(parts)
        if share.is_first and state.going_back == 0:
            yield "backward of the embedding", _sum([others, starts[0], {"backward work": table + tied}])
    largest = max(vocab * model.hidden_size if share.is_first or share.is_last else 0, model.hidden_size**2)
    shrink = copies.dense if parallel.distributed_optimizer else 1
    yield "optimizer", {"outside modules": 2 * WIDE * largest / shrink}


def _start(model: ModelConfig, share: Share, chunk: int, sizes: Sizes) -> Bytes:
    """What a chunk keeps beside its layers: its input, and the rotary factors."""
    component = "embedding" if share.is_first and chunk == 0 else "outside modules"
    return {component: activations.layer_input(model, sizes), "logits": activations.rotary(model, sizes)}


def _last_of_each_kind(model: ModelConfig, layers: Sequence[int]) -> list[int]:
    """The last dense layer, the last one with experts, and the one before a last layer that computes few rows."""
    moe = [layer for layer in layers if model.is_moe_layer(layer)]
    dense = [layer for layer in layers if not model.is_moe_layer(layer)]
    return [layer for found in (moe, dense) for layer in found[-2:]]


def _sum(parts: Iterable[Bytes]) -> Bytes:
    total: dict[str, float] = {}
    for part in parts:
        for component, count in part.items():
            total[component] = total.get(component, 0.0) + count
    return total


def _times(factor: float, part: Bytes) -> Bytes:
    return {component: factor * count for component, count in part.items()}
