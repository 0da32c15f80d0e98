"""One run directory, one run: two writers would mix their metrics and overwrite each other's checkpoints."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from llada_mega.errors import TrainingError
from llada_mega.ranks import launched_rank

logger = logging.getLogger("llada_mega")
LOCK_FILE = "lock"
PATIENCE_SECONDS = 120.0  # ranks whose launcher was killed save and go: a new start waits for them
_POLL_SECONDS = 0.5


@contextlib.contextmanager
def only_run_in(run_dir: Path, patience: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Hold ``RUN/lock`` on the first rank; it goes with the process, however that ends.

    Where the file system knows no locks there is none.

    Raises:
        TrainingError: another process held it for ``patience`` seconds.
    """
    if launched_rank():
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK_FILE).open("a+") as file:
        _acquire(file, run_dir, patience)
        yield


def _acquire(file: TextIO, run_dir: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    waits = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return
        file.seek(0)
        holder = file.read().strip()
        if time.monotonic() >= deadline:
            raise TrainingError(
                f"another process trains in {run_dir} ({holder}); end it, or use another run.name"
            ) from None
        if not waits:
            logger.warning(f"waiting for the process that still trains in {run_dir} ({holder})")
        waits = True
        time.sleep(_POLL_SECONDS)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
