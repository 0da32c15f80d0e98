"""Hugging Face tensor names and layouts <-> ours, without a model: a pure, exact rearrangement of tensors.

"Ours" are the ``state_dict`` names of a single-process model (see :mod:`llada_mega.models.naming`). Two layouts differ:

- Megatron keeps query, key and value in one matrix, interleaved per key/value head: the query heads of the group, then
  its key head, then its value head. Llama and Qwen have three matrices, Ling has all query, then all key, then all
  value heads.
- The gate and up projections are one matrix ``[gate; up]``.

Vocabulary rows are passed through as they are: appending a MASK row, or cutting the padding, is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from llada_mega.config.model import ModelConfig
from llada_mega.errors import ConfigError

Read = Callable[[str], Tensor]
DENSE_ARCHITECTURES = ("llama", "qwen2", "qwen3")
MOE_ARCHITECTURES = ("llada2_moe",)


def hf_to_local(config: ModelConfig, read: Read) -> Iterator[tuple[str, Tensor]]:
    """Our tensors, one at a time, from a Hugging Face checkpoint.

    Args:
        config: the model; ``architecture`` names the Hugging Face family.
        read: returns the Hugging Face tensor of a name (Ling's multi-token-prediction layers are never asked for).

    Raises:
        ConfigError: the architecture is unknown or contradicts the shape.
    """
    for local_name, hf_names in _table(config):
        parts = [read(name) for name in hf_names]
        if ".linear_qkv." in local_name:
            yield local_name, _interleave(config, torch.cat(parts))
        else:
            yield local_name, torch.cat(parts) if len(parts) > 1 else parts[0]


def local_to_hf(config: ModelConfig, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors of ``state`` (our names): the exact inverse of :func:`hf_to_local`.

    Raises:
        ConfigError: the architecture is unknown or contradicts the shape.
    """
    for local_name, hf_names in _table(config):
        tensor = state[local_name]
        if ".linear_qkv." in local_name:
            tensor = _deinterleave(config, tensor)
            if len(hf_names) == 3:
                heads, groups, dim = config.num_attention_heads, config.num_query_groups, config.head_dim
                sizes = [heads * dim, groups * dim, groups * dim]
                yield from ((name, part.clone()) for name, part in zip(hf_names, tensor.split(sizes), strict=True))
                continue
        if len(hf_names) > 1:
            yield from ((name, part.clone()) for name, part in zip(hf_names, tensor.chunk(2), strict=True))
        else:
            yield hf_names[0], tensor


def local_names(config: ModelConfig) -> list[str]:
    """All our tensor names of a model, in the order that :func:`hf_to_local` yields them.

    Raises:
        ConfigError: the architecture is unknown or contradicts the shape.
    """
    return [name for name, _ in _table(config)]


def hf_names(config: ModelConfig) -> list[str]:
    """All Hugging Face tensor names of a model.

    Raises:
        ConfigError: the architecture is unknown or contradicts the shape.
    """
    return [name for _, names in _table(config) for name in names]


def _table(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(our name, the Hugging Face names whose rows it stacks) of every tensor."""
    if config.architecture not in DENSE_ARCHITECTURES + MOE_ARCHITECTURES:
        known = ", ".join(DENSE_ARCHITECTURES + MOE_ARCHITECTURES)
        raise ConfigError(f"model.architecture={config.architecture} has no Hugging Face form; use one of {known}")
    is_ling = config.architecture in MOE_ARCHITECTURES
    if config.is_moe and not is_ling:
        raise ConfigError(
            f"model.architecture={config.architecture} is dense but model.moe.num_experts={config.moe.num_experts}; "
            f"use model.architecture=llada2_moe"
        )
    embedding = "model.word_embeddings.weight" if is_ling else "model.embed_tokens.weight"
    yield "embedding.word_embeddings.weight", (embedding,)
    for layer in range(config.num_layers):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        yield f"{ours}.input_layernorm.weight", (f"{theirs}.input_layernorm.weight",)
        yield from _ling_attention(config, ours, theirs) if is_ling else _dense_attention(config, ours, theirs)
        yield f"{ours}.pre_mlp_layernorm.weight", (f"{theirs}.post_attention_layernorm.weight",)
        if config.is_moe_layer(layer):
            yield from _experts(config, f"{ours}.mlp", f"{theirs}.mlp")
        else:
            yield from _mlp(f"{ours}.mlp", f"{theirs}.mlp")
    yield "decoder.final_layernorm.weight", ("model.norm.weight",)
    if not config.tie_embeddings:
        yield "output_layer.weight", ("lm_head.weight",)


def _dense_attention(config: ModelConfig, ours: str, theirs: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    ours, theirs = f"{ours}.self_attention", f"{theirs}.self_attn"
    for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
        yield f"{ours}.linear_qkv.{kind}", tuple(f"{theirs}.{letter}_proj.{kind}" for letter in "qkv")
    if config.qk_norm:
        yield f"{ours}.q_layernorm.weight", (f"{theirs}.q_norm.weight",)
        yield f"{ours}.k_layernorm.weight", (f"{theirs}.k_norm.weight",)
    yield f"{ours}.linear_proj.weight", (f"{theirs}.o_proj.weight",)


def _ling_attention(config: ModelConfig, ours: str, theirs: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    ours, theirs = f"{ours}.self_attention", f"{theirs}.attention"
    for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
        yield f"{ours}.linear_qkv.{kind}", (f"{theirs}.query_key_value.{kind}",)
    if config.qk_norm:
        yield f"{ours}.q_layernorm.weight", (f"{theirs}.query_layernorm.weight",)
        yield f"{ours}.k_layernorm.weight", (f"{theirs}.key_layernorm.weight",)
    yield f"{ours}.linear_proj.weight", (f"{theirs}.dense.weight",)


def _mlp(ours: str, theirs: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield f"{ours}.linear_fc1.weight", (f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight")
    yield f"{ours}.linear_fc2.weight", (f"{theirs}.down_proj.weight",)


def _experts(config: ModelConfig, ours: str, theirs: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield f"{ours}.router.weight", (f"{theirs}.gate.weight",)
    yield f"{ours}.router.expert_bias", (f"{theirs}.gate.expert_bias",)
    for expert in range(config.moe.num_experts):
        yield from _mlp(f"{ours}.experts.local_experts.{expert}", f"{theirs}.experts.{expert}")
    if config.moe.shared_expert_ffn_hidden_size:
        yield from _mlp(f"{ours}.shared_experts", f"{theirs}.shared_experts")


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


def _interleave(config: ModelConfig, stacked: Tensor) -> Tensor:
    return stacked[_row_order(config).to(stacked.device)]


def _deinterleave(config: ModelConfig, interleaved: Tensor) -> Tensor:
    return interleaved[torch.argsort(_row_order(config)).to(interleaved.device)]
