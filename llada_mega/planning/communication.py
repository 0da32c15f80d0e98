"""What a step has to communicate, from the shapes of model, batches and layout alone; nothing is counted here.

Every function returns the bytes that a rank sends in one step, averaged over ranks, when a collective over n ranks is
done by a ring: all-reduce 2 (n-1)/n of the tensor, all-gather and reduce-scatter (n-1)/n of the whole, all-to-all what
is meant for others. Sums of a few numbers (losses, norms, loads of experts) are left out. ``make bench-layouts`` counts
the bytes of real steps beside these.

Legend: S positions of a micro-batch on a context-parallel rank, H hidden size, n ranks of the axis.
"""

from __future__ import annotations

from dataclasses import dataclass

from llada_mega.config.model import ModelConfig
from llada_mega.config.run import ParallelConfig
from llada_mega.planning.share import last_layer_is_whole


@dataclass(frozen=True)
class MicroBatch:
    """Shape of what one rank computes of a micro-batch, of which a step has ``count``."""

    positions: int  # S
    logit_rows: int
    keys_sent: int = 0  # rows of which a rank sends keys and values to the other context-parallel ranks
    count: int = 1


@dataclass(frozen=True)
class Rank:
    """What one rank holds.

    Attributes:
        layers, moe_layers: of its pipeline stage, all chunks together.
        is_first, is_last: it holds the embedding, or the output matrix.
        dense_parameters, expert_parameters: elements.
        dense_copies, expert_copies: ranks with the same parameters and other data.
        routes_leaving: (token, expert) pairs of the step whose expert is on another expert-parallel rank.
        routes_gathered: pairs that the ranks which share this rank's experts get from it.
    """

    layers: int
    moe_layers: int
    is_first: bool
    is_last: bool
    dense_parameters: int
    expert_parameters: int
    dense_copies: int
    expert_copies: int
    routes_leaving: int
    routes_gathered: int = 0


def bytes_of_step(
    model: ModelConfig, parallel: ParallelConfig, rank: Rank, batches: list[MicroBatch], element_size: int = 4
) -> dict[str, float]:
    """Bytes by axis, without the axes that send none. Gradients and logits are fp32."""
    sent = {
        "tp": sum(batch.count * tensor_parallel(model, parallel, rank, batch, element_size) for batch in batches)
        + replicated_gradients(model, parallel, rank),
        "pp": sum(batch.count * pipeline(model, parallel, rank, batch, element_size) for batch in batches),
        "cp": sum(batch.count * context_parallel(model, parallel, rank, batch, element_size) for batch in batches),
        "ep": experts(model, parallel, rank, batches, element_size),
        "dp": gradients(parallel, rank, element_size),
    }
    return {axis: count for axis, count in sent.items() if count}


def forward_passes(parallel: ParallelConfig, *modules: str) -> int:
    """Through a part of every layer, one of ``modules``: recomputation repeats what the forward pass communicates."""
    selected = parallel.recompute == "selective" and not set(modules).isdisjoint(parallel.recompute_modules)
    return 2 if parallel.recompute == "full" or selected else 1


def tensor_parallel(
    model: ModelConfig, parallel: ParallelConfig, rank: Rank, batch: MicroBatch, element_size: int
) -> float:
    """With sequence parallelism, in units of a whole activation ``[S, H]``.

    Attention, a dense feed-forward network and a shared expert cost five each: the input is gathered and the output
    reduce-scattered; backward the gradient of the output is gathered, the input gathered again and its gradient
    reduce-scattered. The embedding costs two, the rows before the output matrix one. The last layer gathers its
    residual stream too and is concerned with the logit rows alone behind its attention. The cross entropy all-reduces
    the maximum (fp32), the label's logit and the sum (fp32 each) and the most probable token (int64) of every row, and
    the gradient of its hidden state.
    """
    n, forward = parallel.tp, forward_passes(parallel)
    each = 2 * forward + 3  # of an attention
    dense = rank.layers - rank.moe_layers
    shared = rank.moe_layers if model.is_moe and model.moe.shared_expert_ffn_hidden_size else 0
    of_dense, of_shared = (
        2 * forward_passes(parallel, *modules) + 3 for modules in (("mlp",), ("moe", "shared_experts"))
    )
    whole = each * rank.layers + of_dense * dense + of_shared * shared + 2 * rank.is_first  # in units
    rows = 0
    if rank.is_last and last_layer_is_whole(model, parallel):
        whole += 1
    elif rank.is_last:
        network = (of_shared if shared else 0) if rank.moe_layers else of_dense
        outputs = forward + 1  # of the attention, and their gradients
        whole += forward + 1 - outputs - network  # the residual stream comes in place of them
        rows = outputs + network + 1
    gathered = (whole * batch.positions + rows * batch.logit_rows) * model.hidden_size * element_size
    row = 3 * 4 + 8 + model.hidden_size * element_size
    reduced = batch.logit_rows * row if rank.is_last else 0
    return (n - 1) / n * (gathered + 2 * reduced)


