"""The hooks of the loop: features hang on these, the loop itself stays short."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llada_mega.training.timeline import OTHER

if TYPE_CHECKING:
    from llada_mega.data.batch import Batch
    from llada_mega.diffusion.curriculum import ResolvedStage
    from llada_mega.training.state import StepMeasurement
    from llada_mega.training.trainer import Trainer


class Callback:
    """One feature of a run. Every hook runs on every rank, in the order of the callback list.

    A callback with state returns it as JSON values from :meth:`state_dict`; it is stored under :attr:`name` in each
    checkpoint and handed back to :meth:`load_state_dict` on resume.
    """

    name = ""
    phase = OTHER  # what its time is counted as (llada_mega.training.timeline.PHASES)

    def on_train_begin(self, trainer: Trainer) -> None:
        """Once, after a resume, before the first step."""

    def on_stage_begin(self, trainer: Trainer, stage: ResolvedStage) -> None:
        """Before the first step in a stage, and once at the start of the run or resume."""

    def on_step_begin(self, trainer: Trainer) -> None:
        """Before the step's data is asked for."""

    def on_batches(self, trainer: Trainer, batches: list[Batch]) -> None:
        """This data-parallel rank's whole micro-batches of the step, before the forward pass."""

    def accept_step(self, trainer: Trainer, measured: StepMeasurement) -> bool:
        """After the backward pass, before the optimizer. False leaves the weights as they are."""
        return True

    def on_step_end(self, trainer: Trainer, measured: StepMeasurement, applied: bool) -> None:
        """After the optimizer; ``trainer.state`` already counts this step."""

    def on_log(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """A row for metrics.jsonl and the other sinks."""

    def on_train_end(self, trainer: Trainer) -> None:
        """After the last step of the run."""

    def on_stop(self, trainer: Trainer) -> None:
        """In place of :meth:`on_train_end` when the run was asked to stop before its last step."""

    def close(self) -> None:
        """Always called, also after an error: release files, threads and progress bars."""

    def state_dict(self) -> dict[str, Any]:
        """JSON values to store in a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
