"""``launch.nproc``: the same training, split over processes of this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from llada_mega.cli import main
from llada_mega.commands.processes import start_processes
from llada_mega.data.index_file import IndexWriter


def test_two_processes_train_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    with IndexWriter("corpus", np.dtype(np.uint16)) as writer:
        for length in generator.integers(20, 300, 100).tolist():
            writer.add(generator.integers(1, 250, length).astype(np.uint16), [length])
        writer.finish()
    rows = {}
    for count in (1, 2):
        options = ["data.train=corpus", "trainer.max_steps=2", "logging.progress=false", f"run.name=ranks_{count}"]
        assert main(["train", *options, f"launch.nproc={count}"]) == 0
        lines = Path(f"runs/ranks_{count}/metrics.jsonl").read_text().splitlines()
        rows[count] = [json.loads(line) for line in lines]
    assert len(rows[1]) == len(rows[2]) == 2
    for one, two in zip(rows[1], rows[2], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["consumed_tokens"] == one["consumed_tokens"]
    assert "not installed" not in capfd.readouterr().err


def test_ranks_that_fail_alike_say_it_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert start_processes(2, ["report", str(tmp_path / "nowhere")]) == 2
    assert capfd.readouterr().err.count("error") == 1


def test_the_rank_that_failed_alone_is_heard(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import os, sys, time; sys.exit('rank 1 is ill') if os.environ['RANK'] == '1' else time.sleep(60)"
    assert start_processes(2, [], command=[sys.executable, "-c", code]) == 1
    assert "rank 1 is ill" in capfd.readouterr().err


def test_ranks_that_end_well_return_zero(capfd: pytest.CaptureFixture[str]) -> None:
    assert start_processes(2, ["mask", "documents=[4]"]) == 0
