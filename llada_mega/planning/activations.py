"""What a layer keeps for its backward pass, and what that needs on top: one short function a component.

A test measures real steps and compares every component, so a module that keeps more or less than is written here is
seen. On a GPU with TransformerEngine the same tensors are assumed, but for the routed experts: Megatron-Core's
``TEGroupedMLP`` keeps what its second product needs. That was read, not measured.

Legend of sizes: T tokens of a rank between the tensor-parallel parts (S / tp with sequence parallelism), S positions
inside them, N routes that arrive at a rank's experts, R logit rows, H hidden size, F width of a network (/tp or /etp),
V rows of the vocabulary (/tp).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llada_mega.config.model import ModelConfig
from llada_mega.config.run import ParallelConfig
from llada_mega.models.logits import CHUNK_ROWS
from llada_mega.planning.share import last_layer_is_whole

WIDE = 4  # bytes of fp32: statistics, scores, losses
INDEX = 8  # bytes of int64

Bytes = dict[str, float]


@dataclass(frozen=True)
class Sizes:
    """One micro-batch on one rank.

    Attributes:
        tokens, positions, logit_rows: T, S, R.
        last_tokens: tokens behind the attention of the last layer, between the tensor-parallel parts.
        routes_a_token: N over T.
        expert_share: tokens of the fullest of a rank's experts, over T.
        element: bytes of parameters and activations.
        te: TransformerEngine's layers: weight gradients are added to their buffers inside the matrix product.
    """

    tokens: int
    positions: int
    logit_rows: int
    last_tokens: int
    routes_a_token: float
    expert_share: float
    element: int
    te: bool = False


def layer(model: ModelConfig, parallel: ParallelConfig, index: int, sizes: Sizes) -> Bytes:
    """Bytes that the 0-based layer keeps from its forward to its backward pass, by component."""
    behind = behind_attention(model, parallel, index, sizes)
    kept = {
        "attention": _attention(model, parallel, sizes, behind),
        "norms": _norms(model, parallel, sizes, behind),
        "residual stream": 2 * behind.tokens * model.hidden_size * sizes.element,  # after either part
    }
    if model.is_moe_layer(index):
        kept["router"] = _router(model, behind)
        kept["experts"] = _experts(model, parallel, behind)
        kept["feed-forward"] = _feed_forward(model.moe.shared_expert_ffn_hidden_size // parallel.tp, behind)
    else:
        kept["feed-forward"] = _feed_forward(model.ffn_hidden_size // parallel.tp, behind)
    return kept


def behind_attention(model: ModelConfig, parallel: ParallelConfig, index: int, sizes: Sizes) -> Sizes:
    """In the last layer the queries of the logit rows alone attend, and all that follows is for them."""
    if index < model.num_layers - 1 or last_layer_is_whole(model, parallel):
        return sizes
    return replace(sizes, tokens=sizes.last_tokens, positions=sizes.logit_rows)


def _attention(model: ModelConfig, parallel: ParallelConfig, sizes: Sizes, behind: Sizes) -> float:
    """Q, K, V as projected (V stays a view of it), Q and K rotated, output, log-sum-exp.

    The norm of the queries wants them contiguous, and keeps that copy. Recomputing the core saves the log-sum-exp
    alone: its inputs and its output, which the projection behind it needs, are kept anyway.
    """
    query = model.num_attention_heads * model.head_dim // parallel.tp
    key = model.num_query_groups * model.head_dim // parallel.tp
    lse = 0 if recomputes(parallel, "core_attn") else model.num_attention_heads // parallel.tp * WIDE
    # Under context parallelism keys and values of all ranks come in place of the rank's own rotated keys.
    keys = 2 * key * parallel.cp if parallel.cp > 1 else key
    rows = query + 2 * key + (query if model.qk_norm else 0) + keys
    return sizes.positions * rows * sizes.element + behind.positions * (2 * query * sizes.element + lse)


def _norms(model: ModelConfig, parallel: ParallelConfig, sizes: Sizes, behind: Sizes) -> float:
    """Two outputs, which the linear layers behind them need, and statistics; inputs are kept by others."""
    heads = (model.num_attention_heads + model.num_query_groups) // parallel.tp if model.qk_norm else 0
    tokens = sizes.tokens + behind.tokens
    return tokens * (model.hidden_size * sizes.element + WIDE) + sizes.positions * heads * WIDE


def _feed_forward(width: int, sizes: Sizes) -> float:
    """Gate and up, and what they give."""
    return sizes.positions * 3 * width * sizes.element


def _router(model: ModelConfig, sizes: Sizes) -> float:
    """Scores of all experts; choices and their scores."""
    return sizes.tokens * (model.moe.num_experts * WIDE + model.moe.top_k * (INDEX + WIDE))


def _experts(model: ModelConfig, parallel: ParallelConfig, sizes: Sizes) -> float:
    """Gate and up of every route, its token and share.

    Where tokens come from other ranks, they too. Between TransformerEngine's matrix products also what gate and up
    give, which ours make again.
    """
    width = model.moe.expert_ffn_hidden_size // parallel.etp
    inner = (3 if sizes.te else 2) * width
    arrived = model.hidden_size if sizes.te or parallel.ep * parallel.etp > 1 else 0
    return sizes.tokens * sizes.routes_a_token * ((inner + arrived) * sizes.element + 2 * INDEX + WIDE)


def layer_output(model: ModelConfig, parallel: ParallelConfig, index: int, sizes: Sizes) -> float:
    """The residual stream behind a layer."""
    return behind_attention(model, parallel, index, sizes).tokens * model.hidden_size * sizes.element


def staying(model: ModelConfig, parallel: ParallelConfig, index: int, sizes: Sizes) -> Bytes:
    """What of :func:`layer` is there while other layers are at work: what is recomputed, or in host memory, is not."""
    if index < parallel.offload_layers:
        return {}
    kept, is_moe = layer(model, parallel, index, sizes), model.is_moe_layer(index)
    behind = behind_attention(model, parallel, index, sizes)
    gone = set()
    if recomputes(parallel, "shared_experts" if is_moe else "mlp"):
        gone |= {"feed-forward"}
    if recomputes(parallel, "moe") and is_moe:
        gone |= {"feed-forward", "router", "experts"}
    if recomputes(parallel, "layernorm"):
        kept["norms"] -= (sizes.tokens + behind.tokens) * model.hidden_size * sizes.element
    if recomputes(parallel, "moe_act") and is_moe and sizes.te:  # ours makes activations again anyway
        width = model.moe.expert_ffn_hidden_size // parallel.etp
        kept["experts"] -= behind.tokens * sizes.routes_a_token * width * sizes.element
    return {component: size for component, size in kept.items() if component not in gone}


def recomputes(parallel: ParallelConfig, module: str) -> bool:
    """Selective recomputation makes ``module`` again."""
    return parallel.recompute == "selective" and module in parallel.recompute_modules


def layer_input(model: ModelConfig, sizes: Sizes) -> float:
    """What comes into a layer, and all that it keeps under full recomputation."""
    return sizes.tokens * model.hidden_size * sizes.element


def rotary(model: ModelConfig, sizes: Sizes) -> float:
    """Factors of the rotary embedding, once for all layers."""
    return sizes.positions * model.head_dim * (1 + model.rotary_percent / 2) * sizes.element


def logits(model: ModelConfig, vocab: int, parallel: ParallelConfig, sizes: Sizes) -> float:
    """The largest moment of the chunked cross entropy: gradients of the rows and of the output matrix, one chunk.

    Under sequence parallelism also the rows, gathered. Logits are there in the model's dtype and in fp32 when they are
    made, their gradients in the model's dtype alone. A chunk's contribution to the gradient of the output matrix is a
    matrix by itself only where dtypes differ.
    """
    rows = (2 if parallel.sp else 1) * sizes.logit_rows * model.hidden_size * sizes.element
    first = min(CHUNK_ROWS, sizes.logit_rows)
    second = min(CHUNK_ROWS, sizes.logit_rows - first)
    mixed = 0 if sizes.element == WIDE else sizes.element
    matrix = vocab * model.hidden_size
    made = max(first * vocab * (WIDE + mixed), second and second * vocab * (WIDE + mixed) + matrix * WIDE)
    used = first * vocab * sizes.element + matrix * (WIDE + mixed)
    return rows + max(made, used)


def backward_work(model: ModelConfig, parallel: ParallelConfig, index: int, sizes: Sizes) -> Bytes:
    """Gradients and temporaries at the largest moment of a layer's backward pass, in its feed-forward network.

    Dense: the gradient that came in and those of the three inner tensors, when the product of two is gone, and ours
    makes silu(gate) again. Experts: the gradient that came in and the one that goes out, scratch rows, and the weight
    gradients of all experts; where tokens come from other ranks, both gradients of every route, and by all-gather of
    every rank's tokens. TransformerEngine adds those to their buffers at once, and has a gradient of every route:
    those of the three inner tensors, when the product of two is gone, or in the end the one that goes out.
    """
    sizes = behind_attention(model, parallel, index, sizes)
    hidden, element = model.hidden_size, sizes.element
    stream = sizes.tokens * hidden * element
    if not model.is_moe_layer(index):
        inner = sizes.positions * model.ffn_hidden_size // parallel.tp * element
        return {"backward work": stream + (3 if sizes.te else 4) * inner, "feed-forward": -inner}
    width = model.moe.expert_ffn_hidden_size // parallel.etp
    if sizes.te:
        routes = sizes.tokens * sizes.routes_a_token
        return {"backward work": 2 * stream + routes * max(hidden + 2 * width, 2 * hidden - width) * element}
    weights = model.moe.num_experts // parallel.ep * 3 * hidden * width
    scratch = sizes.tokens * sizes.expert_share * (hidden + 6 * width)
    ranks = parallel.ep * parallel.etp
    gathered = 2 * (ranks - 1) * stream if parallel.dispatcher == "allgather" else 0.0
    arrived = 2 * sizes.tokens * sizes.routes_a_token * hidden if ranks > 1 else 0.0
    return {"backward work": 2 * stream + gathered + (weights + scratch + arrived) * element}
