"""Safetensors files written tensor by tensor, so that memory does not grow with the model.

The ``safetensors`` library writes a file from tensors that are all in memory. Here names, types and shapes are planned
first; each tensor is made when its turn comes and let go when its bytes are written. Files are independent of each
other: several processes share them out, and one that was interrupted finds the finished ones and goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llada_mega.checkpoint.directory import NewDirectory
from llada_mega.errors import CheckpointError
from llada_mega.parallel.workers import Workers

_TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8  # of the first tensor, as the format asks
Advance = Callable[[int], None]
Progress = Callable[[int], Advance]  # bytes in all -> function that counts bytes done


def no_progress(total_bytes: int) -> Advance:
    """Shows nothing."""
    return lambda count: None


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written.

    Attributes:
        name, dtype, shape: as the file's header has them.
        make: called once; the pieces that, one after the other along the first axis, are the tensor.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        """Size of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PlannedFile:
    """A file to be written, and the small JSON file beside it that says that it is whole.

    Attributes:
        path: of the safetensors file.
        tensors: what is in it.
        extra: more content for the JSON file, which always has ``bytes`` and ``sha256``.
    """

    path: Path
    tensors: Sequence[PlannedTensor]
    extra: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Size of the values of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def sidecar(self) -> Path:
        """The JSON file."""
        return self.path.with_suffix(".json")

    def is_written(self) -> bool:
        """True when the file is whole: the JSON file is written after it, and counts its bytes."""
        try:
            return self.path.stat().st_size == json.loads(self.sidecar.read_text())["bytes"]
        except (OSError, ValueError, KeyError, TypeError):
            return False


def split_by_size(tensors: Iterable[PlannedTensor], max_bytes: int) -> list[list[PlannedTensor]]:
    """Consecutive tensors of at most ``max_bytes`` together; a larger one stands alone."""
    files: list[list[PlannedTensor]] = []
    filled = 0
    for tensor in tensors:
        if not files or filled + tensor.nbytes > max_bytes:
            files.append([])
            filled = 0
        files[-1].append(tensor)
        filled += tensor.nbytes
    return files


def agree_on_plan(new: NewDirectory, plan: dict[str, Any], workers: Workers) -> None:
    """Wait until the first process has started ``new``; refuse to go on when it meant something else.

    Raises:
        CheckpointError: the processes see different sources or options.
    """
    workers.barrier()
    if not new.is_begun_with(plan):
        raise CheckpointError(
            f"{new.path}: process {workers.rank} found other sources or options than the first process; "
            f"start again when nothing changes them"
        )
    workers.barrier()


def write_files(files: Sequence[PlannedFile], workers: Workers, progress: Progress = no_progress) -> None:
    """Write this process's share of the files, leaving out those that are whole; wait for the others.

    Args:
        progress: is told the bytes of values that this process has to write, then what is done of them.
    Raises:
        CheckpointError: no room on the disk, or it cannot be written.
    """
    missing = [file for file in files if not file.is_written()]
    _check_room(missing, files[0].path.parent)
    mine = [file for index, file in enumerate(files) if index % workers.size == workers.rank and file in missing]
    workers.barrier()  # all have looked before the first one writes
    advance = progress(sum(file.nbytes for file in mine))
    for file in mine:
        _write_file(file, advance)
    workers.barrier()


def _check_room(missing: Sequence[PlannedFile], folder: Path) -> None:
    needed = sum(file.nbytes for file in missing)
    free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in folder.glob(".*.tmp"))
    if needed > free:
        raise CheckpointError(
            f"{folder}: {needed / 2**30:.2f} GiB are to be written, the disk has {free / 2**30:.2f} GiB free; "
            f"free some space or choose another output"
        )


def _write_file(file: PlannedFile, advance: Advance) -> None:
    temporary = file.path.with_name(f".{file.path.name}.{os.getpid()}.tmp")
    try:
        size, digest = write_tensors(temporary, file.tensors, advance)
        temporary.replace(file.path)
        content = {"bytes": size, "sha256": digest} | file.extra
        temporary.write_text(json.dumps(content) + "\n")
        temporary.replace(file.sidecar)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {file.path}: {error.strerror or error}; finished files are kept, the same command goes on"
        ) from error


def write_tensors(
    path: Path, tensors: Sequence[PlannedTensor], advance: Advance = lambda count: None
) -> tuple[int, str]:
    """Write a safetensors file that is on the disk when this returns; its bytes and SHA-256. Raises OSError."""
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)  # so that all lie at multiples of their size
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": _TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as out:

        def put(content: Any) -> None:
            nonlocal size
            out.write(content)
            digest.update(content)
            size += len(content)

        put(len(text).to_bytes(8, "little"))
        put(text)
        for tensor in ordered:
            before = size
            for piece in tensor.make():
                values = piece.to(tensor.dtype).contiguous().reshape(-1)
                put(values.view(torch.uint8).numpy().data)
                advance(values.nbytes)
            assert size - before == tensor.nbytes, f"{tensor.name}: {size - before} bytes of {tensor.nbytes}"
        out.flush()
        os.fsync(out.fileno())
    return size, digest.hexdigest()
