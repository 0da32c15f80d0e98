"""Where metrics go, and what never goes there."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llada_mega.checkpoint.checkpoint import list_checkpoints, read_state
from llada_mega.training import run as run_module
from llada_mega.training.callback import Callback
from llada_mega.training.callbacks.sinks import finite, flatten
from llada_mega.training.redaction import HIDDEN, redact
from llada_mega.training.state import StepMeasurement
from llada_mega.training.trainer import Trainer
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


class Interruption(Callback):
    """What a signal does to a run after its third step."""

    def on_step_end(self, trainer: Trainer, measured: StepMeasurement, applied: bool) -> None:
        if trainer.state.step == 3:
            raise KeyboardInterrupt


def test_the_wandb_run_goes_on_after_an_interruption(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after step 3 with a checkpoint of step 2: wandb's own files hold one run, and every row of both."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    overrides = ("logging.wandb=true", "logging.wandb_group=sweep", "checkpoint.every=2", "trainer.max_steps=5")
    build = run_module.build_callbacks
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_module, "build_callbacks", lambda *a: [*build(*a), Interruption()])
        train("run", *overrides)
    train("run", *overrides)

    before, after = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime)
    (run_id,) = {
        read_state(path)["callbacks"]["wandb"]["id"] for path in list_checkpoints(tmp_path / "run" / "checkpoints")
    }
    logged: list[dict[str, float]] = []
    for directory, steps, exit_code in ((before, [1, 2, 3], 1), (after, [3, 4, 5], 0)):
        records = list(wandb_records(directory / f"run-{run_id}.wandb"))
        (run,) = (record.run for record in records if record.HasField("run"))
        assert (run.run_id, run.run_group, run.project) == (run_id, "sweep", "llada-mega")
        rows = [
            {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.HasField("history")
        ]
        assert [row["step"] for row in rows] == steps
        assert [record.exit.exit_code for record in records if record.HasField("exit")] == [exit_code]
        (globbed,) = (record.metric for record in records if record.HasField("metric") and record.metric.glob_name)
        assert (globbed.glob_name, globbed.step_metric) == ("*", "step")
        logged += rows
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    expected = [flatten(json.loads(line)) for line in lines]
    own = [{key: value for key, value in row.items() if not key.startswith("_")} for row in logged]
    assert own == expected
    assert logged[2]["loss"] == logged[3]["loss"]  # the step that was made twice


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline run: protocol buffers in LevelDB's log format, after a header of 7 bytes.

    Blocks of 32 KiB hold fragments: crc32, length and kind (1 whole, 2 first, 3 middle, 4 last), then the bytes.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, block, collected = path.read_bytes(), 7, 2**15, b""
    assert content[:4] == b":W&B"
    while at < len(content):
        if block - at % block < 7:  # no room for a fragment's head
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        collected += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(collected)
            collected = b""


def test_tensorboard_has_the_numbers_of_the_rows(train: Train, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train("run", "trainer.max_steps=3", "logging.tensorboard=true")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("loss")]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx([row["loss"] for row in rows if "loss" in row], rel=1e-6)


def test_tensorboard_shows_a_step_that_was_made_twice_once(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    overrides = ("logging.tensorboard=true", "checkpoint.every=2", "trainer.max_steps=4")
    build = run_module.build_callbacks
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_module, "build_callbacks", lambda *a: [*build(*a), Interruption()])
        train("run", *overrides)
    train("run", *overrides)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert {"time_share/forward", "ce_by_noise/0.875-1", "goodput"} & set(events.Tags()["scalars"])


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
