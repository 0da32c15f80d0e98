"""A directory that is there as a whole or not at all, whenever its writer is killed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

from llada_mega.errors import CheckpointError

_ATTEMPTS = 3  # to publish, while a reader puts the older directory back


class NewDirectory:
    """``NAME`` on its way: everything is written to ``.NAME.partial``, which :meth:`publish` gives its name.

    A directory without a leading dot is therefore complete. Where ``NAME`` exists already it stays until the new one is
    whole; between two renames neither has the name, and :func:`recover` puts the old one back should the process die
    just there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path = path.absolute()  # "." has no name
        self.partial = path.with_name(f".{path.name}.partial")
        self.plan = self.partial / "plan.json"

    def start(self, plan: dict[str, Any] | None = None) -> None:
        """Make the partial directory; keep what is in it when it was begun with the same ``plan``.

        Raises:
            CheckpointError: it cannot be written.
        """
        recover(self.path)
        try:
            if plan is not None and self.is_begun_with(plan):
                for unfinished in self.partial.rglob(".*.tmp"):
                    unfinished.unlink()
                return
            self.discard()
            self.partial.mkdir(parents=True)
            if plan is not None:
                write_json(self.plan, plan)
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror or error}") from error

    def is_begun_with(self, plan: dict[str, Any]) -> bool:
        """True when :meth:`start` was called with an equal ``plan``, by whichever process."""
        try:
            return json.loads(self.plan.read_text()) == json.loads(json.dumps(plan))
        except (OSError, ValueError):
            return False

    def publish(self) -> None:
        """Give the directory its name, in place of an older one. Raises OSError.

        All that is in it is on the disk by then: a name that outlives a power cut is one of a whole directory.
        """
        self.plan.unlink(missing_ok=True)
        for path in self.partial.rglob("*"):
            sync(path)
        sync(self.partial)
        replaced = _replaced(self.path)
        for attempt in range(1, _ATTEMPTS + 1):
            shutil.rmtree(replaced, ignore_errors=True)
            if self.path.exists():
                self.path.replace(replaced)
            try:
                self.partial.replace(self.path)
                break
            except OSError:
                if attempt == _ATTEMPTS or not self.path.exists():
                    raise
        sync(self.path.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    def discard(self) -> None:
        """Remove what was written so far."""
        shutil.rmtree(self.partial, ignore_errors=True)


def recover(path: Path) -> None:
    """Mend what a process has left that died while it gave a directory its name.

    The older directory comes back when the new one had not got the name yet, and goes when it had.
    """
    replaced = _replaced(path.absolute())
    if not replaced.is_dir():
        return
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        return
    with contextlib.suppress(OSError):  # another process does the same
        replaced.replace(path)


def sync(path: Path) -> None:
    """Return when the disk holds the content of a file, or the names in a directory. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot do so with directories
            raise
    finally:
        os.close(descriptor)


def check_output(path: Path, *, is_ours: bool) -> None:
    """Refuse to write where something is.

    Args:
        is_ours: what is there may be replaced.
    Raises:
        CheckpointError: it exists, is not empty and may not be replaced.
    """
    if path.exists() and not is_ours and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists and is not empty; choose another output or remove it")


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one atomic step."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    temporary.replace(path)


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")
