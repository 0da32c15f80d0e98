"""Runs torchrun and passes signals on to its ranks."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Mapping, Sequence
from types import FrameType

import psutil

FORWARDED = (signal.SIGUSR1, signal.SIGTERM)
# Ranks that are still starting ignore SIGUSR1 and die of SIGTERM; later ones only note it once more.
REPEAT_SECONDS = 10.0


class TorchRun:
    """One torchrun of this node.

    SIGUSR1 and SIGTERM go to the ranks, which save and end, not to torchrun, which would kill them after 30 seconds.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.command, self.environment = list(command), dict(environment)
        self.received: signal.Signals | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Start it, wait for it, and return its status."""
        before = {number: signal.signal(number, self._handle) for number in FORWARDED}
        try:
            # Slurm signals every process of a step: torchrun, and ranks that do not listen yet, must survive SIGUSR1.
            self._process = subprocess.Popen(
                self.command,
                env=self.environment,
                preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
            )
            while True:
                try:
                    return self._process.wait(REPEAT_SECONDS)
                except subprocess.TimeoutExpired:
                    self._forward()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._forward()

    def _forward(self) -> None:
        if self.received is None or self._process is None:
            return
        children: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            children = psutil.Process(self._process.pid).children()
        for child in children:
            with contextlib.suppress(psutil.Error):  # so has this one; the others are still to hear it
                if "RANK" in child.environ():
                    child.send_signal(self.received)
