"""Profiles of a window of steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.conftest import Train

WINDOW = ("trainer.max_steps=4", "logging.profile.start=2", "logging.profile.steps=2")


def trace(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        return list(json.load(file)["traceEvents"])


def test_a_window_of_steps(train: Train, tmp_path: Path) -> None:
    train("run", *WINDOW)
    stem = tmp_path / "run" / "profile" / "rank_0000_steps_2-3"
    assert sorted(path.name for path in stem.parent.iterdir()) == [f"{stem.name}.json.gz", f"{stem.name}.txt"]
    events = trace(Path(f"{stem}.json.gz"))
    phases = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert phases.count("llada_mega.forward") == phases.count("llada_mega.backward") == 2 * 2  # micro-batches
    assert {"llada_mega.data", "llada_mega.optimizer"} <= set(phases)
    assert any(event["name"] == "aten::mm" for event in events)
    assert not any(event["name"] == "[memory]" for event in events)
    assert "aten::mm" in Path(f"{stem}.txt").read_text()
    assert not torch.autograd.profiler._is_profiler_enabled


def test_memory_of_a_window(train: Train, tmp_path: Path) -> None:
    train("run", *WINDOW, "logging.profile.memory=true")
    events = trace(tmp_path / "run" / "profile" / "rank_0000_steps_2-3.json.gz")
    changes = [event["args"]["Bytes"] for event in events if event["name"] == "[memory]"]
    assert max(changes) > 0 > min(changes)


@pytest.mark.parametrize("resumed_from,window", [(2, "3-3"), (3, None)])
def test_a_resume_profiles_what_is_left_of_the_window(
    train: Train, tmp_path: Path, resumed_from: int, window: str | None
) -> None:
    train("run", f"trainer.max_steps={resumed_from}")
    train("run", *WINDOW)
    written = list((tmp_path / "run" / "profile").glob("*.json.gz"))
    assert [path.name for path in written] == ([f"rank_0000_steps_{window}.json.gz"] if window else [])


def test_a_run_that_ends_in_the_window_leaves_its_profile(train: Train, tmp_path: Path) -> None:
    train("run", "trainer.max_steps=2", "logging.profile.start=2", "logging.profile.steps=5")
    assert (tmp_path / "run" / "profile" / "rank_0000_steps_2-2.json.gz").exists()


def test_other_ranks_are_not_profiled(train: Train, tmp_path: Path) -> None:
    train("run", *WINDOW, "logging.profile.ranks=[]")
    assert not (tmp_path / "run" / "profile").exists()
