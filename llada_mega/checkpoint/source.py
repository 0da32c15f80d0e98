"""What an importer hands over: a model in Hugging Face names, wherever it came from."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from llada_mega.config.model import ModelConfig
from llada_mega.errors import CheckpointError
from llada_mega.models.hf_mapping import hf_shapes, vocabulary_names

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class SourceModel:
    """A model in Hugging Face names, its tensors read one at a time.

    Attributes:
        config: its shape.
        read: tensor by Hugging Face name (experts apart), CPU, shape as in ``hf_shapes``, dtype ``dtype`` (the experts'
            biases may be float32).
        dtype: of the weights.
        location: where it was found, for messages.
        files: what it is read from.
        tokenizer_files: file name -> text of tokenizer.json and its companions; empty when there is no tokenizer.
        notes: what a user should know about the import, one line each.
    """

    config: ModelConfig
    read: Callable[[str], Tensor]
    dtype: torch.dtype
    location: Path
    files: tuple[Path, ...]
    tokenizer_files: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def state(self) -> dict[str, Tensor]:
        """All tensors by Hugging Face name."""
        return {name: self.read(name) for name in hf_shapes(self.config)}


def check_shapes(
    config: ModelConfig, found: dict[str, tuple[int, ...]], location: Path, *, extra_layers: int = 0
) -> tuple[bool, tuple[str, ...]]:
    """Compare the tensors of a file with what its configuration promises.

    Args:
        found: name -> shape of all tensors there.
        extra_layers: so many layers may follow the last one; they are not wanted (multi-token prediction).
    Returns:
        whether the experts are stacked, and notes.
    Raises:
        CheckpointError: a tensor is missing, has another shape, or has no place in the model.
    """
    expected = hf_shapes(config)
    stacked = hf_shapes(config, stacked_experts=True)
    is_stacked = any(name in found for name in stacked.keys() - expected.keys())
    if is_stacked:
        expected = stacked
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(f"{location}: tensor {name} is missing; is the download complete?")
        if found[name] != shape:
            raise CheckpointError(f"{location}: {name} has shape {found[name]}, but the configuration says {shape}")
    ignored = (vocabulary_names(config)[1],) if config.tie_embeddings else ()
    dropped: set[int] = set()
    for name in found:
        layer = _LAYER.match(name)
        if layer and config.num_layers <= int(layer[1]) < config.num_layers + extra_layers:
            dropped.add(int(layer[1]))
        elif name not in expected and name not in ignored and not name.endswith("rotary_emb.inv_freq"):
            raise CheckpointError(f"{location}: tensor {name} has no place in a {config.architecture} model")
    layers = "a layer" if len(dropped) == 1 else f"{len(dropped)} layers"
    notes = (f"left out: {layers} for multi-token prediction",) if dropped else ()
    return is_stacked, notes
