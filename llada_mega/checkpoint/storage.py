"""Sharded tensors on disk as safetensors: no pickle, any layout in, any layout out.

Every rank writes one part, ``tensors/part_00000.safetensors``, with the shards it owns (Megatron's main replicas), a
conversion as many as it likes. Beside it, ``part_00000.json`` says where each shard lies in its global tensor::

    {"bytes": 123, "sha256": "...", "tensors": {"key": {"dtype": "float32", "global_shape": [V, H],
     "shards": [{"name": "key@0.0", "offset": [0, 0], "shape": [v, H]}]}}}

A loader reads all indexes and copies, for every tensor that it wants, the parts of those shards that overlap it.
Tensors are described by Megatron-Core's ``ShardedTensor`` (``megatron.core.dist_checkpointing.mapping``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
    apply_factory_merges,
    is_main_replica,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llada_mega.checkpoint.directory import sync
from llada_mega.checkpoint.streaming import PlannedTensor, write_tensors
from llada_mega.errors import CheckpointError

TENSOR_DIRECTORY = "tensors"
MASTER_PREFIX = "optimizer.state.fp32_param."  # and the key of a weight: the optimizer's float32 copy of it
MAX_MAPPED_BYTES = 256 * 2**20
Snapshot = dict[str, Tensor]


@dataclass(frozen=True)
class Shard:
    """One stored piece of a global tensor. ``offset`` and ``shape`` have the rank of the global tensor."""

    file: Path
    name: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor as the indexes describe it."""

    dtype: str
    global_shape: tuple[int, ...]
    shards: tuple[Shard, ...]


def _offset_and_shape(tensor: ShardedTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
    return tuple(tensor.global_offset), shape


def snapshot(state: dict[str, Any], memory: Snapshot | None = None) -> tuple[Snapshot, dict[str, Any]]:
    """Copy what this rank owns of ``state`` to the CPU, so that training can go on while it is written.

    Args:
        state: a Megatron sharded state dict (nested dicts and lists of ``ShardedTensor`` and factories).
        memory: an earlier snapshot of the same tensors, to be overwritten: memory that the kernel has to find and clear
            first takes several times as long to copy into.
    Returns:
        tensors by shard name, and this rank's ``tensors`` index as described in the module docstring.
    Raises:
        CheckpointError: two shards claim the same place, or an object cannot be stored.
    """
    apply_factories(state)
    tensors: Snapshot = {}
    index: dict[str, Any] = {}
    for value in nested_values(state):
        if isinstance(value, ShardedObject):
            if value.data is not None and is_main_replica(value.replica_id):
                raise CheckpointError(f"cannot store the object {value.key}: only tensors and JSON are kept")
            continue
        if not isinstance(value, ShardedTensor) or not is_main_replica(value.replica_id):
            continue
        offset, shape = _offset_and_shape(value)
        name = shard_name(value.key, offset)
        if name in tensors:
            raise CheckpointError(f"two tensors claim {name}")
        assert value.data is not None
        # A copy even on the CPU: the optimizer changes these tensors in place while the snapshot is written.
        copy = (memory or {}).get(name)
        if copy is None:
            copy = torch.empty(shape, dtype=value.data.dtype)
        tensors[name] = copy.copy_(value.data.detach().reshape(shape))
        dtype = str(value.data.dtype).removeprefix("torch.")
        entry = index.setdefault(
            value.key, {"dtype": dtype, "global_shape": list(map(int, value.global_shape)), "shards": []}
        )
        entry["shards"].append({"name": name, "offset": list(offset), "shape": list(shape)})
    return tensors, index


def shard_name(key: str, offset: Sequence[int]) -> str:
    """Name of a shard inside its file: ``key@0.0``."""
    return f"{key}@{'.'.join(map(str, offset))}"


def part_path(directory: Path, part: int) -> Path:
    """The safetensors file of a part; its index is beside it, with the suffix ``.json``."""
    return directory / TENSOR_DIRECTORY / f"part_{part:05d}.safetensors"


def write(directory: Path, rank: int, tensors: Snapshot, index: dict[str, Any]) -> list[Path]:
    """Write one rank's snapshot; returns the files written, which are on the disk by then.

    Raises:
        OSError: the disk is full, or there is no permission.
    """
    data_path = part_path(directory, rank)
    index_path = data_path.with_suffix(".json")
    data_path.parent.mkdir(exist_ok=True)  # its parent is made by rank 0, once
    planned = [_planned(name, tensor) for name, tensor in sorted(tensors.items())]
    size, digest = write_tensors(data_path, planned)
    index_path.write_text(json.dumps({"bytes": size, "sha256": digest, "tensors": index}) + "\n")
    sync(index_path)
    return [data_path, index_path]


def _planned(name: str, tensor: Tensor) -> PlannedTensor:
    return PlannedTensor(name, tensor.dtype, tuple(tensor.shape), lambda: [tensor])


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_index(directory: Path) -> dict[str, StoredTensor]:
    """All global tensors of a checkpoint, by key. Raises ``CheckpointError`` when an index is missing or damaged."""
    folder = directory / TENSOR_DIRECTORY
    paths = sorted(folder.glob("part_*.json"))
    if not paths:
        raise CheckpointError(f"{directory} holds no tensors ({folder}/part_*.json); is it a checkpoint?")
    stored: dict[str, StoredTensor] = {}
    for path in paths:
        try:
            entries = json.loads(path.read_text())["tensors"]
            for key, entry in entries.items():
                shards = tuple(
                    Shard(path.with_suffix(".safetensors"), s["name"], tuple(s["offset"]), tuple(s["shape"]))
                    for s in entry["shards"]
                )
                known = stored[key].shards if key in stored else ()
                stored[key] = StoredTensor(entry["dtype"], tuple(entry["global_shape"]), known + shards)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}; restore it or use an older checkpoint") from error
    return stored


