"""Checkpoints are complete or absent, and the right ones are kept."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from llada_mega.checkpoint import storage
from llada_mega.checkpoint.checkpoint import (
    is_complete,
    list_checkpoints,
    read_state,
    resolve_checkpoint,
    verify,
)
from llada_mega.checkpoint.storage import ShardReader
from llada_mega.errors import CheckpointError, TrainingError
from tests.training.conftest import Train
from tests.training.rows import read_rows


def names(run_dir: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run_dir / "checkpoints")]


def test_the_newest_are_kept_and_latest_points_to_one(train: Train, tmp_path: Path) -> None:
    train("run", "checkpoint.every=2", "checkpoint.keep_last=2")
    assert names(tmp_path / "run") == ["step_00000008", "step_00000010"]
    assert (tmp_path / "run" / "checkpoints" / "latest").readlink() == Path("step_00000010")
    assert resolve_checkpoint(tmp_path / "run").name == "step_00000010"
    assert resolve_checkpoint(tmp_path / "run" / "checkpoints" / "latest").name == "step_00000010"


def test_the_best_are_kept_too(train: Train, tmp_path: Path) -> None:
    metric = "valid/block_4/ce_masked"
    train(
        "run",
        "checkpoint.every=2",
        "checkpoint.keep_last=1",
        "checkpoint.keep_best=2",
        f"checkpoint.best_metric={metric}",
        "trainer.validation.every=2",
        "trainer.validation.windows=8",
        "trainer.validation.block_sizes=[4]",
        "optimizer.lr=0.3",  # so high that later is not better
    )
    scores = {step: row[metric] for step, row in read_rows(tmp_path / "run", metric).items()}
    best = sorted(scores, key=lambda step: scores[step])[:2]
    assert names(tmp_path / "run") == sorted({f"step_{step:08d}" for step in [*best, 10]})
    for path in list_checkpoints(tmp_path / "run" / "checkpoints"):
        assert read_state(path)["metrics"][metric] == scores[int(path.name.removeprefix("step_"))]


def test_of_an_accuracy_the_largest_is_kept(train: Train, tmp_path: Path) -> None:
    metric = "valid/block_4/accuracy"
    train(
        "run",
        "checkpoint.every=2",
        "checkpoint.keep_last=1",
        "checkpoint.keep_best=1",
        f"checkpoint.best_metric={metric}",
        "trainer.validation.every=2",
        "trainer.validation.windows=8",
        "trainer.validation.block_sizes=[4]",
        "optimizer.lr=3e-2",
    )
    scores = {step: row[metric] for step, row in read_rows(tmp_path / "run", metric).items()}
    assert len(set(scores.values())) > 1
    kept = [int(name.removeprefix("step_")) for name in names(tmp_path / "run")]
    assert max(scores[step] for step in kept) == max(scores.values())


def test_the_best_are_averaged_at_the_end(train: Train, tmp_path: Path) -> None:
    """Of the last stage only, from the float32 weights of a bfloat16 run, and once."""
    metric = "valid/block_4/ce_masked"
    options = (
        "checkpoint.every=1",
        "checkpoint.keep_best=8",
        "checkpoint.merge_at_end=2",
        f"checkpoint.best_metric={metric}",
        "trainer.validation.every=1",
        "trainer.validation.windows=8",
        "trainer.validation.block_sizes=[4]",
        "trainer.dtype=bfloat16",
    )
    train("run", *options)
    scores = {step: row[metric] for step, row in read_rows(tmp_path / "run", metric).items()}
    steps = sorted(sorted(range(6, 11), key=lambda step: scores[step])[:2])
    merged = tmp_path / "run" / "merged"
    origin = read_state(merged)["merged"]
    assert origin["steps"] == steps and origin["float32"] and verify(merged) == []
    readers = [ShardReader(tmp_path / "run" / "checkpoints" / f"step_{step:08d}") for step in steps]
    key = "decoder.layers.0.mlp.linear_fc2.weight"
    parents = [reader.read_whole(f"optimizer.state.fp32_param.{key}").double() for reader in readers]
    assert torch.equal(ShardReader(merged).read_whole(key), (sum(parents) / 2).bfloat16())
    before = (merged / "COMPLETE").stat().st_mtime_ns
    train("run", *options)
    assert (merged / "COMPLETE").stat().st_mtime_ns == before


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_loses_nothing(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    write = storage.write

    def full(directory: Path, *args: object) -> list[Path]:
        if "00000004" in directory.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(directory, *args)

    monkeypatch.setattr(storage, "write", full)
    with pytest.raises(CheckpointError, match="disk is full; older checkpoints are intact"):
        train("run", "checkpoint.every=2", f"checkpoint.async={asynchronous}")
    assert names(tmp_path / "run") == ["step_00000002"]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*partial"))
    monkeypatch.setattr(storage, "write", write)
    assert train("run").step == 10


def test_a_metrics_file_that_cannot_be_written_ends_in_one_line(train: Train, tmp_path: Path) -> None:
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(TrainingError, match="metrics.jsonl: Is a directory; the run stops"):
        train("run")


def test_no_room_is_noticed_before_writing(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("llada_mega.checkpoint.checkpoint.shutil.disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="it needs .* GiB free; free some space"):
        train("run", "trainer.max_steps=1")
    assert names(tmp_path / "run") == []


def test_a_killed_write_leaves_nothing_that_looks_complete(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies after the tensors, before the marker: the partial directory is ignored and later replaced."""

    def die(*args: object) -> None:
        raise KeyboardInterrupt

    train("run", "trainer.max_steps=2")
    with monkeypatch.context() as patch:
        patch.setattr("llada_mega.checkpoint.save.CheckpointWrite.finish", die)
        with pytest.raises(KeyboardInterrupt):
            train("run", "checkpoint.every=2")
    assert names(tmp_path / "run") == ["step_00000002"]
    assert train("run").step == 10


def test_verify_finds_every_damage(train: Train, tmp_path: Path) -> None:
    train("run", "trainer.max_steps=1")
    checkpoint = resolve_checkpoint(tmp_path / "run")
    assert verify(checkpoint) == []
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != "COMPLETE"):
        original = path.read_bytes()
        changed = bytearray(original)
        changed[len(changed) // 2] ^= 1
        path.write_bytes(bytes(changed))
        assert path.name in verify(checkpoint)[0]
        path.write_bytes(original[:-1])
        assert path.name in verify(checkpoint)[0]
        path.unlink()
        assert path.name in verify(checkpoint)[0]
        path.write_bytes(original)
    assert verify(checkpoint) == []
    (checkpoint / "COMPLETE").unlink()
    assert "COMPLETE is missing" in verify(checkpoint)[0]
    assert not is_complete(checkpoint)


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        resolve_checkpoint(tmp_path)
