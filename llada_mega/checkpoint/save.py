"""Writing a checkpoint: the tensors of all ranks, the small files, the marker, then its name."""

from __future__ import annotations

import dataclasses
import errno
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llada_mega.checkpoint import storage
from llada_mega.checkpoint.checkpoint import (
    FORMAT,
    MARKER,
    MODEL_FILE,
    STATE_FILE,
    TOKENIZER_DIRECTORY,
    marker_digest,
)
from llada_mega.checkpoint.directory import NewDirectory, write_json
from llada_mega.checkpoint.streaming import Progress, agree_on_plan, write_files
from llada_mega.checkpoint.weights import plan_parts
from llada_mega.config.model import ModelConfig
from llada_mega.data.tokenizer import TOKENIZER_FILES
from llada_mega.errors import CheckpointError
from llada_mega.models.hf_mapping import ModelTensor
from llada_mega.parallel.workers import Workers


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
        self,
        sharded_state: dict[str, Any],
        sum_over_ranks: Callable[[int], int] = lambda number: number,
        memory: storage.Snapshot | None = None,
    ) -> None:
        """Take the snapshot and make room. Raises CheckpointError (no space, no permission).

        ``sum_over_ranks`` adds up a number over all ranks, of which each calls it once. ``memory`` is an earlier
        snapshot of the same run, which the new one overwrites.
        """
        self._tensors, self._index = storage.snapshot(sharded_state, memory)
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
            seal(self._new, model_config, state)
        except OSError as error:
            raise CheckpointError(f"checkpoint {self.directory} was not written: {error.strerror or error}") from error

    def abandon(self) -> None:
        """Remove what was written so far (rank 0 only)."""
        if self.rank == 0:
            self._new.discard()


def write_checkpoint(
    output: Path,
    plan: dict[str, Any],
    config: ModelConfig,
    dtype: torch.dtype,
    make: Callable[[ModelTensor], Iterable[Tensor]],
    *,
    state: dict[str, Any],
    tokenizer_files: dict[str, str],
    workers: Workers,
    progress: Progress,
) -> None:
    """Write a checkpoint without a model, tensor by tensor; collective over ``workers``.

    Args:
        output: the directory; whatever is there is replaced once the new one is whole.
        plan: JSON values that fix every byte; an interrupted write with an equal plan goes on.
        dtype: of the weights.
        make: pieces that, one after the other along the first axis, are a tensor.
        state: content of ``state.json``.
        tokenizer_files: file name -> text.
    Raises:
        CheckpointError: it cannot be written, or the processes do not mean the same checkpoint.
    """
    new = NewDirectory(output)
    try:
        if workers.is_first:
            new.start(plan)
            (new.partial / storage.TENSOR_DIRECTORY).mkdir(exist_ok=True)
        agree_on_plan(new, plan, workers)
        write_files(plan_parts(new.partial, config, dtype, make), workers, progress)
        if workers.is_first:
            tokenizer = new.partial / TOKENIZER_DIRECTORY
            shutil.rmtree(tokenizer, ignore_errors=True)
            for name, text in tokenizer_files.items():
                tokenizer.mkdir(exist_ok=True)
                (tokenizer / name).write_text(text, "utf-8")
            seal(new, config, state)
        workers.barrier()
    except OSError as error:
        raise CheckpointError(f"cannot write {output}: {error.strerror or error}") from error


def seal(new: NewDirectory, model_config: ModelConfig, state: dict[str, Any]) -> None:
    """Complete a directory that has its tensors, and its tokenizer if any, and give it its name. Raises OSError."""
    write_json(new.partial / MODEL_FILE, dataclasses.asdict(model_config))
    write_json(new.partial / STATE_FILE, state)
    small = [path for path in new.partial.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    files = {str(path.relative_to(new.partial)): storage.sha256(path) for path in sorted(small) if path != new.plan}
    write_json(new.partial / MARKER, {"format": FORMAT, "files": files, "sha256": marker_digest(files)})
    new.publish()


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer of a Hugging Face directory, with the two files that may name its special tokens."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (*TOKENIZER_FILES, "config.json", "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