class ShardReader:
    """Reads regions of stored tensors. Files stay open, and mapped, until some more has been read.

    Pages of a mapped file count as resident once they were read: without an end to that, reading a checkpoint piece by
    piece would still look like holding it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.index = read_index(directory)
        self._files: dict[Path, Any] = {}
        self._mapped_bytes = 0

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = safe_open(path, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} is missing or damaged: {error}; use an older checkpoint") from error
        return self._files[path]

    def read(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The region ``[offset, offset + shape)`` of the global tensor ``key``; CPU, stored dtype.

        Raises:
            CheckpointError: the key is not stored, or its shards do not cover the region.
        """
        if key not in self.index:
            raise CheckpointError(f"{self.directory} has no tensor {key!r}; it belongs to another model or optimizer")
        entry = self.index[key]
        out = torch.empty(shape, dtype=getattr(torch, entry.dtype))
        covered = 0
        self._mapped_bytes += out.nbytes
        if self._mapped_bytes > MAX_MAPPED_BYTES:
            self._files.clear()
            self._mapped_bytes = out.nbytes
        for shard in entry.shards:
            low = [max(a, b) for a, b in zip(offset, shard.offset, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offset, shape, shard.offset, shard.shape, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            source = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, shard.offset, strict=True))
            target = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
            piece = self._open(shard.file).get_slice(shard.name)[source]
            out[target] = piece
            covered += piece.numel()
        if covered != out.numel():
            raise CheckpointError(f"{self.directory}: the shards of {key!r} hold {covered} of {out.numel()} values")
        return out

    def read_whole(self, key: str) -> Tensor:
        """The whole global tensor ``key``."""
        shape = self.index[key].global_shape if key in self.index else ()
        return self.read(key, (0,) * len(shape), shape)


def load(directory: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Fill the sharded tensors of ``state`` from ``directory``; other values pass through unchanged.

    Args:
        directory: a checkpoint written by :func:`write`, under any parallel layout.
        state: a Megatron sharded state dict that describes what this rank wants. Consumed.
    Returns:
        the same nesting with ``torch.Tensor`` in place of sharded tensors; tensors keep the dtype that was asked for.
    Raises:
        CheckpointError: a tensor is missing, has another global shape, or a file is damaged.
    """
    factories, _ = extract_matching_values(
        state, lambda value: isinstance(value, ShardedTensorFactory), return_lists_as_dicts=True
    )
    apply_factories(state)
    reader = ShardReader(directory)

    def fill(value: Any) -> Any:
        if isinstance(value, ShardedObject):
            return value.data
        if isinstance(value, LocalNonpersistentObject):
            return value.unwrap()
        if not isinstance(value, ShardedTensor):
            return value
        stored = reader.index.get(value.key)
        if stored is not None and stored.global_shape != tuple(value.global_shape) and not value.allow_shape_mismatch:
            raise CheckpointError(
                f"{directory}: {value.key!r} has shape {list(stored.global_shape)}, the model wants "
                f"{list(value.global_shape)}; the checkpoint belongs to another model"
            )
        offset, shape = _offset_and_shape(value)
        if stored is not None and value.allow_shape_mismatch:
            return _read_padded(reader, value.key, offset, shape).reshape(value.local_shape).to(value.dtype)
        return reader.read(value.key, offset, shape).reshape(value.local_shape).to(value.dtype)

    dict_list_map_inplace(fill, state)
    return apply_factory_merges(state, factories)


def _read_padded(reader: ShardReader, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """A region of a tensor whose first axis is padded (the vocabulary): rows that were not stored are zero."""
    stored = reader.index[key]
    rows = max(0, min(shape[0], stored.global_shape[0] - offset[0]))
    out = torch.zeros(shape, dtype=getattr(torch, stored.dtype))
    if rows:
        out[:rows] = reader.read(key, offset, (rows, *shape[1:]))
    return out


def stored_bytes(tensors: Snapshot) -> int:
    """Bytes that :func:`write` needs for the tensors, without the headers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
