"""Peak memory of a rank: what it holds all the time, and the largest moment of a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from llada_mega.config.model import ModelConfig
from llada_mega.config.run import ParallelConfig
from llada_mega.planning import activations
from llada_mega.planning.activations import WIDE, Bytes, Sizes
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
    "optimizer work",
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
    te: bool = False,
) -> Sizes:
    """Sizes of a micro-batch of ``positions`` on a context-parallel rank.

    Args:
        expert_load: tokens of the fullest rank, and of the fullest expert, over the mean.
    """
    tokens = positions // parallel.tp if parallel.sp else positions
    routes = tokens * model.moe.top_k if model.is_moe else 0
    local = max(model.moe.num_experts // parallel.ep, 1)
    uneven = expert_load if parallel.ep > 1 else 1.0
    return Sizes(
        tokens=tokens,
        positions=positions,
        routes=routes * uneven,
        most_routes=routes / local * expert_load,
        logit_rows=logit_rows,
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
    return Peak(name, {key: value for key, value in _add([held, extra]).items() if value})


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
    start = {"embedding" if share.is_first else "residual stream": activations.embedding(model, sizes)}
    start["logits"] = activations.rotary(model, sizes)
    kept = {layer: activations.layer(model, parallel, layer, sizes) for layer in share.layers}
    full = parallel.recompute == "full"
    stays = {
        layer: {"residual stream": activations.layer_input(model, sizes)} if full else kept[layer]
        for layer in share.layers
    }
    waiting = in_flight(parallel, share.stage, num_micro_batches) - 1  # whole micro-batches behind the one at work
    others = _times(waiting, _add([start, *stays.values()]))
    tied = table if model.tie_embeddings and share.is_first and share.is_last else 0

    if share.is_last:
        end = {
            "norms": sizes.tokens * model.hidden_size * sizes.element,
            "logits": activations.logits(model, vocab, sizes),
        }
        yield "logits", _add([others, start, *stays.values(), end])
    lasts = [
        max(found)
        for found in (
            [layer for layer in share.layers if model.is_moe_layer(layer)],
            [layer for layer in share.layers if not model.is_moe_layer(layer)],
        )
        if found
    ]
    for layer in lasts:
        parts = [start, *(stays[other] for other in share.layers if other < layer), kept[layer]]
        parts += [activations.backward_work(model, parallel, layer, sizes), {"backward work": tied}]
        if not full:  # the stream behind the layer is gone; recomputed, its input is there already
            parts.append({"residual stream": -activations.layer_input(model, sizes)})
        yield f"backward of layer {layer}", _add([others, *parts])
    if share.is_first:
        yield "backward of the embedding", _add([others, start, {"backward work": table + tied}])
    largest = max(vocab * model.hidden_size if share.is_first or share.is_last else 0, model.hidden_size**2)
    shrink = copies.dense if parallel.distributed_optimizer else 1
    yield "optimizer", {"optimizer work": 2 * WIDE * largest / shrink}


def in_flight(parallel: ParallelConfig, stage: int, num_micro_batches: int) -> float:
    """Micro-batches whose activations a stage holds at once, in whole passes through all its chunks.

    1F1B: one for every stage from here on. Interleaved, in chunks: Megatron-Core's warm-up, and the one at work.
    """
    chunks = parallel.vp or 1
    behind = parallel.pp - stage - 1
    if chunks == 1:
        return min(behind + 1, num_micro_batches)
    return min((2 * behind + (chunks - 1) * parallel.pp + 1) / chunks, num_micro_batches)


def _add(parts: Iterable[Bytes]) -> Bytes:
    total: Counter[str] = Counter()
    for part in parts:
        for component, count in part.items():
            total[component] += count  # type: ignore[assignment]
    return dict(total)


def _times(factor: float, part: Bytes) -> Bytes:
    return {component: factor * count for component, count in part.items()}
