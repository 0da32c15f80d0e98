"""A resumed run is the same run: weights, optimizer, data, noise and callbacks go on bit for bit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from rich.console import Console

from llada_mega.checkpoint.checkpoint import list_checkpoints
from llada_mega.config.schema import Config
from llada_mega.errors import CheckpointError
from llada_mega.training import run as run_module
from llada_mega.training.run import run_training
from tests.parallel.harness import RankError, run_ranks
from tests.training.conftest import TINY_MOE, Train
from tests.training.rows import read_rows, untimed_state

VALIDATION = ("trainer.validation.every=5", "trainer.validation.windows=8", "trainer.validation.block_sizes=[4]")


@pytest.mark.parametrize(
    "overrides",
    [(), TINY_MOE, ("checkpoint.async=true", "checkpoint.every=3"), ("trainer.dtype=bfloat16",)],
    ids=["dense", "moe", "async", "bfloat16"],
)
def test_resume_continues_bit_for_bit(train: Train, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """Stopped after step 4, resumed to step 10: the stage boundary lies at step 5."""
    whole = train("whole", *VALIDATION, *overrides)
    train("parts", *VALIDATION, *overrides, "trainer.max_steps=4")
    assert train("parts", *VALIDATION, *overrides) == whole
    for kind in ("loss", "valid/ar_nll"):
        expected, resumed = (read_rows(tmp_path / name, kind) for name in ("whole", "parts"))
        resumed = {step: row for step, row in resumed.items() if step in expected}  # the stop validated once more
        assert resumed == expected
    whole_end, parts_end = (list_checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("whole", "parts"))
    assert untimed_state(whole_end) == untimed_state(parts_end)
    index = Path("tensors") / "part_00000.json"  # holds the checksum of all weights and optimizer states
    assert (whole_end / index).read_text() == (parts_end / index).read_text()


def test_a_damaged_newest_checkpoint_falls_back(train: Train, tmp_path: Path) -> None:
    train("run", "checkpoint.every=2", "checkpoint.keep_last=3", "trainer.max_steps=6")
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    tensors = newest / "tensors" / "part_00000.safetensors"
    os.truncate(tensors, tensors.stat().st_size // 2)
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step_00000004"
    assert train("run").step == 10
    rows = read_rows(tmp_path / "run")
    assert sorted(rows) == list(range(1, 11))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["tensors/part_00000.safetensors", "state.json", "COMPLETE"])
def test_a_changed_byte_falls_back_and_is_told_in_one_line(train: Train, tmp_path: Path, file: str) -> None:
    """Of the right length, so that only reading it finds the damage."""
    whole = train("whole")
    train("run", "checkpoint.every=2", "checkpoint.keep_last=3", "trainer.max_steps=6")
    root = tmp_path / "run" / "checkpoints"
    flip_a_bit(root / "step_00000006" / file)
    assert train("run") == whole
    warning = read_rows(tmp_path / "run", "warning")[4]["warning"]
    assert "step_00000006 is damaged" in warning and file in warning and "\n" not in warning
    assert [path.name for path in sorted((root / "superseded").iterdir())] == ["step_00000006"]
    assert read_rows(tmp_path / "run") == read_rows(tmp_path / "whole")


def test_all_damaged_is_refused_and_never_begins_anew(train: Train, tmp_path: Path) -> None:
    train("run", "checkpoint.every=2", "checkpoint.keep_last=3", "trainer.max_steps=4")
    checkpoints = list_checkpoints(tmp_path / "run" / "checkpoints")
    for path in checkpoints:
        flip_a_bit(path / "tensors" / "part_00000.safetensors")
    with pytest.raises(
        CheckpointError, match="every checkpoint in .* is damaged .step_00000004: its tensors.; .*resume=never"
    ):
        train("run")
    with pytest.raises(CheckpointError, match="checkpoint.resume=.*step_00000002 is damaged"):
        train("run", f"checkpoint.resume={checkpoints[0]}")
    for path in checkpoints:
        (path / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match="is damaged .step_00000004: .*COMPLETE is missing"):
        train("run")
    assert sorted((tmp_path / "run" / "checkpoints").glob("step_*")) == checkpoints
    assert train("run", "checkpoint.resume=never", "trainer.max_steps=1").step == 1


def test_a_torn_last_row_is_cut_before_new_ones_follow(train: Train, tmp_path: Path) -> None:
    train("run", "trainer.max_steps=2")
    metrics = tmp_path / "run" / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 3, "lo')  # what a full disk or a kill leaves
    train("run", "trainer.max_steps=3")
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3]


def test_a_finished_run_stays_finished(train: Train, tmp_path: Path) -> None:
    train("run", *VALIDATION)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert train("run", *VALIDATION).step == 10
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_never_starts_over(train: Train, tmp_path: Path) -> None:
    train("run", "trainer.max_steps=2")
    train("run", "trainer.max_steps=2", "checkpoint.resume=never")
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in losses if "loss" in row] == [1, 2, 1, 2]
    assert losses[0]["loss"] == losses[2]["loss"]


def test_a_fresh_start_sets_an_older_runs_checkpoints_aside(train: Train, tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    train("run", "trainer.max_steps=6", "checkpoint.every=2", "checkpoint.keep_last=3")
    train("run", "trainer.max_steps=2", "checkpoint.resume=never", "checkpoint.keep_last=1")
    assert [path.name for path in list_checkpoints(root)] == ["step_00000002"]
    assert (root / "latest").resolve() == (root / "step_00000002").resolve()
    superseded = ["step_00000002", "step_00000004", "step_00000006"]
    assert [path.name for path in list_checkpoints(root / "superseded")] == superseded


def test_going_back_to_an_older_checkpoint(train: Train, tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    train("run", "trainer.max_steps=6", "checkpoint.every=2", "checkpoint.keep_last=3")
    assert train("run", f"checkpoint.resume={root / 'step_00000002'}", "trainer.max_steps=3").step == 3
    assert [path.name for path in list_checkpoints(root)] == ["step_00000002", "step_00000003"]


def test_another_corpus_of_the_same_name_is_refused(train: Train, tmp_path: Path) -> None:
    train("run", "trainer.max_steps=1")
    builder = IndexedDatasetBuilder(f"{tmp_path / 'tokens'}.bin", dtype=np.int32)
    for length in range(5, 150):
        builder.add_document(torch.arange(length), [length])
    builder.finalize(f"{tmp_path / 'tokens'}.idx")
    with pytest.raises(CheckpointError, match=r"corpora.tokens.documents was 200 and is now 145"):
        train("run", f"data.train=[{{path: {tmp_path / 'tokens'}}}]")


@pytest.mark.parametrize(
    "override,message",
    [
        ("seed=7", "seed was 1234 and is now 7"),
        ("model.num_layers=3", "model.num_layers was 2 and is now 3"),
        ("trainer.global_batch_size=8", "trainer.global_batch_size was 4 and is now 8"),
        ("data.document_alignment=64", "data.document_alignment was 32 and is now 64"),
        ("optimizer.lr=2e-3", "optimizer.lr was 0.001 and is now 0.002"),
        ("curriculum.stages=[{block_size: 4, tokens: 2560}]", "curriculum.stages"),
    ],
)
def test_silent_changes_are_refused(train: Train, tmp_path: Path, override: str, message: str) -> None:
    train("run", "trainer.max_steps=1")
    checkpoint = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    with pytest.raises(CheckpointError, match="cannot resume") as error:
        train("run", override)
    assert message in str(error.value) and "run.name" in str(error.value)
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == [checkpoint]


def test_a_moved_corpus_and_another_worker_count_resume(train: Train, tmp_path: Path, corpus: Path) -> None:
    train("run", "trainer.max_steps=2")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{corpus}{suffix}", moved / f"{corpus.name}{suffix}")
    override = f"data.train=[{{path: {moved / corpus.name}}}]"
    assert train("run", override, "data.num_workers=1", "trainer.micro_batch_size=4").step == 10


def test_weights_without_a_run_cannot_be_resumed(train: Train, tmp_path: Path) -> None:
    train("run", "trainer.max_steps=1")
    checkpoint = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    (checkpoint / "state.json").write_text("{}\n")
    with pytest.raises(CheckpointError, match="trainer.init="):
        train("run", f"checkpoint.resume={checkpoint}")


def resume_where_ranks_differ(config: Config) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            patch.setattr(run_module, "find_resume_point", lambda *a: None)
        run_training(config, Console(quiet=True))


def test_ranks_that_see_different_checkpoints_do_not_start(configure: Callable[..., Config], tmp_path: Path) -> None:
    overrides = ("trainer.micro_batch_size=1", "trainer.max_steps=2", "checkpoint.every=2")
    run_training(configure("run", *overrides), Console(quiet=True))
    config = configure("run", *overrides[:1], "trainer.max_steps=4", "checkpoint.every=2")
    with pytest.raises(RankError, match="rank 1 from the start; run.dir has to be on storage that all nodes share"):
        run_ranks(resume_where_ranks_differ, 2, config=config)
