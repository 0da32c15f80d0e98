"""Where the time of a run goes: one line of marks, cut into phases.

Every change of phase leaves one mark, a reading of the host's clock on a CPU and an event in the current stream on a
GPU, and the time between two marks belongs to the phase that was on. So phases exclude each other, their sum is all the
time there was, and what the device does while the host is busy elsewhere is not counted twice: on a GPU, ``data`` is
the time for which the device stood still because there was no batch, not the time that the host spent on it.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.autograd.profiler import record_function

OTHER = "other"
PHASES = ("data", "forward", "backward", "communication", "optimizer", "validation", "checkpoint", OTHER)

# Megatron-Core's names of the pieces that are one phase here. What has no entry belongs to the phase around it.
_MEGATRON = {
    "forward-compute": "forward",
    "backward-compute": "backward",
    "all-grads-sync": "communication",
    "conditional-embedder-grads-all-reduce": "communication",
    "non-tensor-parallel-grads-all-reduce": "communication",
    "embedding-grads-all-reduce": "communication",
    "params-all-gather": "communication",
}


class Mark(Protocol):
    """A point on the line."""

    def is_past(self) -> bool:
        """False while the device has not come to it."""

    def seconds_since(self, earlier: Any) -> float:
        """Time from an earlier mark to this one; both are past."""


class HostMark:
    """Now, by the host's clock."""

    def __init__(self) -> None:
        self.time = time.perf_counter()

    def is_past(self) -> bool:
        """Always."""
        return True

    def seconds_since(self, earlier: HostMark) -> float:
        """Seconds between the two."""
        return self.time - earlier.time


class DeviceMark:
    """When the current CUDA stream comes to this point. Asking whether it has does not wait for it."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def is_past(self) -> bool:
        """True once the device has come here."""
        return self.event.query()

    def seconds_since(self, earlier: DeviceMark) -> float:
        """Seconds between the two on the device."""
        return earlier.event.elapsed_time(self.event) / 1e3


class Timeline:
    """Seconds by phase, of this rank.

    Also stands in for Megatron-Core's ``timers`` (``config.timers``), which waits for the device at every start and
    stop: ``timeline(name).start()`` and ``.stop()`` enter and leave the phase that Megatron's name belongs to.

    Args:
        mark: makes a mark of now: ``HostMark`` or ``DeviceMark``.
    """

    def __init__(self, mark: type[Mark]) -> None:
        self._mark = mark
        self._stack = [OTHER]
        self._ranges: list[record_function | None] = []
        self._open: deque[tuple[Mark, str]] = deque([(mark(), OTHER)])  # marks, and the phase that each began
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @classmethod
    def on(cls, device: torch.device) -> Timeline:
        """The timeline of a device."""
        return cls(DeviceMark if device.type == "cuda" else HostMark)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time inside belongs to ``name``, less what inner phases take. Also a range in a profile."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name: str) -> None:
        """Begin a phase inside the current one."""
        range_ = None if name == self._stack[-1] else record_function(f"llada_mega.{name}")
        if range_ is not None:
            range_.__enter__()
        self._ranges.append(range_)
        self._stack.append(name)
        self._change(self._stack[-2])

    def leave(self) -> None:
        """End the current phase; the one around it goes on."""
        left = self._stack.pop()
        self._change(left)
        if (range_ := self._ranges.pop()) is not None:
            range_.__exit__(None, None, None)

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call, as far as the device has come; the rest is in the next answer.

        Waits for nothing.
        """
        self._open.append((self._mark(), self._stack[-1]))
        self._settle()
        taken, self._seconds = self._seconds, defaultdict(float)
        return {phase: taken[phase] for phase in PHASES}

    def _change(self, previous: str) -> None:
        if self._stack[-1] != previous:
            self._open.append((self._mark(), self._stack[-1]))
            self._settle()

    def _settle(self) -> None:
        """Add up what lies between marks that are past; the newest of them stays as the beginning of what follows."""
        while len(self._open) > 1 and self._open[1][0].is_past():
            begin, phase = self._open.popleft()
            self._seconds[phase] += self._open[0][0].seconds_since(begin)

    def __call__(self, name: str, log_level: int | None = None) -> _MegatronTimer:
        """The timer that Megatron-Core asks for by ``name``."""
        phase = "communication" if name.endswith(("-send", "-recv")) else _MEGATRON.get(name)
        return _MegatronTimer(self, phase)


class _MegatronTimer:
    """One piece of Megatron-Core's work."""

    def __init__(self, timeline: Timeline, phase: str | None) -> None:
        self._timeline, self._phase = timeline, phase

    def start(self, barrier: bool = False) -> None:
        """Enter the phase. ``barrier`` is not heeded: ranks that wait for each other here would not be the run."""
        if self._phase is not None:
            self._timeline.enter(self._phase)

    def stop(self, barrier: bool = False) -> None:
        """Leave it."""
        if self._phase is not None:
            self._timeline.leave()
