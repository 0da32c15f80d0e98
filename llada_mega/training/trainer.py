"""The loop: one screen; everything else is a callback."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from llada_mega.config.schema import Config
from llada_mega.data.batch import Batch
from llada_mega.diffusion.curriculum import Curriculum, ResolvedStage
from llada_mega.training.callback import Callback
from llada_mega.training.state import StepMeasurement, TrainState
from llada_mega.training.step import TrainStep

logger = logging.getLogger(__name__)


class Trainer:
    """Runs a curriculum.

    Args:
        config: the run's validated configuration.
        step: one optimizer step over a global batch; holds the model and the optimizer.
        curriculum: stages resolved to samples.
        contract: what a resumed run must have in common with this one.
        state: where the run stands (fresh, or read from a checkpoint).
        batches: this data-parallel rank's micro-batches, one list a step, starting at ``state.consumed_samples``.
        callbacks: features, in the order in which their hooks run.
        writes_files: True on the one rank that writes files.
    """

    def __init__(
        self,
        *,
        config: Config,
        step: TrainStep,
        curriculum: Curriculum,
        contract: dict[str, Any],
        state: TrainState,
        batches: Iterator[list[Batch]],
        callbacks: Sequence[Callback],
        writes_files: bool = True,
    ) -> None:
        self.config, self.step, self.curriculum, self.state = config, step, curriculum, state
        self.batches, self.callbacks, self.writes_files = batches, list(callbacks), writes_files
        self.contract = contract
        total_steps = curriculum.total_samples // config.trainer.global_batch_size
        self.stop_reason: str | None = None
        self.checkpoint_is_due = False  # set by a callback that wants one now, besides those of checkpoint.every
        self.last_step = min(total_steps, config.trainer.max_steps or total_steps)

    @property
    def stage(self) -> ResolvedStage:
        """The stage of the next step."""
        return self.curriculum.stage_at(self.state.consumed_samples)

    def fit(self) -> None:
        """Train until the curriculum or ``trainer.max_steps`` ends, or :meth:`stop` was called."""
        try:
            self._call("on_train_begin")
            stage: ResolvedStage | None = None
            while not self.is_finished and self.stop_reason is None:
                if stage != self.stage:
                    stage = self.stage
                    self._call("on_stage_begin", stage)
                self._call("on_step_begin")
                with self.step.timeline.phase("data"):
                    batches = next(self.batches)
                self._call("on_batches", batches)
                measured, applied = self.step(
                    batches,
                    learning_rate=self.curriculum.learning_rate(self.state.consumed_samples),
                    embedding_noise_std=self.embedding_noise_std(),
                    accept=self._accept,
                )
                self.state.step += 1
                self.state.consumed_samples += self.config.trainer.global_batch_size
                self.state.consumed_tokens += measured.num_tokens
                self._call("on_step_end", measured, applied)
            self._call("on_train_end" if self.is_finished else "on_stop")
        finally:
            for callback in self.callbacks:
                callback.close()

    @property
    def is_finished(self) -> bool:
        """True after the last step."""
        return self.state.step >= self.last_step

    def stop(self, reason: str) -> None:
        """End the run after the step at hand, in a way that lets it go on later. To be called on all ranks alike."""
        self.stop_reason = reason

    def embedding_noise_std(self) -> float:
        """Standard deviation of the noise on MASK embeddings at the next step."""
        return self.curriculum.embedding_noise_std(self.state.consumed_samples, self.state.embedding_rms)

    def log(self, row: dict[str, Any]) -> None:
        """Hand a row of metrics to every sink."""
        self._call("on_log", row)

    def warn(self, message: str, step: int | None = None) -> None:
        """Tell the user, and leave ``{"step", "warning"}`` in the metrics for the report."""
        if self.writes_files:
            logger.warning(message)
        self.log({"step": self.state.step if step is None else step, "warning": message})

    def _accept(self, measured: StepMeasurement) -> bool:
        verdicts = [callback.accept_step(self, measured) for callback in self.callbacks]  # every callback is asked
        return all(verdicts)

    def _call(self, hook: str, *args: Any) -> None:
        for callback in self.callbacks:
            with self.step.timeline.phase(callback.phase):
                getattr(callback, hook)(self, *args)
