"""Where metrics go, and what never goes there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llada_mega.checkpoint.checkpoint import list_checkpoints, read_state
from llada_mega.training.callbacks.sinks import finite, flatten
from llada_mega.training.redaction import HIDDEN, redact
from tests.training.conftest import Train

SECRET = "sk-planted-0123456789abcdef"


def test_no_file_of_a_run_holds_a_secret(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key in the environment and one typed into the configuration, with every sink on, wandb offline."""
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(
        "run",
        "trainer.max_steps=2",
        "logging.tensorboard=true",
        "logging.wandb=true",
        f"logging.wandb_project=project-{SECRET}",
    )
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    kinds = {path.relative_to(tmp_path / "run").parts[0] for path in files}
    assert {"config.yaml", "metrics.jsonl", "tensorboard", "wandb", "checkpoints"} <= kinds
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
    assert HIDDEN in (tmp_path / "run" / "config.yaml").read_text()


def test_wandb_does_not_store_the_command_line(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    arguments = [
        f"run.dir={tmp_path / 'run'}",
        f"data.train=[{{path: {corpus}}}]",
        "data.sequence_length=64",
        "curriculum.stages=[{block_size: 4, tokens: 512}]",
        "trainer.max_steps=1",
        "logging.wandb=true",
        f"logging.wandb_project=project-{SECRET}",
    ]
    subprocess.run([sys.executable, "-m", "llada_mega", "train", *arguments], check=True, capture_output=True)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any("wandb" in path.parts for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_the_wandb_run_is_resumed(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    overrides = ("logging.wandb=true", "checkpoint.every=1", "checkpoint.keep_last=5")
    train("run", *overrides, "trainer.max_steps=1")
    train("run", *overrides, "trainer.max_steps=2")
    ids = {read_state(p)["callbacks"]["wandb"]["id"] for p in list_checkpoints(tmp_path / "run" / "checkpoints")}
    assert len(ids) == 1 and None not in ids
    assert len(list((tmp_path / "run" / "wandb").glob(f"offline-run-*{ids.pop()}"))) >= 1


def test_tensorboard_has_the_numbers_of_the_rows(train: Train, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train("run", "trainer.max_steps=3", "logging.tensorboard=true")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("loss")]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx([row["loss"] for row in rows if "loss" in row], rel=1e-6)


def test_rows_have_the_documented_names(train: Train, tmp_path: Path) -> None:
    train("run", "trainer.max_steps=2", "trainer.validation.every=2", "trainer.validation.windows=8")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    documented = [
        "step",
        "stage",
        "block_size",
        "layout",
        "consumed_samples",
        "consumed_tokens",
        "loss",
        "ce_masked",
        "mask_ratio",
        "grad_norm",
        "lr",
        "tokens_per_s",
        "positions_per_s",
        "tflops_per_device",
        "mfu",
        "memory_gib",
    ]
    assert set(documented) <= rows[0].keys()
    validation = next(row for row in rows if "valid/ar_nll" in row)
    assert {f"valid/block_32/{name}" for name in ("ce_masked", "nll_bound", "accuracy")} <= validation.keys()


def test_redaction_of_fields_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "abcdefgh12345")
    monkeypatch.setenv("SHORT_TOKEN", "true")
    text = redact('api_key: hunter2hunter2\n"db_password": "x y"\nnote: abcdefgh12345 true\nmask_token_id: 256\n')
    assert "hunter2" not in text and "x y" not in text and "abcdefgh12345" not in text
    assert "true" in text and "mask_token_id: 256" in text


def test_numbers_that_json_lacks() -> None:
    assert finite({"a": float("nan"), "b": {"c": float("inf")}, "d": 1.0}) == {"a": "nan", "b": {"c": "inf"}, "d": 1.0}
    assert flatten({"a": 1, "b": {"c": 2.5, "d": "text"}}) == {"a": 1.0, "b/c": 2.5}