def replicated_gradients(model: ModelConfig, parallel: ParallelConfig, rank: Rank) -> float:
    """All-reduce of the gradients of norms and routers, which every rank computes on its slice of the sequence."""
    n, hidden = parallel.tp, model.hidden_size
    heads = 2 * (model.head_dim or 0) if model.qk_norm else 0
    routers = rank.moe_layers * model.moe.num_experts * hidden if model.is_moe else 0
    parameters = rank.layers * (2 * hidden + heads) + routers + rank.is_last * hidden
    return 2 * (n - 1) / n * parameters * 4


def pipeline(model: ModelConfig, parallel: ParallelConfig, rank: Rank, batch: MicroBatch, element_size: int) -> float:
    """Activations forward to the next chunk and their gradients back, over every border between chunks."""
    if parallel.pp == 1:
        return 0.0
    chunks = parallel.vp or 1
    borders = 2 * chunks - rank.is_first - rank.is_last
    split = parallel.tp if parallel.sp else 1
    return borders * batch.positions * model.hidden_size * element_size / split


def context_parallel(
    model: ModelConfig, parallel: ParallelConfig, rank: Rank, batch: MicroBatch, element_size: int
) -> float:
    """Keys and values of ``keys_sent`` rows to every other rank, and the gradients of theirs back to them."""
    heads = (model.num_query_groups or model.num_attention_heads) / parallel.tp
    row = 2 * heads * (model.head_dim or 0) * element_size
    return (forward_passes(parallel, "core_attn") + 1) * rank.layers * (parallel.cp - 1) * batch.keys_sent * row


def experts(
    model: ModelConfig, parallel: ParallelConfig, rank: Rank, batches: list[MicroBatch], element_size: int
) -> float:
    """All-to-all: the hidden state of every route that leaves, there and back, forward and backward, and its weight.

    Where ``etp`` ranks share an expert, each gathers what came to the others, and outputs are reduce-scattered.

    All-gather: every rank of ``ep`` x ``etp`` gathers hidden states, weights and choices of all tokens and
    reduce-scatters the outputs; backward the same the other way round.
    """
    n = parallel.ep * parallel.etp
    if n == 1:
        return 0.0
    hidden, forward = model.hidden_size * element_size, forward_passes(parallel, "moe")
    if parallel.dispatcher != "allgather":
        return (rank.routes_leaving + rank.routes_gathered) * (forward + 1) * (2 * hidden + 4)
    tokens = sum(batch.count * batch.positions for batch in batches) / (parallel.tp if parallel.sp else 1)
    choices = model.moe.num_experts * (forward * (4 + 1) + 4)
    return (n - 1) * rank.moe_layers * tokens * ((forward + 1) * 2 * hidden + choices)


def gradients(parallel: ParallelConfig, rank: Rank, element_size: int) -> float:
    """All-reduce in fp32; with the distributed optimizer reduce-scatter in fp32 and all-gather of the weights."""
    total = 0.0
    for parameters, copies in (
        (rank.dense_parameters, rank.dense_copies),
        (rank.expert_parameters, rank.expert_copies),
    ):
        element = 4 + element_size if parallel.distributed_optimizer else 2 * 4
        total += (copies - 1) / copies * parameters * element
    return total
