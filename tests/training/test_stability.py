"""Policies for steps that are not finite or that spike, on real runs with a planted fault."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from llada_mega.checkpoint.checkpoint import list_checkpoints, read_state
from llada_mega.config.schema import Config
from llada_mega.config.training import StabilityConfig
from llada_mega.errors import TrainingError
from llada_mega.training import run as run_module
from llada_mega.training.callback import Callback
from llada_mega.training.callbacks.stability import StabilityCallback
from llada_mega.training.run import run_training
from llada_mega.training.state import StepMeasurement, TrainState
from llada_mega.training.trainer import Trainer
from tests.training.rows import read_rows

Configure = Callable[..., Config]


class Poison(Callback):
    """Makes the loss of some steps not finite: an infinite final norm for one forward pass."""

    name = "poison"

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps
        self.weights: dict[int, torch.Tensor] = {}

    def on_step_begin(self, trainer: Trainer) -> None:
        weight = trainer.step.bare_models[0].decoder.final_layernorm.weight
        if trainer.state.step + 1 in self.steps:
            self.weights[trainer.state.step + 1] = weight.detach().clone()
            weight.data.fill_(math.inf)

    def accept_step(self, trainer: Trainer, measured: StepMeasurement) -> bool:
        saved = self.weights.pop(trainer.state.step + 1, None)
        if saved is not None:
            trainer.step.bare_models[0].decoder.final_layernorm.weight.data.copy_(saved)
        return True


@pytest.fixture
def train_poisoned(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrainState]:
    """Train with some poisoned steps."""
    build = run_module.build_callbacks

    def train(name: str, steps: set[int], *overrides: str) -> TrainState:
        monkeypatch.setattr(run_module, "build_callbacks", lambda *a: [Poison(steps), *build(*a)])
        return run_training(configure(name, *overrides), Console(quiet=True)).state

    return train


def test_stop_names_the_step_and_leaves_checkpoints(train_poisoned: Callable[..., TrainState], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="step 4: .*not finite.*checkpoint is intact"):
        train_poisoned("run", {4}, "checkpoint.every=2")
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000002"]


def test_skip_leaves_the_weights_and_goes_on(train_poisoned: Callable[..., TrainState], tmp_path: Path) -> None:
    train_poisoned("run", {4}, "trainer.stability.nonfinite=skip", "trainer.max_steps=6")
    rows = read_rows(tmp_path / "run")
    assert [rows[step]["applied"] for step in range(1, 7)] == [True, True, True, False, True, True]
    assert rows[4]["loss"] == "nan" and math.isfinite(rows[5]["loss"])
    assert "policy skip" in read_rows(tmp_path / "run", "warning")[4]["warning"]


def test_too_many_skips_stop(train_poisoned: Callable[..., TrainState]) -> None:
    with pytest.raises(TrainingError, match="3 steps in a row"):
        train_poisoned("run", {3, 4, 5}, "trainer.stability.nonfinite=skip", "trainer.stability.max_skipped=2")


def test_warn_goes_on(train_poisoned: Callable[..., TrainState], tmp_path: Path) -> None:
    train_poisoned("run", {4}, "trainer.stability.nonfinite=warn", "trainer.max_steps=5")
    rows = read_rows(tmp_path / "run")
    assert rows[4]["applied"] is True and 5 in rows


ROLLBACK = ("trainer.stability.nonfinite=rollback", "checkpoint.every=2", "checkpoint.keep_last=9")


def test_rollback_takes_the_checkpoint_and_goes_on_with_the_next_data(
    train_poisoned: Callable[..., TrainState], tmp_path: Path
) -> None:
    """Step 6 is bad: the weights of step 4 go on at step 7, as if steps 5 and 6 had been skipped.

    Against a run that never learned from these two: its steps are skipped one by one, for the same optimizer count.
    """
    train_poisoned("run", {6}, *ROLLBACK)
    train_poisoned("reference", {5, 6}, "trainer.stability.nonfinite=skip")
    rows, reference = (read_rows(tmp_path / name) for name in ("run", "reference"))
    assert [rows[step]["applied"] for step in range(1, 11)] == [True] * 5 + [False] + [True] * 4
    assert rows[5]["loss"] != reference[5]["loss"] and math.isfinite(rows[5]["loss"])
    for step in (*range(1, 5), *range(7, 11)):
        assert rows[step] == reference[step]
    ends = [list_checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("run", "reference")]
    assert len({(end / "tensors" / "part_00000.json").read_text() for end in ends}) == 1
    assert [read_state(end)["train"]["skipped_samples"] for end in ends] == [[[16, 24]]] * 2
    warning = read_rows(tmp_path / "run", "warning")[6]["warning"]
    assert warning == "weights and optimizer are back at step 4; samples 16 to 24 are skipped"


def test_a_restart_after_a_rollback_keeps_the_skip(train_poisoned: Callable[..., TrainState], tmp_path: Path) -> None:
    """The process dies right after the rollback: what goes on is the skipped run, though nothing is poisoned now."""
    train_poisoned("whole", {5}, *ROLLBACK)
    train_poisoned("run", {5}, *ROLLBACK, "trainer.max_steps=5")
    state = train_poisoned("run", set(), *ROLLBACK)
    assert (state.step, state.skipped_samples) == (10, [[16, 20]])
    assert read_rows(tmp_path / "run") == read_rows(tmp_path / "whole")


def test_rollbacks_that_do_not_help_stop(train_poisoned: Callable[..., TrainState], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="step 7: .*2 rollbacks in a row did not help"):
        train_poisoned("run", {5, 6, 7}, *ROLLBACK, "trainer.stability.max_rollbacks=2")
    names = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert names[-2:] == ["step_00000005", "step_00000006"]


def test_rollback_passes_a_damaged_checkpoint_over(
    train_poisoned: Callable[..., TrainState], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(self: Poison, trainer: Trainer, measured: StepMeasurement, applied: bool) -> None:
        if trainer.state.step == 5:
            path = tmp_path / "run" / "checkpoints" / "step_00000004" / "tensors" / "part_00000.safetensors"
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)

    monkeypatch.setattr(Poison, "on_step_end", damage)
    train_poisoned("run", {6}, *ROLLBACK)
    end = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert read_state(end)["train"]["skipped_samples"] == [[8, 24]]


def test_no_checkpoint_to_roll_back_to_stops(train_poisoned: Callable[..., TrainState]) -> None:
    with pytest.raises(TrainingError, match="step 2: .*no checkpoint to roll back to"):
        train_poisoned("run", {2}, *ROLLBACK)


def test_skipped_ranges_are_joined() -> None:
    state = TrainState()
    for first, here in ((0, 4), (4, 8), (12, 16), (10, 20)):
        state.consumed_samples = here
        state.skip(first)
    assert state.skipped_samples == [[0, 8], [10, 20]]


class FakeTrainer:
    """As much of a trainer as the spike policy looks at."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.state = type("State", (), {"step": 0, "consumed_samples": 0, "embedding_rms": 0.0})()

    def embedding_noise_std(self) -> float:
        return 0.0

    def warn(self, message: str, step: int | None = None) -> None:
        self.warnings.append(message)


def measured(ce: float) -> StepMeasurement:
    return StepMeasurement(ce, ce, 0.0, 1, 1, 1, grad_norm=1.0, mask_embedding_rms=1.0, flops=1.0)


def test_spikes_are_judged_by_the_median() -> None:
    callback = StabilityCallback(StabilityConfig(spike="skip", spike_factor=2.0, spike_window=4))
    trainer = FakeTrainer()
    accepted = [callback.accept_step(trainer, measured(ce)) for ce in (9.0, 4.0, 4.0, 4.0, 7.9, 8.1, 4.0)]
    # 9.0 comes before the window is half full; the median is 4 when 7.9 and 8.1 come, twice that is the limit
    assert accepted == [True, True, True, True, True, False, True]
    assert len(trainer.warnings) == 1 and "8.1" in trainer.warnings[0]


def test_state_survives_json() -> None:
    config = StabilityConfig(spike="skip", spike_factor=2.0, spike_window=4)
    first, second = StabilityCallback(config), StabilityCallback(config)
    for ce in (4.0, 4.0, 4.0):
        first.accept_step(FakeTrainer(), measured(ce))
    second.load_state_dict(first.state_dict())
    assert not second.accept_step(FakeTrainer(), measured(9.0))


def test_a_zero_mask_embedding_is_named(configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without noise the run explodes or warns; the message says what to set."""

    def build_with_zero_mask(*args: object, **kwargs: object) -> object:
        step = build_step(*args, **kwargs)
        step.bare_models[0].embedding.word_embeddings.weight.data[256].zero_()
        return step

    build_step = run_module.build_step
    monkeypatch.setattr(run_module, "build_step", build_with_zero_mask)
    stages = "curriculum.stages=[{name: s, block_size: 64, tokens: 2560}]"
    overrides = ("model.num_layers=24", "objective.t_min=0.999", "objective.t_max=1.0", "trainer.max_steps=3", stages)
    with pytest.raises(TrainingError, match="MASK embedding.*embedding_noise.decay_tokens"):
        run_training(configure("without", *overrides), Console(quiet=True))
    noisy = stages.replace("2560}", "2560, embedding_noise: {decay_tokens: 1280}}")
    run_training(configure("with", *overrides[:-1], noisy), Console(quiet=True))
    assert all(row["grad_norm"] < 1e4 for row in read_rows(tmp_path / "with").values())


def test_noise_that_ends_too_early_warns(configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def build_with_small_mask(*args: object, **kwargs: object) -> object:
        step = build_step(*args, **kwargs)
        step.bare_models[0].embedding.word_embeddings.weight.data[256].mul_(1e-4)
        return step

    build_step = run_module.build_step
    monkeypatch.setattr(run_module, "build_step", build_with_small_mask)
    stages = "curriculum.stages=[{name: s, block_size: 4, tokens: 2560, embedding_noise: {decay_tokens: 512}}]"
    run_training(configure("run", stages, "trainer.max_steps=4", "optimizer.lr=1e-7"), Console(quiet=True))
    warnings = read_rows(tmp_path / "run", "warning")
    assert "embedding noise ends" in warnings[2]["warning"]
