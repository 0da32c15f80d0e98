"""Progress of work that is counted in bytes: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_LOG_SECONDS = 30.0


@contextmanager
def bytes_progress(action: str, *, enabled: bool = True) -> Iterator[Callable[[int], Callable]]:
    """Yields a function that takes the bytes that this process has to write and returns one that counts those done.

    Args:
        action: what is done, in a word.
        enabled: False shows nothing.
    """
    console = Console(stderr=True, quiet=not enabled)
    columns = (TextColumn(action), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:

        def begin(total_bytes: int) -> Callable[[int], None]:
            task = bar.add_task("", total=total_bytes)
            done, began = 0, time.monotonic()
            logged = began

            def advance(count: int) -> None:
                nonlocal done, logged
                done, now = done + count, time.monotonic()
                bar.advance(task, count)
                if bar.disable and now - logged >= _LOG_SECONDS:
                    logged = now
                    left = max(0.0, (total_bytes - done) * (now - began) / max(done, 1))
                    console.print(f"{action}: {decimal(done)} of {decimal(total_bytes)}, about {left:.0f} s left")

            return advance

        yield begin
