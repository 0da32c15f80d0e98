"""A directory that is there as a whole or not at all, whenever its writer is killed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from llada_mega.errors import CheckpointError


class NewDirectory:
    """``NAME`` on its way: everything is written to ``.NAME.partial``, which :meth:`publish` gives its name.

    A directory without a leading dot is therefore complete. Where ``NAME`` exists already it stays until the new one is
    whole; between two renames neither has the name, and :func:`recover` puts the old one back should the process die
    just there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.partial")
        self.plan = self.partial / "plan.json"

    def start(self, plan: dict[str, Any] | None = None) -> bool:
        """Make the partial directory; keep what is in it when it was begun with the same ``plan``.

        Returns:
            whether something was kept.
        Raises:
            CheckpointError: it cannot be written.
        """
        recover(self.path)
        try:
            if plan is not None and self._begun_with(plan):
                return True
            self.discard()
            self.partial.mkdir(parents=True)
            if plan is not None:
                write_json(self.plan, plan)
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror or error}") from error
        return False

    def publish(self) -> None:
        """Give the directory its name, in place of an older one. Raises OSError."""
        self.plan.unlink(missing_ok=True)
        replaced = _replaced(self.path)
        shutil.rmtree(replaced, ignore_errors=True)
        if self.path.exists():
            self.path.replace(replaced)
        self.partial.replace(self.path)
        shutil.rmtree(replaced, ignore_errors=True)

    def discard(self) -> None:
        """Remove what was written so far."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def _begun_with(self, plan: dict[str, Any]) -> bool:
        try:
            return json.loads(self.plan.read_text()) == json.loads(json.dumps(plan))
        except (OSError, ValueError):
            return False


def recover(path: Path) -> None:
    """Put an older directory back that a process has set aside when it died before the new one had the name."""
    if not path.exists() and _replaced(path).is_dir():
        _replaced(path).replace(path)


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
