"""Sharded safetensors: written under one layout, read under another."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from safetensors.torch import load_file

from llada_mega.checkpoint import storage
from llada_mega.errors import CheckpointError


def shards_of(whole: torch.Tensor, axis: int, parts: int, key: str = "w") -> list[dict[str, ShardedTensor]]:
    """One state per rank: ``whole`` cut in ``parts`` along ``axis``."""
    pieces = whole.chunk(parts, axis)
    return [{"w": ShardedTensor.from_rank_offsets(key, p, (axis, r, parts))} for r, p in enumerate(pieces)]


def write_ranks(directory: Path, states: list[dict[str, ShardedTensor]]) -> None:
    for rank, state in enumerate(states):
        storage.write(directory, rank, *storage.snapshot(dict(state)))


@pytest.mark.parametrize("axis_in,parts_in", [(0, 1), (0, 4), (1, 2)])
@pytest.mark.parametrize("axis_out,parts_out", [(0, 1), (0, 3), (1, 4)])
def test_any_layout_in_any_layout_out(
    tmp_path: Path, axis_in: int, parts_in: int, axis_out: int, parts_out: int
) -> None:
    whole = torch.arange(12 * 8, dtype=torch.float32).reshape(12, 8)
    write_ranks(tmp_path, shards_of(whole, axis_in, parts_in))
    for wanted in shards_of(whole, axis_out, parts_out):
        expected = wanted["w"].data
        blank = ShardedTensor.from_rank_offsets(
            "w",
            torch.full_like(expected, -1.0),
            *[(axis_out, wanted["w"].global_offset[axis_out] // expected.shape[axis_out], parts_out)],
        )
        assert torch.equal(storage.load(tmp_path, {"w": blank})["w"], expected)


def test_prepended_axes_and_low_precision(tmp_path: Path) -> None:
    experts = [torch.randn(3, 2).bfloat16() for _ in range(4)]

    def state() -> dict[str, ShardedTensor]:
        return {
            str(i): ShardedTensor.from_rank_offsets("experts.w", e, (0, i, 4), prepend_axis_num=1)
            for i, e in enumerate(experts)
        }

    storage.write(tmp_path, 0, *storage.snapshot(state()))
    loaded = storage.load(tmp_path, state())
    for i, expert in enumerate(experts):
        assert torch.equal(loaded[str(i)], expert) and loaded[str(i)].dtype == torch.bfloat16
    assert torch.equal(storage.ShardReader(tmp_path).read_whole("experts.w"), torch.stack(experts))


def test_factories_are_split_and_merged(tmp_path: Path) -> None:
    fused = torch.randn(6, 2)

    def build(key: str, t: torch.Tensor, replica_id: object, flattened_range: object) -> list[ShardedTensor]:
        return [ShardedTensor.from_rank_offsets(f"{key}.{i}", p) for i, p in enumerate(t.chunk(2))]

    def state(t: torch.Tensor) -> dict[str, ShardedTensorFactory]:
        return {"fc1": ShardedTensorFactory("fc1", t, build, torch.cat)}

    storage.write(tmp_path, 0, *storage.snapshot(state(fused)))
    assert torch.equal(storage.load(tmp_path, state(torch.zeros_like(fused)))["fc1"], fused)


def test_only_the_main_replica_writes(tmp_path: Path) -> None:
    tensors, index = storage.snapshot({"w": ShardedTensor.from_rank_offsets("w", torch.ones(2), replica_id=1)})
    assert not tensors and not index


def test_a_snapshot_does_not_follow_the_weights() -> None:
    weight = torch.ones(2)
    tensors, _ = storage.snapshot({"w": ShardedTensor.from_rank_offsets("w", weight)})
    weight.zero_()
    assert torch.equal(tensors["w@0"], torch.ones(2))


def test_padded_rows_are_zero_when_the_vocabulary_grows(tmp_path: Path) -> None:
    small = torch.randn(4, 2)
    write_ranks(tmp_path, shards_of(small, 0, 1))
    wanted = ShardedTensor.from_rank_offsets("w", torch.ones(6, 2), allow_shape_mismatch=True)
    loaded = storage.load(tmp_path, {"w": wanted})["w"]
    assert torch.equal(loaded[:4], small) and not loaded[4:].any()


def test_missing_and_mismatched_tensors_are_named(tmp_path: Path) -> None:
    write_ranks(tmp_path, shards_of(torch.ones(4, 2), 0, 1))
    with pytest.raises(CheckpointError, match="'v'"):
        storage.load(tmp_path, {"v": ShardedTensor.from_rank_offsets("v", torch.ones(4, 2))})
    with pytest.raises(CheckpointError, match=r"\[4, 2\].*\[4, 3\]"):
        storage.load(tmp_path, {"w": ShardedTensor.from_rank_offsets("w", torch.ones(4, 3))})
    with pytest.raises(CheckpointError, match="no tensors"):
        storage.read_index(tmp_path / "nowhere")


def test_a_missing_rank_is_noticed(tmp_path: Path) -> None:
    states = shards_of(torch.ones(4, 2), 0, 2)
    write_ranks(tmp_path, states)
    (tmp_path / "tensors" / "part_00001.json").unlink()
    with pytest.raises(CheckpointError, match="4 of 8 values"):
        storage.load(tmp_path, {"w": ShardedTensor.from_rank_offsets("w", torch.zeros(4, 2))})


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    write_ranks(tmp_path, shards_of(torch.ones(4, 2), 0, 1))
    path = tmp_path / "tensors" / "part_00000.json"
    path.write_text(path.read_text()[:20])
    with pytest.raises(CheckpointError, match="damaged"):
        storage.read_index(tmp_path)
    path.write_text(json.dumps({"tensors": {"w": {"dtype": "float32"}}}))
    with pytest.raises(CheckpointError, match="damaged"):
        storage.read_index(tmp_path)


def test_a_snapshot_overwrites_an_earlier_one() -> None:
    weight = torch.ones(2, 3)
    first, _ = storage.snapshot({"w": ShardedTensor.from_rank_offsets("w", weight)})
    second, _ = storage.snapshot({"w": ShardedTensor.from_rank_offsets("w", 2 * weight)}, first)
    assert second["w@0.0"].data_ptr() == first["w@0.0"].data_ptr()
    assert torch.equal(second["w@0.0"], 2 * weight)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool],
)
def test_types_and_scalars_as_safetensors_reads_them(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"matrix": torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype), "scalar": torch.tensor(1).to(dtype)}
    storage.write(tmp_path, 0, tensors, {})
    read = load_file(storage.part_path(tmp_path, 0))
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    index = json.loads(storage.part_path(tmp_path, 0).with_suffix(".json").read_text())
    content = storage.part_path(tmp_path, 0).read_bytes()
    assert index["bytes"] == len(content) and index["sha256"] == hashlib.sha256(content).hexdigest()
