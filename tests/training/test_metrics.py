"""The values of a row: time by phase, over restarts too; utilisation; expert balance."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llada_mega.config.model import ModelConfig, MoEConfig
from llada_mega.config.training import ObjectiveConfig, StageConfig
from llada_mega.diffusion.curriculum import build_curriculum
from llada_mega.training import peak
from llada_mega.training.callbacks import metrics
from llada_mega.training.callbacks.metrics import MetricsCallback, expert_balance
from llada_mega.training.state import StepMeasurement, TrainState
from llada_mega.training.timeline import PHASES, HostMark, Timeline
from tests.training.conftest import TINY_MOE, Train


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def test_shares_of_time(train: Train, tmp_path: Path) -> None:
    """Every phase of a real run is there and they add up."""
    often = ("checkpoint.every=1", "trainer.validation.every=1", "trainer.validation.windows=4")
    train("run", "trainer.max_steps=3", *often)
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 3
    for row in rows:
        assert set(row["time_share"]) == set(PHASES)
        assert sum(row["time_share"].values()) == pytest.approx(1.0)
        assert all(share > 0 for share in row["time_share"].values())


def test_utilisation_is_null_on_a_cpu_unless_the_peak_is_given(train: Train, tmp_path: Path) -> None:
    train("without", "trainer.max_steps=1")
    train("given", "trainer.max_steps=1", "logging.peak_tflops=0.5")
    (without,), (given,) = rows_of(tmp_path / "without"), rows_of(tmp_path / "given")
    assert without["mfu"] is None
    assert given["mfu"] == pytest.approx(given["tflops_per_device"] / 0.5) != 0


def test_expert_balance_by_layer() -> None:
    model = ModelConfig(num_layers=4, moe=MoEConfig(num_experts=4, first_dense_layers=2))
    load_LE = torch.tensor([[1, 1, 1, 1], [0, 6, 2, 0]])
    assert expert_balance(model, load_LE) == {
        "expert_load_max_over_mean": 3.0,
        "expert_load_by_layer": {"2": 1.0, "3": 3.0},
        "dead_experts": 2,
    }


def test_a_moe_run_logs_the_balance_of_its_layers(train: Train, tmp_path: Path) -> None:
    train("run", "trainer.max_steps=1", *TINY_MOE)
    (row,) = rows_of(tmp_path / "run")
    assert set(row["expert_load_by_layer"]) == {"1", "2"}
    assert row["expert_load_max_over_mean"] == max(row["expert_load_by_layer"].values()) >= 1.0


def test_peaks() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA H200": 989,
        "NVIDIA B200": 2250,
        "NVIDIA GB200": 2500,
        "NVIDIA GH200 480GB": 989,
        "NVIDIA A100-SXM4-80GB": 312,
    }
    for name, tflops in names.items():
        assert peak.table_peak(name, "bfloat16") == tflops * 1e12
        assert (peak.table_peak(name, "float32") or 0) < tflops * 1e12 / 8
    assert peak.table_peak("Something Else", "bfloat16") is None
    assert peak.peak_flops("float32", 2.0) == 2e12


class Clock:
    """In the place of the module ``time``."""

    def __init__(self) -> None:
        self.now = 1e9

    def time(self) -> float:
        return self.now

    perf_counter = time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


@pytest.fixture
def stand_in() -> Callable[[int], Any]:
    """A trainer as far as rows need one, at a step."""

    def make(step: int) -> Any:
        stages = [StageConfig(block_size=4, tokens=640)]
        curriculum = build_curriculum(
            stages,
            sequence_length=64,
            global_batch_size=1,
            base_lr=1.0,
            min_lr=0.0,
            default_objective=ObjectiveConfig(),
        )
        rows: list[dict[str, Any]] = []
        return SimpleNamespace(
            config=SimpleNamespace(trainer=SimpleNamespace(dtype="float32", log_every=1, global_batch_size=1)),
            step=SimpleNamespace(
                timeline=Timeline(HostMark), groups=SimpleNamespace(cp=SimpleNamespace(size=lambda: 1))
            ),
            state=TrainState(step=step, consumed_samples=step, consumed_tokens=64 * step),
            curriculum=curriculum,
            last_step=10,
            rows=rows,
            log=rows.append,
        )

    return make


def make_steps(callback: MetricsCallback, trainer: Any, clock: Clock, count: int) -> None:
    """Steps of 10 seconds with 64 tokens, and 5 seconds of something else after each."""
    measured = StepMeasurement(1.0, 1.0, 0.0, 32, 64, 128, 1.0, 0.1, flops=5e12)
    for _ in range(count):
        callback.on_step_begin(trainer)
        clock.now += 10
        trainer.state.step += 1
        trainer.state.consumed_samples += 1
        callback.on_step_end(trainer, measured, applied=True)
        clock.now += 5


def test_time_over_a_restart(clock: Clock, stand_in: Callable[[int], Any]) -> None:
    """Killed in step 4 after a checkpoint at step 2; 100 seconds later the run goes on and repeats step 3."""
    first, trainer = MetricsCallback(), stand_in(0)
    first.on_train_begin(trainer)
    make_steps(first, trainer, clock, 2)
    saved = json.loads(json.dumps(first.state_dict()))
    make_steps(first, trainer, clock, 1)
    assert [row["goodput"] for row in trainer.rows] == pytest.approx([10 / 10, 20 / 25, 30 / 40])
    assert [row["train_seconds"] for row in trainer.rows] == pytest.approx([10, 25, 40])
    clock.now += 100

    second, resumed = MetricsCallback(), stand_in(2)
    second.load_state_dict(saved)
    second.on_train_begin(resumed)
    make_steps(second, resumed, clock, 1)
    (row,) = resumed.rows
    assert row["step"] == 3
    assert row["train_seconds"] == pytest.approx(30 + 10)  # what the first process did after its checkpoint is lost
    assert row["goodput"] == pytest.approx(30 / (45 + 100 + 10))
    second.load_state_dict(saved)  # as a rollback does
    assert second.state_dict()["train_seconds"] == pytest.approx(saved["train_seconds"])
    assert row["tokens_per_s"] == pytest.approx(6.4) and row["positions_per_s"] == pytest.approx(12.8)
    assert row["tflops_per_device"] == pytest.approx(0.5)
