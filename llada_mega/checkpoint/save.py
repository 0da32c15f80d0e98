"""Writing a checkpoint: the tensors of all ranks, the small files, the marker, then its name."""

from __future__ import annotations

import dataclasses
import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llada_mega.checkpoint import storage
from llada_mega.checkpoint.checkpoint import FORMAT, MARKER, MODEL_FILE, STATE_FILE, TOKENIZER_DIRECTORY
from llada_mega.checkpoint.directory import NewDirectory, write_json
from llada_mega.config.model import ModelConfig
from llada_mega.data.tokenizer import TOKENIZER_FILES
from llada_mega.errors import CheckpointError


class CheckpointWrite:
    """One checkpoint on its way to disk: ``start`` -> ``write`` (any thread) -> ``finish``, or ``abandon``.

    ``start`` and ``finish`` are collective: with several ranks, call them on all with a barrier between the phases
    (``start`` | barrier | ``write`` | barrier | ``finish``). The caller owns the barriers and calls ``abandon`` after
    an error, this class owns the files.
    """

    def __init__(self, directory: Path, *, rank: int = 0, world_size: int = 1) -> None:
        self.directory = directory
        self.rank, self.world_size = rank, world_size
        self._new = NewDirectory(directory)

    def start(
        self, sharded_state: dict[str, Any], sum_over_ranks: Callable[[int], int] = lambda number: number
    ) -> None:
        """Take the snapshot and make room. Raises CheckpointError (no space, no permission).

        ``sum_over_ranks`` adds up a number over all ranks, of which each calls it once.
        """
        self._tensors, self._index = storage.snapshot(sharded_state)
        needed = sum_over_ranks(storage.stored_bytes(self._tensors))
        if self.rank:
            return
        self._new.start()
        free = shutil.disk_usage(self._new.partial).free
        if free < needed:
            self.abandon()
            raise CheckpointError(
                f"cannot write checkpoint {self.directory}: it needs {needed / 2**30:.2f} GiB, the disk has "
                f"{free / 2**30:.2f} GiB free; free some space or lower checkpoint.keep_last"
            )

    def write(self) -> None:
        """Write this rank's tensors. Raises CheckpointError: call :meth:`abandon`. Older checkpoints are untouched."""
        try:
            storage.write(self._new.partial, self.rank, self._tensors, self._index)
        except OSError as error:
            reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
            raise CheckpointError(
                f"checkpoint {self.directory} was not written: {reason}; older checkpoints are intact"
            ) from error
        finally:
            self._tensors = {}

    def finish(self, model_config: ModelConfig, state: dict[str, Any], tokenizer_dir: Path | None = None) -> None:
        """Write the small files, then the marker, then give the directory its name (rank 0 only)."""
        if self.rank:
            return
        try:
            if tokenizer_dir is not None:
                copy_tokenizer(tokenizer_dir, self._new.partial / TOKENIZER_DIRECTORY)
            seal(self._new, model_config, state, self.world_size)
        except OSError as error:
            raise CheckpointError(f"checkpoint {self.directory} was not written: {error.strerror or error}") from error

    def abandon(self) -> None:
        """Remove what was written so far (rank 0 only)."""
        if self.rank == 0:
            self._new.discard()


def seal(new: NewDirectory, model_config: ModelConfig, state: dict[str, Any], parts: int) -> None:
    """Complete a directory that has its tensors, and its tokenizer if any, and give it its name. Raises OSError.

    Args:
        parts: number of files of tensors.
    """
    write_json(new.partial / MODEL_FILE, dataclasses.asdict(model_config))
    write_json(new.partial / STATE_FILE, state)
    small = [path for path in new.partial.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    files = {str(path.relative_to(new.partial)): storage.sha256(path) for path in sorted(small) if path != new.plan}
    write_json(new.partial / MARKER, {"format": FORMAT, "parts": parts, "files": files})
    new.publish()


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer of a Hugging Face directory, with the two files that may name its special tokens."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (*TOKENIZER_FILES, "config.json", "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
