"""What a person sees of a run: a bar with ETA for the stage and the run on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llada_mega.diffusion.curriculum import ResolvedStage
from llada_mega.training.callback import Callback
from llada_mega.training.trainer import Trainer

LINE_EVERY_SECONDS = 10.0  # without a terminal


class ProgressCallback(Callback):
    """Progress of the run and of its stage, with the newest loss."""

    name = "progress"

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._last_line = 0.0
        self._began = 0.0
        self._first_step = 0

    def on_train_begin(self, trainer: Trainer) -> None:
        self._began, self._first_step = time.perf_counter(), trainer.state.step
        if not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("[bold]{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[info]}"),
            console=self.console,
        )
        self._progress.start()
        self._run = self._progress.add_task("run", total=trainer.last_step, completed=trainer.state.step, info="")
        self._stage = self._progress.add_task("stage", total=1, info="")

    def on_stage_begin(self, trainer: Trainer, stage: ResolvedStage) -> None:
        self._stage_start = stage.start_sample
        size = trainer.config.trainer.global_batch_size
        steps = (stage.end_sample - stage.start_sample) // size
        done = (trainer.state.consumed_samples - stage.start_sample) // size
        title = f"{stage.name} (block {stage.block_size})"
        if self._progress is not None:
            self._progress.reset(self._stage, total=steps, completed=done, description=title)
        else:
            self.console.print(f"stage {title}: {steps} steps, layout {stage.layout}")

    def on_log(self, trainer: Trainer, row: dict[str, Any]) -> None:
        if "valid/ar_nll" in row:
            blocks = [f"{k.split('/')[1]} {v:.2f}" for k, v in row.items() if k.endswith("/ce_masked")]
            text = f"step {row['step']:>5}  held-out masked CE: {', '.join(blocks)}; AR {row['valid/ar_nll']:.3f}"
            self.console.print(text.replace("block_", "block "))
        if "loss" not in row:
            return
        info = f"ce {row['ce_masked']:.3f}  grad {row['grad_norm']:.2f}  {row['tokens_per_s']:.0f} tok/s"
        if self._progress is not None:
            self._progress.update(self._run, completed=row["step"], info=info)
            done = row["consumed_samples"] - self._stage_start
            self._progress.update(self._stage, completed=done // trainer.config.trainer.global_batch_size)
        elif time.perf_counter() - self._last_line > LINE_EVERY_SECONDS or row["step"] == trainer.last_step:
            self._last_line = time.perf_counter()
            done = row["step"] - self._first_step
            seconds = (self._last_line - self._began) / max(done, 1) * (trainer.last_step - row["step"])
            eta = time.strftime("%H:%M:%S", time.gmtime(seconds))
            self.console.print(f"step {row['step']:>5}/{trainer.last_step}  loss {row['loss']:.3f}  {info}  eta {eta}")

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
