"""Names ranks that the others wait for, step after step."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llada_mega.training.callback import Callback
from llada_mega.training.state import StepMeasurement
from llada_mega.training.timeline import PHASES
from llada_mega.training.trainer import Trainer

SLOW = 1.5  # times as long at work as half of the ranks
PATIENCE = 5  # logged rows in a row


class StragglerCallback(Callback):
    """Compares what share of the time the ranks work, where the others spend theirs in collectives, waiting.

    Steps take equally long on all ranks; a slow one is told by its small share of communication. Ranks that talk inside
    the forward pass (tensor and pipeline parallelism) wait there too and are slow together: the warning names them all.
    Shares are exchanged with a row and read in the next step, where the host has just waited for the device anyway.
    """

    name = "stragglers"

    def __init__(self) -> None:
        self._gathered: list[Tensor] | None = None  # float32 [phases] of each rank
        self._slow: tuple[int, ...] = ()
        self._rows = 0

    def on_log(self, trainer: Trainer, row: dict[str, Any]) -> None:
        shares = row.get("time_share")
        groups = trainer.step.groups
        if not shares or groups.world_size == 1:
            return
        own = torch.tensor([shares.get(phase, 0.0) for phase in PHASES], device=groups.device)
        self._gathered = [torch.empty_like(own) for _ in range(groups.world_size)]
        dist.all_gather(self._gathered, own)

    def accept_step(self, trainer: Trainer, measured: StepMeasurement) -> bool:
        if self._gathered is not None:
            shares = [dict(zip(PHASES, values.tolist(), strict=True)) for values in self._gathered]
            self._gathered = None
            self._judge(trainer, slow_ranks(shares))
        return True

    def _judge(self, trainer: Trainer, found: dict[int, str]) -> None:
        ranks = tuple(found)
        self._rows = self._rows + 1 if ranks and ranks == self._slow else int(bool(ranks))
        self._slow = ranks
        if self._rows == PATIENCE:
            told = ", ".join(f"rank {rank} (in {phase})" for rank, phase in found.items())
            trainer.warn(f"slow: {told}; the others wait for it")


def slow_ranks(shares: Sequence[dict[str, float]]) -> dict[int, str]:
    """Ranks that work much longer than half of them, and the phase in which they do."""
    at_work = [1.0 - own["communication"] for own in shares]
    usual = statistics.median_low(at_work)
    found = {}
    for rank, own in enumerate(shares):
        if at_work[rank] > SLOW * usual:
            usually = {phase: statistics.median_low(other[phase] for other in shares) for phase in PHASES}
            found[rank] = max((p for p in PHASES if p != "communication"), key=lambda p: own[p] - usually[p])
    return found
