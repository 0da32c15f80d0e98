"""A checkpoint directory: self-contained, movable, complete or absent.

::

    step_00000100/
      model.json            ModelConfig
      tokenizer/            tokenizer.json and its companions, when there is a tokenizer
      state.json            step, consumed samples, curriculum, callback states, optimizer step
      tensors/              see storage.py
      COMPLETE              written last: format, number of ranks, SHA-256 of the files above

Everything is first written to ``.step_00000100.partial`` and renamed when the marker is in place, so that a directory
without a leading dot is complete, whenever the writer was killed.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron.core.transformer.module import MegatronModule

from llada_mega.checkpoint import storage
from llada_mega.config.model import ModelConfig, MoEConfig
from llada_mega.data.tokenizer import TOKENIZER_FILES
from llada_mega.errors import CheckpointError

FORMAT = 1
MARKER = "COMPLETE"
MODEL_FILE, STATE_FILE, TOKENIZER_DIRECTORY = "model.json", "state.json", "tokenizer"
STEP_PREFIX = "step_"


def step_name(step: int) -> str:
    """Directory name of a training step's checkpoint, e.g. ``step_00000100``."""
    return f"{STEP_PREFIX}{step:08d}"


class CheckpointWrite:
    """One checkpoint on its way to disk: ``start`` -> ``write`` (any thread) -> ``finish``, or ``abandon``.

    ``start`` and ``finish`` are collective: with several ranks, call them on all with a barrier between the phases
    (``start`` | barrier | ``write`` | barrier | ``finish``). The caller owns the barriers and calls ``abandon`` after
    an error, this class owns the files.
    """

    def __init__(self, directory: Path, *, rank: int = 0, world_size: int = 1) -> None:
        self.directory = directory
        self.partial = directory.with_name(f".{directory.name}.partial")
        self.rank, self.world_size = rank, world_size

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
        try:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(f"cannot write checkpoint {self.directory}: {error.strerror or error}") from error
        free = shutil.disk_usage(self.partial).free
        if free < needed:
            self.abandon()
            raise CheckpointError(
                f"cannot write checkpoint {self.directory}: it needs {needed / 2**30:.2f} GiB, the disk has "
                f"{free / 2**30:.2f} GiB free; free some space or lower checkpoint.keep_last"
            )

    def write(self) -> None:
        """Write this rank's tensors. Raises CheckpointError: call :meth:`abandon`. Older checkpoints are untouched."""
        try:
            storage.write(self.partial, self.rank, self._tensors, self._index)
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
            write_json(self.partial / MODEL_FILE, dataclasses.asdict(model_config))
            write_json(self.partial / STATE_FILE, state)
            if tokenizer_dir is not None:
                copy_tokenizer(tokenizer_dir, self.partial / TOKENIZER_DIRECTORY)
            small = [path for path in self.partial.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
            files = {str(path.relative_to(self.partial)): storage.sha256(path) for path in sorted(small)}
            write_json(self.partial / MARKER, {"format": FORMAT, "ranks": self.world_size, "files": files})
            replaced = self.directory.with_name(f".{self.directory.name}.replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            if self.directory.exists():  # moved, not removed, until the new one has the name
                self.directory.replace(replaced)
            self.partial.replace(self.directory)
            shutil.rmtree(replaced, ignore_errors=True)
        except OSError as error:
            raise CheckpointError(f"checkpoint {self.directory} was not written: {error.strerror or error}") from error

    def abandon(self) -> None:
        """Remove what was written so far (rank 0 only)."""
        if self.rank == 0:
            shutil.rmtree(self.partial, ignore_errors=True)


def save_checkpoint(
    directory: Path,
    *,
    model_config: ModelConfig,
    sharded_state: dict[str, Any],
    state: dict[str, Any] | None = None,
    tokenizer_dir: Path | None = None,
) -> None:
    """Write a checkpoint from one process (conversion, merging). See :class:`CheckpointWrite` for the errors."""
    write = CheckpointWrite(directory)
    try:
        write.start(sharded_state)
        write.write()
        write.finish(model_config, state or {}, tokenizer_dir)
    except CheckpointError:
        write.abandon()
        raise


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer of a Hugging Face directory, with the two files that may name its special tokens."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (*TOKENIZER_FILES, "config.json", "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one atomic step."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """Read JSON. Raises CheckpointError when the file is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; is {path.parent} a checkpoint?") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def is_complete(directory: Path) -> bool:
    """True when the marker is there and every tensor file has its length (a cheap check; see :func:`verify`)."""
    try:
        marker = read_json(directory / MARKER)
        if marker["format"] != FORMAT or not all((directory / name).is_file() for name in marker["files"]):
            return False
        for path in _indexes(directory, marker):
            if path.with_suffix(".safetensors").stat().st_size != read_json(path)["bytes"]:
                return False
    except (CheckpointError, OSError, KeyError, TypeError):
        return False
    return True


def verify(directory: Path) -> list[str]:
    """All that is wrong with a checkpoint, one line each; empty when it is complete and every checksum agrees."""
    try:
        marker = read_json(directory / MARKER)
    except CheckpointError as error:
        return [str(error)]
    if marker.get("format") != FORMAT:
        return [f"{MARKER} says format {marker.get('format')}; this version reads format {FORMAT}"]
    problems = []
    for name, digest in marker["files"].items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif storage.sha256(path) != digest:
            problems.append(f"{name} has another checksum than when it was written")
    if problems:
        return problems
    for path in _indexes(directory, marker):
        data, entry = path.with_suffix(".safetensors"), read_json(path)
        if not data.is_file():
            problems.append(f"{data.relative_to(directory)} is missing")
        elif data.stat().st_size != entry["bytes"]:
            problems.append(f"{data.relative_to(directory)} has {data.stat().st_size} of {entry['bytes']} bytes")
        elif storage.sha256(data) != entry["sha256"]:
            problems.append(f"{data.relative_to(directory)} has another checksum than when it was written")
    return problems


def _indexes(directory: Path, marker: dict[str, Any]) -> list[Path]:
    return [directory / storage.TENSOR_DIRECTORY / f"rank_{rank:05d}.json" for rank in range(marker["ranks"])]


def remove_checkpoint(directory: Path) -> None:
    """Remove a checkpoint so that it never looks complete while it is half gone."""
    hidden = directory.with_name(f".{directory.name}.removed")
    directory.replace(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def list_checkpoints(root: Path) -> list[Path]:
    """Complete training checkpoints under ``root``, oldest first."""
    return [path for path in sorted(root.glob(f"{STEP_PREFIX}*")) if is_complete(path)]


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint directory that ``path`` means: itself, or the newest of a run or of its ``checkpoints``.

    Raises:
        CheckpointError: nothing there, or what is there is not complete.
    """
    if not path.exists():
        raise CheckpointError(f"checkpoint {path} does not exist")
    if (path / MARKER).exists() or (path / MODEL_FILE).exists():
        if not is_complete(path):
            problems = verify(path)
            raise CheckpointError(f"checkpoint {path} is not complete: {problems[0] if problems else 'unknown format'}")
        return path.resolve()
    for root in (path, path / "checkpoints"):
        found = list_checkpoints(root)
        if found:
            return found[-1]
    raise CheckpointError(f"{path} holds no complete checkpoint (a directory with model.json, tensors/ and {MARKER})")


def read_state(directory: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint."""
    return read_json(directory / STATE_FILE)


def read_model_config(directory: Path) -> ModelConfig:
    """``model.json`` of a checkpoint. Raises CheckpointError when a field is unknown or missing."""
    content = read_json(directory / MODEL_FILE)
    try:
        return ModelConfig(**{**content, "moe": MoEConfig(**content["moe"])})
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{directory / MODEL_FILE} does not describe a model: {error}") from error


def tokenizer_directory(directory: Path) -> Path | None:
    """The tokenizer inside a checkpoint, or None."""
    path = directory / TOKENIZER_DIRECTORY
    return path if (path / "tokenizer.json").is_file() else None


def load_model_weights(directory: Path, *models: MegatronModule) -> None:
    """Load the weights of any layout into this rank's bare model chunks (not the optimizer). Raises CheckpointError."""
    load_model_state(models, storage.load(directory, {"model": model_state(models)})["model"])


def load_model_state(models: Sequence[MegatronModule], state: dict[str, Any]) -> None:
    """Give each chunk its part of what ``storage.load`` made of :func:`model_state`."""
    for index, model in enumerate(models):
        model.load_state_dict(state[f"chunk_{index}"], strict=True)


def model_state(models: Sequence[MegatronModule]) -> dict[str, Any]:
    """The sharded state of this rank's bare model chunks; its keys are those of Megatron's TE layer spec."""
    return {f"chunk_{index}": model.sharded_state_dict(prefix="") for index, model in enumerate(models)}
