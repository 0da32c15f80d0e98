"""The weights of a checkpoint as whole tensors, whatever layout wrote it: read in pieces, written in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llada_mega.checkpoint import storage
from llada_mega.checkpoint.streaming import PlannedFile, PlannedTensor, split_by_size
from llada_mega.config.model import ModelConfig
from llada_mega.errors import CheckpointError
from llada_mega.models.hf_mapping import ModelTensor, model_tensors
from llada_mega.models.naming import checkpoint_key

PART_BYTES = 2**31  # of one file
PIECE_BYTES = 2**28  # of a tensor that is read piece by piece
EXPERT_BIAS = ".expert_bias"


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """``dtype``, but float32 for the biases of experts: they move in steps that bfloat16 would swallow."""
    return torch.float32 if name.endswith(EXPERT_BIAS) else dtype


class WeightReader:
    """Reads the weights of a checkpoint by their names in the whole model.

    Args:
        checkpoint: a complete checkpoint.
        config: its model.
        masters: read the optimizer's float32 copy of a weight where there is one.

    Attributes:
        dtype: of the stored weights.
        has_masters: the optimizer keeps float32 copies.
    """

    def __init__(self, checkpoint: Path, config: ModelConfig, *, masters: bool = False) -> None:
        self._config, self._shards, self._masters = config, storage.ShardReader(checkpoint), masters
        embedding, _ = checkpoint_key(config, "embedding.word_embeddings.weight")
        if embedding not in self._shards.index:
            raise CheckpointError(f"{checkpoint} holds no weights of a model; is it damaged?")
        self.dtype: torch.dtype = getattr(torch, self._shards.index[embedding].dtype)
        self.has_masters = storage.MASTER_PREFIX + embedding in self._shards.index

    def rows(self, tensor: ModelTensor, start: int, stop: int) -> Tensor:
        """Rows [start, stop) along the first axis, in the stored dtype. Raises CheckpointError."""
        key, expert = checkpoint_key(self._config, tensor.name)
        master = storage.MASTER_PREFIX + key
        if self._masters and master in self._shards.index:
            key = master
        columns = tensor.shape[1:]
        lead, one = ((), ()) if expert is None else ((expert,), (1,))
        offset, shape = (*lead, start, *(0,) * len(columns)), (*one, stop - start, *columns)
        return self._shards.read(key, offset, shape).reshape(stop - start, *columns)

    def pieces(self, tensor: ModelTensor, first: int = 0, last: int | None = None) -> Iterator[Tensor]:
        """Rows [first, last) in pieces of a bounded size."""
        for start, stop in piece_bounds(tensor, first, tensor.shape[0] if last is None else last):
            yield self.rows(tensor, start, stop)


def piece_bounds(tensor: ModelTensor, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Rows [first, last) of a tensor, cut into pieces of a bounded size."""
    row_bytes = 4 * torch.Size(tensor.shape[1:]).numel()
    step = max(1, PIECE_BYTES // row_bytes)
    for start in range(first, last, step):
        yield start, min(start + step, last)


def plan_parts(
    directory: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    make: Callable[[ModelTensor], Iterable[Tensor]],
) -> list[PlannedFile]:
    """The tensor files of a checkpoint, with the places of their shards as ``storage.py`` describes them.

    Args:
        directory: the checkpoint's.
        dtype: of the weights; see :func:`stored_dtype`.
        make: pieces that, one after the other along the first axis, are the tensor.
    """
    shards: dict[str, tuple[str, list[int], dict[str, Any]]] = {}
    tensors = []
    for tensor in model_tensors(config):
        key, expert = checkpoint_key(config, tensor.name)
        on_axis = expert is not None
        global_shape = [*([config.moe.num_experts] if on_axis else []), *tensor.shape]
        offset = [*([expert] if expert is not None else []), *[0] * len(tensor.shape)]
        shape = [*([1] if on_axis else []), *tensor.shape]
        name = storage.shard_name(key, offset)
        shards[name] = key, global_shape, {"name": name, "offset": offset, "shape": shape}
        tensors.append(PlannedTensor(name, stored_dtype(key, dtype), tuple(shape), partial(make, tensor)))
    files = []
    for index, part in enumerate(split_by_size(tensors, PART_BYTES)):
        entries: dict[str, dict[str, Any]] = {}
        for planned in part:
            key, global_shape, shard = shards[planned.name]
            dtype_name = str(planned.dtype).removeprefix("torch.")
            entry = entries.setdefault(key, {"dtype": dtype_name, "global_shape": global_shape, "shards": []})
            entry["shards"].append(shard)
        files.append(PlannedFile(storage.part_path(directory, index), part, {"tensors": entries}))
    return files
