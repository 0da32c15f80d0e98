"""How long a step takes: work and bytes over rates, with the efficiencies of ``assume``. Nothing here is measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from llada_mega.config.model import ModelConfig
from llada_mega.config.run import ParallelConfig
from llada_mega.planning import communication
from llada_mega.planning.activations import WIDE, layer, recomputes, staying
from llada_mega.planning.hardware import Device
from llada_mega.planning.memory import Copies, Sizes
from llada_mega.planning.options import Assumptions
from llada_mega.planning.shapes import Shape
from llada_mega.planning.share import Share, last_layer_is_whole
from llada_mega.training.flops import STEP, Flops, layer_flops, logit_flops

# Attention multiplies twice forward and, as the scores are computed again, five times backward; a model FLOP counts
# three times two products.
ATTENTION_PASSES = 3.5
# Grouped products compute whole tiles of so many rows of an expert; half a tile of each is empty on average.
EXPERT_TILE = 128
# Every byte that is kept was written and is read forward; backward it is read, and a gradient as large is written and
# read.
PASSES_OVER_KEPT = 5


@dataclass(frozen=True)
class Work:
    """One micro-batch on one rank.

    Attributes:
        flops: forward, by kernel; repeated: those of what is recomputed.
        tiles: pairs in live tiles over visible ones.
        expert_rows: tokens of a routed expert.
        kept: bytes that layers keep for their backward pass without recomputation; kept_again: those recomputed.
    """

    flops: Flops
    repeated: Flops
    tiles: float
    expert_rows: float
    kept: float
    kept_again: float

    @classmethod
    def of(cls, model: ModelConfig, parallel: ParallelConfig, share: Share, sizes: Sizes, shape: Shape) -> Work:
        """Of the share of a pipeline stage; context-parallel ranks have equal parts of the attention."""
        pairs, last = shape.visible_pairs / parallel.cp, model.num_layers - 1
        flops, repeated, kept, kept_again = Flops(), Flops(), 0.0, 0.0
        for index in share.layers:
            outputs: float = sizes.positions
            seen = pairs
            if index == last and not last_layer_is_whole(model, parallel):
                outputs, seen = sizes.logit_rows, shape.logit_pairs / parallel.cp
            of_layer = layer_flops(model, index, sizes.positions, seen, outputs)
            flops += of_layer
            repeated += _repeated(model, parallel, index, of_layer, outputs)
            bytes_kept = sum(layer(model, parallel, index, sizes).values())
            staying_bytes = (
                0.0 if parallel.recompute == "full" else sum(staying(model, parallel, index, sizes).values())
            )
            kept += bytes_kept
            kept_again += bytes_kept - staying_bytes if index >= parallel.offload_layers else 0.0
        if share.is_last:
            flops += logit_flops(model, sizes.logit_rows)
        part, tiles = 1 / parallel.tp, shape.tile_pairs / shape.visible_pairs
        rows = sizes.tokens * sizes.routes_a_token * parallel.ep / max(model.moe.num_experts, 1)
        return cls(part * flops, part * repeated, tiles, rows, kept, kept_again)


def _repeated(model: ModelConfig, parallel: ParallelConfig, index: int, flops: Flops, outputs: float) -> Flops:
    """What of a layer's forward pass is made again backward."""
    if parallel.recompute == "full":
        return flops
    is_moe = model.is_moe_layer(index)
    width = model.moe.shared_expert_ffn_hidden_size if is_moe else model.ffn_hidden_size
    has_network = any(recomputes(parallel, module) for module in (("moe", "shared_experts") if is_moe else ("mlp",)))
    return Flops(
        linear=6.0 * outputs * model.hidden_size * width if has_network else 0.0,
        experts=flops.experts if recomputes(parallel, "moe") else 0.0,
        attention=flops.attention if recomputes(parallel, "core_attn") else 0.0,
    )


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the slowest pipeline stage.

    Attributes:
        linear, experts, attention, logits, memory: computation; ``memory`` is what waits for bandwidth.
        recompute: forward passes repeated.
        tp, cp, ep, pp: communication inside micro-batches, none of it hidden.
        bubble: stages that wait for others at both ends of the step.
        dp: gradients and weights across data-parallel ranks, what is not hidden.
        optimizer: reads and writes of its state.
    """

    linear: float
    experts: float
    attention: float
    logits: float
    memory: float
    recompute: float
    tp: float
    cp: float
    ep: float
    pp: float
    bubble: float
    dp: float
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds."""
        return sum(vars(self).values())


