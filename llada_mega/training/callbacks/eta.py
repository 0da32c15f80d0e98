"""When a stage and a run will be done."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from llada_mega.diffusion.curriculum import Curriculum, ResolvedStage

RECENT = 20  # rows that the pace is taken from


class Eta:
    """Remaining seconds from the pace of the last rows, validation and checkpoints between them included.

    Stages in which a step has other positions to work on have a pace of their own: what it was in this process, else
    the current one in proportion to the positions.

    Args:
        curriculum: stages in samples.
        global_batch_size: samples a step.
        last_step: where the run ends.
        clock: seconds.
    """

    def __init__(
        self,
        curriculum: Curriculum,
        global_batch_size: int,
        last_step: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._curriculum, self._size, self._last_step, self._clock = curriculum, global_batch_size, last_step, clock
        self._rows: deque[tuple[int, float]] = deque(maxlen=RECENT + 1)
        self._positions = 0  # of a sample, at the newest row
        self._pace: dict[int, float] = {}  # seconds a step by positions of a sample

    def begin(self, step: int) -> None:
        """Steps after ``step`` are about to be made."""
        self._rows.clear()
        self._rows.append((step, self._clock()))

    def update(self, step: int) -> None:
        """``step`` was made."""
        if step <= self._rows[-1][0]:  # the run was rolled back
            self.begin(step)
            return
        positions = sample_positions(self._curriculum.stage_at((step - 1) * self._size))
        if positions != self._positions:  # a pace over both would be that of neither
            self._positions = positions
            while len(self._rows) > 1:
                self._rows.popleft()
        self._rows.append((step, self._clock()))
        (first, began), (last, now) = self._rows[0], self._rows[-1]
        if last > first:
            self._pace[positions] = (now - began) / (last - first)

    def stage_seconds(self, step: int) -> float | None:
        """From ``step`` to the end of the next step's stage, or of the run if that is earlier; None: not known yet."""
        return self._seconds(step, [self._curriculum.stage_at(step * self._size)])

    def run_seconds(self, step: int) -> float | None:
        """From ``step`` to the end of the run."""
        return self._seconds(step, self._curriculum.stages)

    def _seconds(self, step: int, stages: Sequence[ResolvedStage]) -> float | None:
        if self._positions not in self._pace:
            return None
        total = 0.0
        for stage in stages:
            first, end = stage.start_sample // self._size, stage.end_sample // self._size
            steps = min(end, self._last_step) - max(first, step)
            positions = sample_positions(stage)
            estimate = self._pace[self._positions] * positions / self._positions
            total += max(steps, 0) * self._pace.get(positions, estimate)
        return total


def sample_positions(stage: ResolvedStage) -> int:
    """What the model works on for one sample, about: with blocks the clean tokens are there beside the noisy ones."""
    return stage.sequence_length * (2 if stage.layout == "bdlm" else 1)
