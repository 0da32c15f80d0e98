"""Progress of a corpus build on standard error: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_LOG_SECONDS = 30.0


class BuildProgress:
    """Shows bytes read of all bytes, documents, tokens, tokens per second and the time that remains."""

    def __init__(self, total_bytes: int, enabled: bool) -> None:
        self._console = Console(stderr=True, quiet=not enabled)
        self._bar = Progress(
            TextColumn("tokenizing"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[counts]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (enabled and self._console.is_terminal),
        )
        self._total = total_bytes
        self._task = self._bar.add_task("", total=total_bytes, counts="")
        self._start = self._logged = time.monotonic()
        self._reused = 0

    def __enter__(self) -> BuildProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def reuse(self, num_bytes: int) -> None:
        """Count input that an earlier build has finished; it says nothing about the rate."""
        self._reused += num_bytes

    def update(self, bytes_read: int, documents: int, tokens: int, new_tokens: int) -> None:
        """Show where the build stands; ``new_tokens`` were made by this process."""
        now = time.monotonic()
        elapsed = max(now - self._start, 1e-3)
        counts = f"{documents:,} documents, {tokens:,} tokens, {new_tokens / elapsed:,.0f} tokens/s"
        self._bar.update(self._task, completed=bytes_read, counts=counts)
        if self._bar.disable and now - self._logged >= _LOG_SECONDS:
            self._logged = now
            new_bytes = max(bytes_read - self._reused, 1)
            remaining = (self._total - bytes_read) * elapsed / new_bytes
            self.note(f"{bytes_read / max(self._total, 1):.0%} read, {counts}, about {remaining:.0f} s left")

    def note(self, message: str) -> None:
        """Print a line above the bar."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)
