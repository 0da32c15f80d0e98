"""A checkpoint directory: self-contained, movable, complete or absent.

::

    step_00000100/
      model.json            ModelConfig
      tokenizer/            tokenizer.json and its companions, when there is a tokenizer
      state.json            step, consumed samples, curriculum, callback states, optimizer step
      tensors/              see storage.py
      COMPLETE              written last: format, SHA-256 of the small files and of that list

Everything is first written to ``.step_00000100.partial`` and renamed when the marker is in place, so that a directory
without a leading dot is complete, whenever the writer was killed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core.transformer.module import MegatronModule

from llada_mega.checkpoint import storage
from llada_mega.checkpoint.directory import recover
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
    except (CheckpointError, OSError, KeyError, TypeError, AttributeError):
        return False
    return True


def has_intact_state(directory: Path) -> bool:
    """True when ``state.json`` of a complete checkpoint is what was written; the one file that is read before all."""
    marker = read_json(directory / MARKER)
    return storage.sha256(directory / STATE_FILE) == marker["files"].get(STATE_FILE)


def verify(directory: Path, reader: int = 0, readers: int = 1) -> list[str]:
    """All that is wrong with a checkpoint, one line each; empty when it is complete and every checksum agrees.

    Several ``readers`` may share the tensor files; each finds what is wrong with its own and with the small files.
    """
    if problems := verify_small_files(directory):
        return problems
    for path in _indexes(directory, read_json(directory / MARKER))[reader::readers]:
        data, entry = path.with_suffix(".safetensors"), read_json(path)
        if not data.is_file():
            problems.append(f"{data.relative_to(directory)} is missing")
        elif data.stat().st_size != entry["bytes"]:
            problems.append(f"{data.relative_to(directory)} has {data.stat().st_size} of {entry['bytes']} bytes")
        elif storage.sha256(data) != entry["sha256"]:
            problems.append(f"{data.relative_to(directory)} has another checksum than when it was written")
    return problems


def verify_small_files(directory: Path) -> list[str]:
    """All that is wrong with a checkpoint but for its tensors, one line each."""
    try:
        marker = read_json(directory / MARKER)
    except CheckpointError as error:
        return [str(error)]
    if not isinstance(marker, dict) or marker.get("format") != FORMAT:
        found = marker.get("format") if isinstance(marker, dict) else marker
        return [f"{MARKER} says format {found}; this version reads format {FORMAT}"]
    if marker.get("sha256") != marker_digest(marker.get("files")):
        return [f"{MARKER} has another checksum than when it was written"]
    problems = []
    for name, digest in marker["files"].items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif storage.sha256(path) != digest:
            problems.append(f"{name} has another checksum than when it was written")
    return problems


def marker_digest(files: Any) -> str:
    """SHA-256 of the marker's list of files and their checksums."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _indexes(directory: Path, marker: dict[str, Any]) -> list[Path]:
    return [directory / name for name in sorted(marker["files"]) if name.startswith(f"{storage.TENSOR_DIRECTORY}/")]


def remove_checkpoint(directory: Path) -> None:
    """Remove a checkpoint so that it never looks complete while it is half gone. Raises OSError."""
    hidden = directory.with_name(f".{directory.name}.removed")
    directory.replace(hidden)
    shutil.rmtree(hidden)


def remove_leftovers(root: Path) -> None:
    """Remove what a killed run has left of checkpoints it was writing or removing. No other run may use ``root``."""
    for pattern in (f".{STEP_PREFIX}*.partial", f".{STEP_PREFIX}*.removed"):
        for path in root.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(root: Path) -> list[Path]:
    """Complete training checkpoints under ``root``, oldest first."""
    return [path for path in sorted(root.glob(f"{STEP_PREFIX}*")) if is_complete(path)]


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint directory that ``path`` means: itself, or the newest of a run or of its ``checkpoints``.

    Raises:
        CheckpointError: nothing there, or what is there is not complete.
    """
    recover(path)
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


def tokenizer_files(directory: Path) -> dict[str, str]:
    """File name -> text of the tokenizer inside a checkpoint; empty when it has none."""
    tokenizer = tokenizer_directory(directory)
    if tokenizer is None:
        return {}
    return {name: (tokenizer / name).read_text("utf-8") for name in TOKENIZER_FILES if (tokenizer / name).is_file()}


def marker_of(directory: Path) -> str:
    """SHA-256 of a checkpoint's marker: changes whenever a byte of the checkpoint does."""
    return storage.sha256(directory / MARKER)


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
