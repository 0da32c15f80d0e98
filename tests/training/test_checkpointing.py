"""Checkpoints are complete or absent, and the right ones are kept."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL
from unittest import mock

import pytest
import torch
from rich.console import Console

from llada_mega.checkpoint import storage
from llada_mega.checkpoint.checkpoint import (
    is_complete,
    list_checkpoints,
    read_state,
    remove_checkpoint,
    resolve_checkpoint,
    step_name,
    verify,
)
from llada_mega.checkpoint.save import CheckpointWrite
from llada_mega.checkpoint.storage import ShardReader
from llada_mega.config.schema import Config
from llada_mega.errors import CheckpointError, TrainingError
from llada_mega.training.callbacks import checkpointing
from llada_mega.training.run import run_training
from tests.parallel.harness import RankError, run_ranks
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


def train_and_be_killed(config: Config) -> None:
    """On this rank, which dies after the tensors, before the marker."""
    with mock.patch.object(CheckpointWrite, "finish", lambda *_: os.kill(os.getpid(), SIGKILL)):
        run_training(config, Console(quiet=True))


def test_a_killed_write_leaves_nothing_that_looks_complete(
    train: Train, configure: Callable[..., Config], tmp_path: Path
) -> None:
    """The partial directory is ignored; the next run goes on from the older checkpoint and removes it."""
    train("run", "trainer.max_steps=2")
    with pytest.raises(RankError, match="SIGKILL"):
        run_ranks(train_and_be_killed, 1, config=configure("run", "checkpoint.every=2"))
    root = tmp_path / "run" / "checkpoints"
    assert names(tmp_path / "run") == ["step_00000002"]
    assert (root / ".step_00000004.partial" / "tensors" / "part_00000.json").exists()
    (root / ".step_00000001.removed" / "tensors").mkdir(parents=True)
    assert train("run", "trainer.max_steps=3").step == 3
    assert {path.name for path in root.iterdir()} == {"step_00000002", "step_00000003", "latest"}
    assert train("run").step == 10


def test_the_name_is_given_when_all_is_on_the_disk(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors, then the marker, then the name; whatever a power cut leaves, a directory with the name is whole."""
    root = tmp_path / "run" / "checkpoints"
    partial, whole = root / ".step_00000001.partial", root / "step_00000001"
    events: list[tuple[str, Path]] = []
    rename, fsync = Path.replace, os.fsync

    def record_sync(descriptor: int) -> None:
        fsync(descriptor)
        events.append(("synced", Path(f"/proc/self/fd/{descriptor}").readlink()))

    def record_name(self: Path, target: Path) -> Path:
        events.append(("named", target))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "replace", record_name)
    train("run", "trainer.max_steps=1")
    marked, named = events.index(("named", partial / "COMPLETE")), events.index(("named", whole))
    assert ("synced", partial / "tensors" / "part_00000.safetensors") in events[:marked]
    content = {partial / path.relative_to(whole) for path in (whole, *whole.rglob("*"))}
    assert {path for kind, path in events[:named] if kind == "synced"} == content
    assert ("synced", partial / "COMPLETE") in events[marked:named] and ("synced", partial) in events[marked:named]
    assert ("synced", root) in events[named:]


def test_older_checkpoints_are_removed_off_the_training_thread(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the new one is complete, as nothing else would leave a run without one."""
    seen: list[tuple[str, list[str]]] = []

    def remove(path: Path) -> None:
        seen.append((threading.current_thread().name, names(tmp_path / "run")))
        remove_checkpoint(path)

    monkeypatch.setattr(checkpointing, "remove_checkpoint", remove)
    train("run", "checkpoint.every=5", "checkpoint.keep_last=1", "checkpoint.async=true")
    assert seen == [("checkpoint-writer", ["step_00000005", "step_00000010"])]
    assert names(tmp_path / "run") == ["step_00000010"]


def test_a_checkpoint_that_cannot_be_removed_is_reported(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpointing, "remove_checkpoint", refuse)
    assert train("run", "checkpoint.every=5", "checkpoint.keep_last=1", "checkpoint.async=true").step == 10
    assert names(tmp_path / "run") == ["step_00000005", "step_00000010"]
    (row,) = read_rows(tmp_path / "run", "warning").values()
    assert "older checkpoints were not removed" in row["warning"] and "step_00000005" in row["warning"]


def train_and_fail(config: Config, failing_rank: int, phase: str) -> str:
    """On this rank; the error's message. The second checkpoint fails."""
    original = getattr(CheckpointWrite, phase)

    def fail(self: CheckpointWrite, *arguments: object) -> None:
        if self.rank == failing_rank and self.directory.name == step_name(4):
            raise ZeroDivisionError("on purpose")
        original(self, *arguments)

    with mock.patch.object(CheckpointWrite, phase, fail), pytest.raises(CheckpointError) as error:
        run_training(config, Console(quiet=True))
    return str(error.value)


@pytest.mark.parametrize(("failing_rank", "phase"), [(1, "write"), (0, "finish")])
def test_two_ranks_save_or_fail_together(
    configure: Callable[..., Config], tmp_path: Path, failing_rank: int, phase: str
) -> None:
    config = configure("run", "checkpoint.every=2", "checkpoint.keep_last=1", "checkpoint.async=true")
    errors = run_ranks(train_and_fail, 2, config=config, failing_rank=failing_rank, phase=phase)
    assert errors[0] == errors[1] and "step_00000004 was not written" in errors[0] and "on purpose" in errors[0]
    (whole,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert whole.name == step_name(2) and verify(whole) == [] and len(list(whole.glob("tensors/*.json"))) == 2
    assert run_training(configure("run", "checkpoint.async=true"), Console(quiet=True)).state.step == 10
    assert not list(whole.parent.glob(".*"))


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
