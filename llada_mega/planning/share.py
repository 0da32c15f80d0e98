"""Which part of a model one rank holds: layers and parameters, in closed form.

The tests build every stage of the published models on the meta device and count again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llada_mega.config.layout import stage_layers
from llada_mega.config.model import ModelConfig
from llada_mega.config.run import ParallelConfig
from llada_mega.models.config import padded_vocab_size


@dataclass(frozen=True)
class Share:
    """What a rank of one pipeline stage holds. All ranks of the stage hold as much.

    Attributes:
        stage: pipeline rank.
        chunks: global 0-based indices of the layers of each of its model chunks.
        is_first, is_last: it holds the embedding, or the output matrix.
        parameters: elements by component, without experts.
        expert_parameters: elements of routed experts.
    """

    stage: int
    chunks: tuple[tuple[int, ...], ...]
    is_first: bool
    is_last: bool
    parameters: dict[str, int]
    expert_parameters: int

    @property
    def layers(self) -> tuple[int, ...]:
        """Of all chunks."""
        return tuple(layer for chunk in self.chunks for layer in chunk)

    @property
    def dense_parameters(self) -> int:
        """Elements that are no routed expert's."""
        return sum(self.parameters.values())

    @property
    def total_parameters(self) -> int:
        """All elements."""
        return self.dense_parameters + self.expert_parameters


def vocab_rows(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Rows of a rank's part of the embedding and output tables, padding included."""
    return padded_vocab_size(model.vocab_size, parallel.tp) // parallel.tp


def share_of_stage(model: ModelConfig, parallel: ParallelConfig, stage: int) -> Share:
    """The share of a rank of pipeline stage ``stage``."""
    chunks = tuple(_chunks_of_stage(model.num_layers, parallel, stage))
    layers = [layer for chunk in chunks for layer in chunk]
    is_first, is_last = stage == 0, stage == parallel.pp - 1
    counted: dict[str, int] = {}
    experts = 0

    def add(component: str, elements: int) -> None:
        if elements:
            counted[component] = counted.get(component, 0) + elements

    table = vocab_rows(model, parallel) * model.hidden_size
    add("embedding", table * is_first)
    for layer in layers:
        for component, elements in _layer_parameters(model, parallel, layer).items():
            add(component, elements)
        if model.is_moe_layer(layer):
            width = model.moe.expert_ffn_hidden_size // parallel.etp
            experts += model.moe.num_experts // parallel.ep * 3 * model.hidden_size * width
    add("norms", model.hidden_size * is_last)
    # A tied table is one parameter, unless the stages of a pipeline keep a copy each.
    add("output", table * (is_last and not (model.tie_embeddings and is_first)))
    return Share(stage, chunks, is_first, is_last, counted, experts)


def _layer_parameters(model: ModelConfig, parallel: ParallelConfig, layer: int) -> dict[str, int]:
    """Of one layer, without its routed experts. Norms and the router are on every tensor-parallel rank."""
    hidden, moe = model.hidden_size, model.moe
    query, key_value = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    projections = hidden * (query + 2 * key_value) + query * hidden
    biases = query + 2 * key_value if model.qkv_bias else 0
    is_moe = model.is_moe_layer(layer)
    width = moe.shared_expert_ffn_hidden_size if is_moe else model.ffn_hidden_size
    return {
        "attention": (projections + biases) // parallel.tp,
        "feed-forward": 3 * hidden * width // parallel.tp,
        "router": moe.num_experts * hidden if is_moe else 0,
        "norms": 2 * hidden + (2 * model.head_dim if model.qk_norm else 0),
    }


def _chunks_of_stage(num_layers: int, parallel: ParallelConfig, stage: int) -> Iterator[tuple[int, ...]]:
    """Chunks go round the stages in circles; a stage's chunks are equal."""
    number = parallel.vp or 1
    sizes = [layers // number for layers in stage_layers(num_layers, parallel)]
    for chunk in range(number):
        first = chunk * sum(sizes) + sum(sizes[:stage])
        yield tuple(range(first, first + sizes[stage]))


def last_layer_is_whole(model: ModelConfig, parallel: ParallelConfig) -> bool:
    """True where the last layer computes all rows, and not the rows with logits alone.

    An all-gather of tokens wants as many on every rank and in every layer.
    """
    return model.is_moe and parallel.dispatcher == "allgather" and parallel.tp * parallel.ep * parallel.etp > 1
