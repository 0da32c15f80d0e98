"""What a checkpoint of the TransformerEngine layers holds: how to list it, and for which models it is recorded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import nn

from tests.models.helpers import dense_config, moe_config

KEY_FILE = Path(__file__).with_name("te_keys.json")  # written by `make te-check ARGS=--write`
MODELS = {
    "llama": dense_config("llama", num_layers=2),
    "qwen2": dense_config("qwen2", tie_embeddings=True, qkv_bias=True, num_layers=2),
    "qwen3": dense_config("qwen3", qk_norm=True, num_layers=2),
    "moe": moe_config(num_layers=2),
}


def _tensors(chunks: Iterable[nn.Module]) -> Iterator[ShardedTensor]:
    for chunk in chunks:
        for name, entry in chunk.sharded_state_dict().items():
            parts: Any = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
            for part in parts:
                assert isinstance(part, ShardedTensor), f"{name} is no tensor: {part}"
                yield part


def sharded_tensors(chunks: Iterable[nn.Module]) -> set[tuple[Any, ...]]:
    """All that a checkpoint knows of this rank's tensors."""
    return {
        (t.key, tuple(t.global_shape), tuple(t.global_offset), tuple(t.local_shape), t.replica_id, str(t.dtype))
        for t in _tensors(chunks)
    }


def global_shapes(chunks: Iterable[nn.Module]) -> dict[str, list[int]]:
    """Key -> shape of the whole tensor."""
    return {tensor.key: list(map(int, tensor.global_shape)) for tensor in _tensors(chunks)}
