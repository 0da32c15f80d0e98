"""Hugging Face tensor names, shapes and layouts <-> ours, without a model: a pure, exact rearrangement of tensors.

"Ours" are the ``state_dict`` names of a single-process model (see :mod:`llada_mega.models.naming`). Two layouts differ:

- Megatron keeps query, key and value in one matrix, interleaved per key/value head: the query heads of the group, then
  its key head, then its value head. Llama and Qwen have three matrices, Ling has all query, then all key, then all
  value heads.
- The gate and up projections are one matrix ``[gate; up]``.

Vocabulary tables have their real rows here: appending a MASK row is the caller's, padding the model's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llada_mega.config.model import ModelConfig
from llada_mega.errors import ConfigError

Read = Callable[[str], Tensor]
Shape = tuple[int, ...]
DENSE_ARCHITECTURES = ("llama", "qwen2", "qwen3")
MOE_ARCHITECTURES = ("llada2_moe", "qwen3_moe")

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


@dataclass(frozen=True)
class HfTensor:
    """A Hugging Face tensor, and where its rows are in ours (of a QKV matrix: in ours without interleaving)."""

    name: str
    shape: Shape
    first_row: int = 0


@dataclass(frozen=True)
class ModelTensor:
    """One of our tensors and the Hugging Face tensors whose rows it stacks."""

    name: str
    parts: tuple[HfTensor, ...]

    @property
    def shape(self) -> Shape:
        """Rows of all parts; the vocabulary without padding."""
        return sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:]

    @property
    def is_interleaved(self) -> bool:
        """True for query, key and value, whose rows stand in another order here."""
        return ".linear_qkv." in self.name


def model_tensors(config: ModelConfig) -> Iterator[ModelTensor]:
    """All tensors of a model, in the order of its layers.

    Raises:
        ConfigError: the architecture is unknown or contradicts the shape.
    """
    if config.architecture not in DENSE_ARCHITECTURES + MOE_ARCHITECTURES:
        known = ", ".join(DENSE_ARCHITECTURES + MOE_ARCHITECTURES)
        raise ConfigError(f"model.architecture={config.architecture} has no Hugging Face form; use one of {known}")
    if config.is_moe and config.architecture not in MOE_ARCHITECTURES:
        raise ConfigError(
            f"model.architecture={config.architecture} is dense but model.moe.num_experts={config.moe.num_experts}; "
            f"use model.architecture=llada2_moe or qwen3_moe"
        )
    attention = _ling_attention if config.architecture == "llada2_moe" else _attention
    hidden, (embedding, output) = config.hidden_size, vocabulary_names(config)
    yield _tensor("embedding.word_embeddings.weight", (hidden,), (embedding, config.vocab_size))
    for layer in range(config.num_layers):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        yield _tensor(f"{ours}.input_layernorm.weight", (), (f"{theirs}.input_layernorm.weight", hidden))
        yield from attention(config, ours, theirs)
        yield _tensor(f"{ours}.pre_mlp_layernorm.weight", (), (f"{theirs}.post_attention_layernorm.weight", hidden))
        if config.is_moe_layer(layer):
            yield from _experts(config, f"{ours}.mlp", f"{theirs}.mlp")
        else:
            yield from _mlp(f"{ours}.mlp", f"{theirs}.mlp", hidden, config.ffn_hidden_size)
    yield _tensor("decoder.final_layernorm.weight", (), ("model.norm.weight", hidden))
    if not config.tie_embeddings:
        yield _tensor("output_layer.weight", (hidden,), (output, config.vocab_size))


def to_local(config: ModelConfig, tensor: ModelTensor, parts: Sequence[Tensor]) -> Tensor:
    """Our tensor from its Hugging Face parts."""
    whole = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
    return whole[_row_order(config)] if tensor.is_interleaved else whole


def to_hf(config: ModelConfig, tensor: ModelTensor, part: HfTensor, read_rows: Callable[[int, int], Tensor]) -> Tensor:
    """A Hugging Face tensor from ours: the exact inverse of :func:`to_local`.

    Args:
        read_rows: rows [start, stop) of our tensor.
    """
    start, stop = part.first_row, part.first_row + part.shape[0]
    if not tensor.is_interleaved:
        return read_rows(start, stop)
    return read_rows(0, tensor.shape[0])[torch.argsort(_row_order(config))[start:stop]]


def hf_to_local(config: ModelConfig, read: Read) -> Iterator[tuple[str, Tensor]]:
    """Our tensors, one at a time, from a Hugging Face checkpoint.

    Args:
        config: the model; ``architecture`` names the Hugging Face family.
        read: returns the Hugging Face tensor of a name (Ling's multi-token-prediction layers are never asked for).

    Raises:
        ConfigError: the architecture is unknown or contradicts the shape.
    """
    for tensor in model_tensors(config):
        yield tensor.name, to_local(config, tensor, [read(part.name) for part in tensor.parts])


def local_to_hf(config: ModelConfig, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors of ``state`` (our names): the exact inverse of :func:`hf_to_local`.

    Raises:
        ConfigError: the architecture is unknown or contradicts the shape.
    """
    for tensor in model_tensors(config):
        whole = state[tensor.name]
        for part in tensor.parts:
            yield part.name, to_hf(config, tensor, part, lambda start, stop, whole=whole: whole[start:stop]).clone()  # type: ignore[misc]


def local_names(config: ModelConfig) -> list[str]:
    """Our names of all tensors, in the order that :func:`hf_to_local` yields them."""
    return [tensor.name for tensor in model_tensors(config)]


def vocabulary_names(config: ModelConfig) -> tuple[str, str]:
    """Hugging Face names of the embedding and the output table."""
    is_ling = config.architecture == "llada2_moe"
    return "model.word_embeddings.weight" if is_ling else "model.embed_tokens.weight", "lm_head.weight"


def hf_shapes(config: ModelConfig, *, stacked_experts: bool = False) -> dict[str, Shape]:
    """Name and shape of every Hugging Face tensor, in the order of the layers; experts apart or stacked."""
    shapes: dict[str, Shape] = {}
    for tensor in model_tensors(config):
        for part in tensor.parts:
            stacked = stacked_expert(part.name) if stacked_experts else None
            if stacked is None:
                shapes[part.name] = part.shape
            else:
                shapes[stacked[0]] = (config.moe.num_experts, *part.shape)
    return shapes


def stacked_expert(name: str) -> tuple[str, int] | None:
    """Where an expert's matrix is in a checkpoint with stacked experts: a tensor ``[E, rows, columns]``, and the index.

    ``model.layers.1.mlp.experts.7.up_proj.weight`` -> ``model.layers.1.mlp.experts.up_proj``, 7: the form that
    published fine-tuning code for LLaDA2 reads. None for everything that is no routed expert.
    """
    match = _EXPERT.fullmatch(name)
    return (f"{match[1]}.{match[3]}", int(match[2])) if match else None


def _tensor(name: str, columns: Shape, *parts: tuple[str, int]) -> ModelTensor:
    """``parts``: Hugging Face names and their rows, of ``columns`` each."""
    first_rows = [sum(rows for _, rows in parts[:index]) for index in range(len(parts))]
    return ModelTensor(
        name,
        tuple(HfTensor(part, (rows, *columns), first) for (part, rows), first in zip(parts, first_rows, strict=True)),
    )


def _head_rows(config: ModelConfig) -> tuple[int, int]:
    """Rows of all queries, and of all keys or all values."""
    return config.num_attention_heads * config.head_dim, config.num_query_groups * config.head_dim


def _attention(config: ModelConfig, ours: str, theirs: str) -> Iterator[ModelTensor]:
    ours, theirs = f"{ours}.self_attention", f"{theirs}.self_attn"
    query, key = _head_rows(config)
    for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
        rows = {"q": query, "k": key, "v": key}
        parts = [(f"{theirs}.{letter}_proj.{kind}", count) for letter, count in rows.items()]
        yield _tensor(f"{ours}.linear_qkv.{kind}", (config.hidden_size,) if kind == "weight" else (), *parts)
    if config.qk_norm:
        yield _tensor(f"{ours}.q_layernorm.weight", (), (f"{theirs}.q_norm.weight", config.head_dim))
        yield _tensor(f"{ours}.k_layernorm.weight", (), (f"{theirs}.k_norm.weight", config.head_dim))
    yield _tensor(f"{ours}.linear_proj.weight", (query,), (f"{theirs}.o_proj.weight", config.hidden_size))


def _ling_attention(config: ModelConfig, ours: str, theirs: str) -> Iterator[ModelTensor]:
    ours, theirs = f"{ours}.self_attention", f"{theirs}.attention"
    query, key = _head_rows(config)
    for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
        part = (f"{theirs}.query_key_value.{kind}", query + 2 * key)
        yield _tensor(f"{ours}.linear_qkv.{kind}", (config.hidden_size,) if kind == "weight" else (), part)
    if config.qk_norm:
        yield _tensor(f"{ours}.q_layernorm.weight", (), (f"{theirs}.query_layernorm.weight", config.head_dim))
        yield _tensor(f"{ours}.k_layernorm.weight", (), (f"{theirs}.key_layernorm.weight", config.head_dim))
    yield _tensor(f"{ours}.linear_proj.weight", (query,), (f"{theirs}.dense.weight", config.hidden_size))


def _mlp(ours: str, theirs: str, hidden: int, ffn: int) -> Iterator[ModelTensor]:
    gate_up = [(f"{theirs}.gate_proj.weight", ffn), (f"{theirs}.up_proj.weight", ffn)]
    yield _tensor(f"{ours}.linear_fc1.weight", (hidden,), *gate_up)
    yield _tensor(f"{ours}.linear_fc2.weight", (ffn,), (f"{theirs}.down_proj.weight", hidden))


def _experts(config: ModelConfig, ours: str, theirs: str) -> Iterator[ModelTensor]:
    moe, hidden = config.moe, config.hidden_size
    yield _tensor(f"{ours}.router.weight", (hidden,), (f"{theirs}.gate.weight", moe.num_experts))
    if moe.score_function == "sigmoid":
        yield _tensor(f"{ours}.router.expert_bias", (), (f"{theirs}.gate.expert_bias", moe.num_experts))
    for expert in range(moe.num_experts):
        local, remote = f"{ours}.experts.local_experts.{expert}", f"{theirs}.experts.{expert}"
        yield from _mlp(local, remote, hidden, moe.expert_ffn_hidden_size)
    if moe.shared_expert_ffn_hidden_size:
        shared = moe.shared_expert_ffn_hidden_size
        yield from _mlp(f"{ours}.shared_experts", f"{theirs}.shared_experts", hidden, shared)


def _row_order(config: ModelConfig) -> Tensor:
    """For each row of our QKV matrix, the row of [all Q; all K; all V] that it is."""
    heads, groups, dim = config.num_attention_heads, config.num_query_groups, config.head_dim
    head = torch.cat(
        [
            torch.arange(heads).view(groups, heads // groups),
            torch.arange(heads, heads + groups).view(groups, 1),
            torch.arange(heads + groups, heads + 2 * groups).view(groups, 1),
        ],
        dim=1,
    ).flatten()
    return (head[:, None] * dim + torch.arange(dim)).flatten()
