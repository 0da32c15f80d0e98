"""What an importer hands over: a model in Hugging Face names, wherever it came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from llada_mega.config.model import ModelConfig
from llada_mega.errors import CheckpointError

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class SourceModel:
    """A dense model in Hugging Face names, its tensors read one at a time.

    Attributes:
        config: its shape.
        read: tensor by Hugging Face name, CPU, shape as in :func:`expected_shapes`, dtype ``dtype``.
        dtype: of the weights.
        tokenizer_files: file name -> text of tokenizer.json and its companions; empty when there is no tokenizer.
        location: where it was found, for messages.
    """

    config: ModelConfig
    read: Callable[[str], Tensor]
    dtype: torch.dtype
    location: Path
    tokenizer_files: dict[str, str] = field(default_factory=dict)

    def state(self) -> dict[str, Tensor]:
        """All tensors by Hugging Face name."""
        return {name: self.read(name) for name in expected_shapes(self.config)}


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every tensor of a dense model, in the order of the layers."""
    hidden, head = config.hidden_size, config.head_dim
    query, key = config.num_attention_heads * head, config.num_query_groups * head
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        for name, rows in (("q", query), ("k", key), ("v", key)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, hidden)
            if config.qkv_bias:
                shapes[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
        if config.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (head,)
            shapes[prefix + "self_attn.k_norm.weight"] = (head,)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, query)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes[prefix + "mlp.gate_proj.weight"] = (config.ffn_hidden_size, hidden)
        shapes[prefix + "mlp.up_proj.weight"] = (config.ffn_hidden_size, hidden)
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, config.ffn_hidden_size)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes[OUTPUT] = (config.vocab_size, hidden)
    return shapes


def check_shapes(config: ModelConfig, found: dict[str, tuple[int, ...]], location: Path) -> None:
    """Compare the tensors of a file with what its configuration promises.

    Args:
        found: name -> shape of all tensors there.
    Raises:
        CheckpointError: a tensor is missing, has another shape, or has no place in the model.
    """
    expected = expected_shapes(config)
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(f"{location}: tensor {name} is missing; is the download complete?")
        if found[name] != shape:
            raise CheckpointError(f"{location}: {name} has shape {found[name]}, but the configuration says {shape}")
    ignored = (OUTPUT,) if config.tie_embeddings else ()
    for name in found:
        if name not in expected and name not in ignored and not name.endswith("rotary_emb.inv_freq"):
            raise CheckpointError(f"{location}: tensor {name} has no place in a {config.architecture} model")
