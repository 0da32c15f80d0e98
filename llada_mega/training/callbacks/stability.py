"""What to do with a step that is not finite or whose loss jumps."""

from __future__ import annotations

import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

from llada_mega.checkpoint.checkpoint import list_checkpoints, read_state
from llada_mega.config.training import StabilityConfig
from llada_mega.errors import TrainingError
from llada_mega.training.callback import Callback
from llada_mega.training.resume import newest_intact, restore
from llada_mega.training.state import StepMeasurement
from llada_mega.training.trainer import Trainer

# A MASK embedding below this share of the table's RMS is what makes a conversion explode (arXiv 2512.15745, section 3).
SMALL_MASK_EMBEDDING = 0.1


class StabilityCallback(Callback):
    """Policies ``stop | skip | rollback | warn`` for non-finite and spiking steps.

    A spike is a cross entropy per masked token above ``spike_factor`` times the median of the last ``spike_window``
    accepted steps of the same stage. ``skip`` leaves weights and optimizer as they are and goes on with the next data;
    more than ``max_skipped`` skips in a row stop the run.

    ``rollback`` takes weights and optimizer from the newest intact checkpoint and leaves the position where it is: the
    data from that checkpoint up to and with the bad step are skipped, what comes next is what would have come anyway.
    A checkpoint is written at once, so that a restart does not go back into the bad data. More than ``max_rollbacks``
    of them, without ``spike_window`` good steps between, stop the run.
    """

    name = "stability"

    def __init__(self, config: StabilityConfig) -> None:
        self.config = config
        self._history: deque[float] = deque(maxlen=config.spike_window)
        self._skipped = 0
        self._rollbacks = 0  # in a row
        self._good_steps = 0  # since the last of them
        self._problem: str | None = None  # that the step at hand is to be rolled back for
        self._noise_was_on = False

    def on_stage_begin(self, trainer: Trainer, stage: Any) -> None:
        if trainer.state.consumed_samples == stage.start_sample:
            self._history.clear()  # another block size is another loss

    def accept_step(self, trainer: Trainer, measured: StepMeasurement) -> bool:
        self._check_end_of_noise(trainer, measured.mask_embedding_rms)
        problem, policy = self._judge(trainer, measured)
        if problem is None:
            self._history.append(measured.ce_masked)
            self._skipped = 0
            self._good_steps += 1
            if self._good_steps >= self.config.spike_window:
                self._rollbacks = 0
            return True
        step = trainer.state.step + 1
        if policy == "stop":
            raise TrainingError(f"step {step}: {problem}; the run stops, the last checkpoint is intact")
        trainer.warn(f"{problem}; policy {policy}", step)
        if policy == "warn":
            return True
        if policy == "rollback":
            self._problem = problem
            return False
        self._skipped += 1
        if self._skipped > self.config.max_skipped:
            raise TrainingError(f"step {step}: {self._skipped} steps in a row were skipped; the run stops")
        return False

    def on_step_end(self, trainer: Trainer, measured: StepMeasurement, applied: bool) -> None:
        if not applied:
            trainer.state.skip(trainer.state.consumed_samples - trainer.config.trainer.global_batch_size)
        if self._problem is not None:
            problem, self._problem = self._problem, None
            self._roll_back(trainer, problem)

    def _roll_back(self, trainer: Trainer, problem: str) -> None:
        state = trainer.state
        if self._rollbacks >= self.config.max_rollbacks:
            raise TrainingError(
                f"step {state.step}: {problem}; {self._rollbacks} rollbacks in a row did not help, the run stops"
            )
        root = Path(trainer.config.run.dir) / "checkpoints"
        if not list_checkpoints(root):
            raise TrainingError(f"step {state.step}: {problem}; there is no checkpoint to roll back to, the run stops")
        checkpoint, passed_over = newest_intact(root, trainer.step.groups)
        for line in passed_over:
            trainer.warn(line)
        saved = read_state(checkpoint)
        rollbacks = self._rollbacks + 1
        position = restore(trainer.step, checkpoint, saved, [self])
        self._rollbacks, self._good_steps = rollbacks, 0
        state.skip(position.consumed_samples)
        trainer.checkpoint_is_due = True
        trainer.warn(
            f"weights and optimizer are back at step {position.step}; samples {position.consumed_samples} to "
            f"{state.consumed_samples} are skipped"
        )

    def _check_end_of_noise(self, trainer: Trainer, rms: float) -> None:
        noise, floor = trainer.embedding_noise_std(), SMALL_MASK_EMBEDDING * trainer.state.embedding_rms
        if self._noise_was_on and noise == 0.0 and rms < floor:
            trainer.warn(
                f"the embedding noise ends while the MASK embedding is still small (RMS {rms:.2g}, a tenth of the "
                f"table's is {floor:.2g}); gradients may explode: lengthen "
                "curriculum.stages[*].embedding_noise.decay_tokens",
            )
        self._noise_was_on = noise > 0.0

    def _judge(self, trainer: Trainer, measured: StepMeasurement) -> tuple[str | None, str]:
        if not (math.isfinite(measured.loss) and math.isfinite(measured.grad_norm)):
            text = f"loss {measured.loss:.4g}, gradient norm {measured.grad_norm:.4g} are not finite"
            if measured.mask_embedding_rms < SMALL_MASK_EMBEDDING * trainer.state.embedding_rms:
                text += (
                    "; the MASK embedding is almost zero, which makes this happen:"
                    " set curriculum.stages[0].embedding_noise.decay_tokens"
                )
            return text, self.config.nonfinite
        if len(self._history) * 2 >= self.config.spike_window:
            median = statistics.median(self._history)
            ce, factor = measured.ce_masked, self.config.spike_factor
            if ce > factor * median:
                return f"cross entropy {ce:.3g} is above {factor:g} x the median {median:.3g}", self.config.spike
        return None, ""

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": list(self._history),
            "skipped": self._skipped,
            "rollbacks": self._rollbacks,
            "good_steps": self._good_steps,
            "noise_was_on": self._noise_was_on,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._history.clear()
        self._history.extend(state["history"])
        self._skipped, self._noise_was_on = state["skipped"], state["noise_was_on"]
        self._rollbacks, self._good_steps = state.get("rollbacks", 0), state.get("good_steps", 0)
