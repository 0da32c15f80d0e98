"""Checkpoints during a run: when, how many, and which to keep."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llada_mega.checkpoint.checkpoint import list_checkpoints, remove_checkpoint, remove_leftovers, step_name
from llada_mega.checkpoint.merge import ALL_STAGES, NEWEST_STAGE, find_candidates
from llada_mega.checkpoint.save import CheckpointWrite
from llada_mega.checkpoint.storage import Snapshot, snapshot
from llada_mega.config.model import ModelConfig
from llada_mega.config.training import CheckpointConfig
from llada_mega.errors import CheckpointError
from llada_mega.training.callback import Callback
from llada_mega.training.resume import collect_state, sharded_training_state
from llada_mega.training.state import StepMeasurement
from llada_mega.training.trainer import Trainer

LATEST = "latest"


class CheckpointCallback(Callback):
    """Saves every ``checkpoint.every`` steps and at the end; synchronously, or in a thread with ``checkpoint.async``.

    With the thread, training waits only for the copy to CPU memory, which is set aside before the first step and kept.
    At the first step boundary at which every rank has written its part, a thread of the first rank gives the checkpoint
    its name and then removes those that are no longer to be kept.
    """

    name = phase = "checkpoint"

    def __init__(self, run_dir: Path, config: CheckpointConfig, tokenizer_dir: Path | None) -> None:
        self.root = run_dir / "checkpoints"
        self.config, self.tokenizer_dir = config, tokenizer_dir
        self._pending: _Pending | None = None
        self._memory: Snapshot | None = None
        self._metrics: dict[str, float] = {}
        self._saved_step = -1

    def on_train_begin(self, trainer: Trainer) -> None:
        if trainer.writes_files:  # it holds the lock of the run directory
            remove_leftovers(self.root)
        self._saved_step = trainer.state.step if trainer.state.step else -1
        if self.config.async_save and self.config.every:
            self._memory, _ = snapshot(sharded_training_state(trainer.step))

    def on_log(self, trainer: Trainer, row: dict[str, Any]) -> None:
        if any(key.startswith("valid/") for key in row):
            self._metrics = {key: value for key, value in row.items() if isinstance(value, int | float)}

    def on_step_end(self, trainer: Trainer, measured: StepMeasurement, applied: bool) -> None:
        self._poll(trainer, wait=False)
        due = self.config.every and trainer.state.step % self.config.every == 0
        if due or trainer.checkpoint_is_due:
            trainer.checkpoint_is_due = False
            self._save(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        if trainer.state.step != self._saved_step:
            self._save(trainer)
        self._poll(trainer, wait=True)

    def on_stop(self, trainer: Trainer) -> None:
        if trainer.state.step:
            self.on_train_end(trainer)

    def close(self) -> None:
        if self._pending is not None:
            self._pending.thread.join()
            self._pending.write.abandon()

    def _save(self, trainer: Trainer) -> None:
        self._poll(trainer, wait=True)  # a disk slower than checkpoint.every slows training down
        groups = trainer.step.groups
        write = CheckpointWrite(
            self.root / step_name(trainer.state.step), rank=groups.rank, world_size=groups.world_size
        )
        state = collect_state(trainer)
        state["metrics"] = self._metrics if self._metrics.get("step") == trainer.state.step else {}
        write_error: CheckpointError | None = None
        try:
            write.start(sharded_training_state(trainer.step), partial(_sum_over_ranks, groups.device), self._memory)
        except CheckpointError as error:
            write_error = error
        _raise_together(write_error, write, groups.device)
        self._pending = _Pending(write, partial(self._complete, write, trainer.config.model, state))
        self._saved_step = trainer.state.step
        if not self.config.async_save:
            self._poll(trainer, wait=True)

    def _poll(self, trainer: Trainer, wait: bool) -> None:
        """Go on with the checkpoint that is being written, once every rank is done with its part."""
        device = trainer.step.groups.device
        while (pending := self._pending) is not None:
            if wait:
                pending.thread.join()
            if not _all_ranks(not pending.thread.is_alive(), device):
                return
            self._pending = None
            _raise_together(pending.error, pending.write, device)
            if pending.is_complete:
                for line in pending.warnings:
                    trainer.warn(line)
                return
            pending.begin_completion()
            self._pending = pending

    def _complete(self, write: CheckpointWrite, model: ModelConfig, state: dict[str, Any]) -> list[str]:
        """Runs in the thread, on every rank; warnings."""
        write.finish(model, state, self.tokenizer_dir)
        if write.rank:
            return []
        link_latest(self.root, write.directory.name)
        try:
            prune(self.root, self.config)
        except (CheckpointError, OSError) as error:  # no reason to end a run: its newest checkpoint is there
            return [f"older checkpoints were not removed: {error}"]
        return []


class _Pending:
    """A checkpoint on its way to disk: a thread writes this rank's tensors, and when all have, another completes it.

    Args:
        write: started.
        complete: what is to be done once every rank has written; returns warnings.
    """

    def __init__(self, write: CheckpointWrite, complete: Callable[[], list[str]]) -> None:
        self.write, self.warnings, self.is_complete = write, list[str](), False
        self.error: CheckpointError | None = None
        self._complete = complete
        self._start(write.write)

    def begin_completion(self) -> None:
        """To be called when every rank has written its tensors."""
        self._start(self._run_completion)

    def _run_completion(self) -> None:
        self.warnings = self._complete()
        self.is_complete = True

    def _start(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except CheckpointError as error:  # handed to the main thread, which raises it
                self.error = error
            except BaseException as error:
                self.error = CheckpointError(f"checkpoint {self.write.directory} was not written: {error!r}")

        self.thread = threading.Thread(target=run, name="checkpoint-writer")
        self.thread.start()


def _sum_over_ranks(device: torch.device, number: int) -> int:
    total = torch.tensor(number, device=device)
    torch.distributed.all_reduce(total)
    return int(total)


def _all_ranks(condition: bool, device: torch.device) -> bool:
    """True when it holds on every rank."""
    if torch.distributed.get_world_size() == 1:
        return condition
    flag = torch.tensor(int(condition), device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
    return bool(flag)


def _raise_together(error: CheckpointError | None, write: CheckpointWrite, device: torch.device) -> None:
    """Raise the first rank's error on every rank, so that none waits for it or calls its part complete."""
    if not _all_ranks(error is None, device):
        write.abandon()
        words: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(words, None if error is None else str(error))
        raise CheckpointError(next(told for told in words if told is not None)) from error


def link_latest(root: Path, name: str) -> None:
    """Point ``checkpoints/latest`` at a checkpoint, atomically."""
    temporary = root / f".{LATEST}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    temporary.replace(root / LATEST)


def prune(root: Path, config: CheckpointConfig) -> None:
    """Remove checkpoints that are not among the newest ``keep_last``, the best ``keep_best`` or those to be merged.

    Raises:
        CheckpointError, OSError: one is damaged or cannot be removed.
    """
    checkpoints = list_checkpoints(root)
    keep = set(checkpoints[-config.keep_last :])
    best = [(ALL_STAGES, config.keep_best), (NEWEST_STAGE, config.merge_at_end)]
    for stage, count in best:
        if count:
            keep |= {candidate.path for candidate in find_candidates(root, config.best_metric, stage)[:count]}
    for path in checkpoints:
        if path not in keep:
            remove_checkpoint(path)
