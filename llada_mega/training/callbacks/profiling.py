"""A window of steps under PyTorch's profiler."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from llada_mega.config.training import ProfileConfig
from llada_mega.training.callback import Callback
from llada_mega.training.state import StepMeasurement
from llada_mega.training.trainer import Trainer

logger = logging.getLogger("llada_mega")
TABLE_ROWS = 40
SNAPSHOT_EVENTS = 1_000_000  # allocations that a memory snapshot remembers


class ProfileCallback(Callback):
    """Writes ``RUN/profile/rank_0000_steps_5-7``: ``.json.gz`` (a Chrome trace) and ``.txt`` (the dearest operators).

    Nothing is installed outside the window: steps before and after it run at full speed. With ``memory`` the trace has
    allocations, and on a GPU ``.pickle`` is PyTorch's memory snapshot for https://pytorch.org/memory_viz.
    """

    name = "profile"

    def __init__(self, run_dir: Path, config: ProfileConfig, rank: int) -> None:
        self._config, self._rank = config, rank
        self._directory = run_dir / "profile"
        self._profile: profile | None = None
        self._first = self._last = 0

    def on_step_begin(self, trainer: Trainer) -> None:
        step = trainer.state.step + 1
        # A resume inside the window profiles what is left of it.
        if self._profile is None and self._config.start <= step < self._config.start + self._config.steps:
            self._first = self._last = step
            self._start(trainer.step.device)

    def on_step_end(self, trainer: Trainer, measured: StepMeasurement, applied: bool) -> None:
        if self._profile is None:
            return
        self._last = trainer.state.step
        if self._last + 1 >= self._config.start + self._config.steps:
            self._stop()

    def close(self) -> None:
        if self._profile is not None:  # the run ended, or failed, inside the window
            self._stop()

    def _start(self, device: torch.device) -> None:
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            if self._config.memory:
                torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_EVENTS)
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=self._config.memory)
        self._profile.start()

    def _stop(self) -> None:
        assert self._profile is not None
        self._profile.stop()
        self._directory.mkdir(parents=True, exist_ok=True)
        stem = self._directory / f"rank_{self._rank:04d}_steps_{self._first}-{self._last}"
        self._profile.export_chrome_trace(f"{stem}.json.gz")
        on_gpu = ProfilerActivity.CUDA in self._profile.activities
        order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        Path(f"{stem}.txt").write_text(self._profile.key_averages().table(sort_by=order, row_limit=TABLE_ROWS) + "\n")
        if on_gpu and self._config.memory:
            torch.cuda.memory._dump_snapshot(f"{stem}.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile = None
        logger.info(f"profile of steps {self._first} to {self._last}: {stem}.json.gz, for https://ui.perfetto.dev")