def step_time(
    parallel: ParallelConfig,
    share: Share,
    copies: Copies,
    sizes: Sizes,
    work: Work,
    sent: dict[str, float],
    num_micro_batches: int,
    device: Device,
    assume: Assumptions,
    dtype: str,
    fp8: bool,
) -> StepTime:
    """Of a rank of the pipeline stage ``share``, which sends ``sent`` bytes by axis in a step.

    ``fp8``: the layers' matrix products are in FP8; attention and logits are in ``dtype``.
    """
    bandwidth = device.memory_gb_per_s * 1e9 * assume.memory_efficiency
    wide, layers = device.peak_tflops[dtype] * 1e12, device.peak_tflops["fp8" if fp8 else dtype] * 1e12
    linear = layers * assume.linear_efficiency
    attention = wide * assume.attention_efficiency / work.tiles
    count, flops, again = num_micro_batches, work.flops, work.repeated
    expert_rate = layers * assume.expert_efficiency / (assume.expert_load if parallel.ep > 1 else 1.0)
    expert = partial(_grouped_product, rows=work.expert_rows, rate=expert_rate, bandwidth=bandwidth)
    read, added = sizes.element * share.expert_parameters, 2 * WIDE * share.expert_parameters
    compute = {
        "linear": STEP * flops.linear / linear,
        "experts": 2 * expert(flops.experts, read) + expert(flops.experts, added),
        "attention": ATTENTION_PASSES * flops.attention / attention,
        "logits": STEP * flops.logits / (wide * assume.linear_efficiency),
        "memory": PASSES_OVER_KEPT * work.kept / bandwidth,
        "recompute": again.linear / linear
        + (expert(again.experts, read) if again.experts else 0.0)
        + again.attention / attention
        + 2 * work.kept_again / bandwidth,
    }
    compute = {name: count * seconds for name, seconds in compute.items()}
    moved = {
        axis: sent.get(axis, 0.0) / rate(axis, parallel, copies, device, assume) for axis in ("tp", "cp", "ep", "pp")
    }
    busy = sum(compute.values()) + sum(moved.values())
    dp = sent.get("dp", 0.0) / rate("dp", parallel, copies, device, assume)
    hidden = min(assume.overlapped * dp, busy / count * _beside_gradients(parallel)) if parallel.overlap else 0.0
    shrink = copies if parallel.distributed_optimizer else Copies(1, 1)
    state = share.dense_parameters / shrink.dense + share.expert_parameters / shrink.experts
    # Gradient, two moments and weights are read, moments and weights written; the gradient buffers are cleared.
    traffic = 7 * WIDE * state + (sizes.element + WIDE) * share.total_parameters
    return StepTime(
        **compute,
        **moved,
        bubble=busy / count * (parallel.pp - 1) / (parallel.vp or 1),
        dp=dp - hidden,
        optimizer=traffic / bandwidth,
    )


def _grouped_product(flops: float, weights: float, *, rows: float, rate: float, bandwidth: float) -> float:
    """Seconds of one of the products that experts' weights have part in: few rows of many experts wait for memory.

    Args:
        flops: of all rows that there are.
        weights: bytes of them that are read, or of their gradient, which is read, added to and written.
    """
    tiles = 1 + EXPERT_TILE / 2 / rows if rows else 1.0
    return max(tiles * flops / rate, weights / bandwidth)


def _beside_gradients(parallel: ParallelConfig) -> float:
    """Micro-batches whose work can hide the traffic of gradients and weights, which are whole after the last one.

    Of interleaved stages a chunk's gradients are whole when the last ``pp`` micro-batches have left it for the next.
    """
    chunks = parallel.vp or 1
    return (parallel.pp * (chunks - 1) + 1) / chunks


def rate(axis: str, parallel: ParallelConfig, copies: Copies, device: Device, assume: Assumptions) -> float:
    """Bytes a second that a rank sends along an axis: links inside a node, the network for the part that leaves it.

    Ranks follow each other along tp, cp, then dp and pp; those of the experts along etp, ep.
    """
    inside, outside = (gb * 1e9 * assume.link_efficiency for gb in (device.link_gb_per_s, device.network_gb_per_s))
    reach = {
        "tp": parallel.tp,
        "cp": parallel.tp * parallel.cp,
        "ep": parallel.etp * parallel.ep,
        "dp": parallel.tp * copies.dense,
        "pp": parallel.tp * copies.dense * parallel.pp,
    }[axis]
    if reach <= device.node_size:
        return inside
    if axis != "ep" or parallel.dispatcher == "allgather" or parallel.etp > device.node_size:
        # A ring is as fast as its slowest link.
        return outside
    leaves = 1 - (device.node_size // parallel.etp - 1) / max(parallel.ep - 1, 1)
    return 1 / (leaves / outside + (1 - leaves) / inside)


def sent_by_rank(
    model: ModelConfig,
    parallel: ParallelConfig,
    share: Share,
    copies: Copies,
    sizes: Sizes,
    keys_sent: int,
    num_micro_batches: int,
) -> dict[str, float]:
    """Bytes by axis that a rank of the stage sends in a step when tokens choose all experts alike."""
    moe_layers = sum(model.is_moe_layer(index) for index in share.layers)
    tokens = sizes.tokens * moe_layers
    if share.is_last and moe_layers and not last_layer_is_whole(model, parallel):
        tokens += sizes.last_tokens - sizes.tokens
    routes = tokens * model.moe.top_k * num_micro_batches
    rank = communication.Rank(
        layers=len(share.layers),
        moe_layers=moe_layers,
        is_first=share.is_first,
        is_last=share.is_last,
        dense_parameters=share.dense_parameters,
        expert_parameters=share.expert_parameters,
        dense_copies=copies.dense,
        expert_copies=copies.experts,
        routes_leaving=routes * (parallel.ep - 1) // parallel.ep,
        routes_gathered=routes * (parallel.etp - 1),
    )
    batch = communication.MicroBatch(sizes.positions, sizes.logit_rows, keys_sent, num_micro_batches)
    return communication.bytes_of_step(model, parallel, rank, [batch], sizes.element)
