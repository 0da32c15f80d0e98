"""What a person sees of a run: bars with ETA for the stage and the run on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from llada_mega.diffusion.curriculum import ResolvedStage
from llada_mega.training.callback import Callback
from llada_mega.training.callbacks.eta import Eta
from llada_mega.training.trainer import Trainer

LINE_EVERY_SECONDS = 10.0  # without a terminal


class ProgressCallback(Callback):
    """Progress of the run and of its stage, with the newest loss."""

    name = "progress"

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._last_line = 0.0

    def on_train_begin(self, trainer: Trainer) -> None:
        self._eta = Eta(trainer.curriculum, trainer.config.trainer.global_batch_size, trainer.last_step)
        self._eta.begin(trainer.state.step)
        if not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("[bold]{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta {task.fields[eta]}"),
            TextColumn("{task.fields[info]}"),
            console=self.console,
        )
        self._progress.start()
        start, end = trainer.state.step, trainer.last_step
        self._run = self._progress.add_task("run", total=end, completed=start, info="", eta=hours(None))
        self._stage = self._progress.add_task("stage", total=1, info="", eta=hours(None))

    def on_stage_begin(self, trainer: Trainer, stage: ResolvedStage) -> None:
        size = trainer.config.trainer.global_batch_size
        self._stage_start = stage.start_sample // size
        steps = stage.num_samples // size
        title = f"{stage.name} (block {stage.block_size})"
        if self._progress is not None:
            done = trainer.state.step - self._stage_start
            eta = hours(self._eta.stage_seconds(trainer.state.step))
            self._progress.reset(self._stage, total=steps, completed=done, description=title, eta=eta)
        else:
            self.console.print(f"stage {title}: {steps} steps, layout {stage.layout}")

    def on_log(self, trainer: Trainer, row: dict[str, Any]) -> None:
        if "valid/ar_nll" in row:
            blocks = [f"{k.split('/')[1]} {v:.2f}" for k, v in row.items() if k.endswith("/ce_masked")]
            text = f"step {row['step']:>5}  held-out masked CE: {', '.join(blocks)}; AR {row['valid/ar_nll']:.3f}"
            self.console.print(text.replace("block_", "block "))
        if "loss" not in row:
            return
        step = row["step"]
        self._eta.update(step)
        stage, run = hours(self._eta.stage_seconds(step)), hours(self._eta.run_seconds(step))
        info = f"ce {row['ce_masked']:.3f}  grad {row['grad_norm']:.2f}  {row['tokens_per_s']:.0f} tok/s"
        if row["mfu"] is not None:
            info += f"  mfu {row['mfu']:.1%}"
        if self._progress is not None:
            self._progress.update(self._run, completed=step, info=info, eta=run)
            self._progress.update(self._stage, completed=step - self._stage_start, eta=stage)
        elif time.perf_counter() - self._last_line > LINE_EVERY_SECONDS or step == trainer.last_step:
            self._last_line = time.perf_counter()
            line = f"step {step:>5}/{trainer.last_step}  loss {row['loss']:.3f}  {info}"
            self.console.print(f"{line}  eta {stage} (stage) {run} (run)")

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def hours(seconds: float | None) -> str:
    """``1:02:03``, with days before it when there are any; dashes for None."""
    if seconds is None:
        return "-:--:--"
    days, rest = divmod(round(seconds), 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock
