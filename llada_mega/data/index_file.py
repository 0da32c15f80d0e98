"""The file format of Megatron's indexed datasets: ``PREFIX.bin`` holds tokens, ``PREFIX.idx`` says where they lie.

Layout of .idx, little endian, as ``megatron.core.datasets.indexed_dataset`` reads and writes it: 9 bytes of magic,
uint64 version 1, uint8 type code, uint64 S (sequences), uint64 D+1 (document borders), int32 lengths [S], int64 byte
offsets [S], int64 borders [D+1] in sequences. Written here rather than through Megatron because its builder keeps
every length as a Python object and its import takes seconds; the tests hold both against each other.
"""

from __future__ import annotations

import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from llada_mega.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_UINT16_VOCABULARY = 65500  # Megatron's own limit for uint16


def token_dtype(vocab_size: int) -> np.dtype:
    """Smallest type that Megatron picks for ids below ``vocab_size``: uint16 or int32."""
    return np.dtype(np.uint16 if vocab_size < _UINT16_VOCABULARY else np.int32)


def idx_path(prefix: str | Path) -> Path:
    """``PREFIX.idx``."""
    return Path(f"{prefix}.idx")


def bin_path(prefix: str | Path) -> Path:
    """``PREFIX.bin``."""
    return Path(f"{prefix}.bin")


@dataclass(frozen=True)
class Index:
    """What an .idx file says. ``document_starts``: int64 [D+1], in tokens; documents lie end to end in .bin."""

    dtype: np.dtype
    document_starts: NDArray[np.int64]


def read_index(prefix: str | Path) -> Index:
    """Read ``PREFIX.idx`` and hold it against the sizes of both files.

    Raises:
        DataError: a file is missing, damaged, cut off or without tokens.
    """
    index_file, token_file = idx_path(prefix), bin_path(prefix)
    for path in (index_file, token_file):
        if not path.is_file():
            raise DataError(f"{path} does not exist; build it with: llada-mega data build output={prefix} ...")
    with index_file.open("rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise _damaged(f"{index_file} has {len(header)} bytes, less than its header")
        magic, version, code, num_sequences, num_borders = _HEADER.unpack(header)
        if magic != _MAGIC or version != _VERSION or code not in _DTYPES:
            raise _damaged(f"{index_file} is no index of tokens (magic {magic!r}, version {version}, type {code})")
        expected = _HEADER.size + num_sequences * 12 + num_borders * 8
        actual = index_file.stat().st_size
        if actual not in (expected, expected + num_sequences):  # multimodal datasets add one int8 a sequence
            raise _damaged(f"{index_file} has {actual} bytes; {num_sequences} sequences take {expected}")
        if num_sequences == 0 or num_borders < 2:
            raise DataError(f"{index_file} holds no document; the corpus is empty")
        lengths = np.fromfile(file, dtype="<i4", count=num_sequences)
        offsets = np.fromfile(file, dtype="<i8", count=num_sequences)
        borders = np.fromfile(file, dtype="<i8", count=num_borders)
    dtype = np.dtype(_DTYPES[code])
    starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    if lengths.min() < 0 or not np.array_equal(offsets, starts[:-1] * dtype.itemsize):
        raise _damaged(f"{index_file} has offsets that do not follow from its lengths")
    if borders[0] != 0 or borders[-1] != num_sequences or np.diff(borders).min() < 0:
        raise _damaged(f"{index_file} has document borders that do not cover its {num_sequences} sequences")
    if token_file.stat().st_size != starts[-1] * dtype.itemsize:
        raise _damaged(
            f"{token_file} has {token_file.stat().st_size} bytes; its index promises {starts[-1] * dtype.itemsize}"
        )
    if starts[-1] == 0:
        raise DataError(f"{token_file} holds no token; the corpus is empty")
    return Index(dtype, starts[borders])


class IndexWriter:
    """Writes one sequence a document to ``PREFIX.bin`` and, at :meth:`finish`, ``PREFIX.idx``.

    A context manager: both files appear together at :meth:`finish`, or not at all.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self.prefix, self.dtype = Path(prefix), np.dtype(dtype)
        self._temporary_bin = Path(f"{prefix}.bin.tmp")
        self._lengths: list[NDArray[np.int32]] = []
        self._file = self._temporary_bin.open("wb")

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._temporary_bin.unlink(missing_ok=True)  # gone already after finish()

    def add(self, tokens: NDArray[np.integer], lengths: list[int] | NDArray[np.integer]) -> None:
        """Append documents that lie end to end in ``tokens``."""
        self._file.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._lengths.append(np.asarray(lengths, dtype=np.int32))

    def append(self, prefix: str | Path) -> None:
        """Append all documents of another dataset of the same type."""
        index = read_index(prefix)
        assert index.dtype == self.dtype
        with bin_path(prefix).open("rb") as source:
            shutil.copyfileobj(source, self._file, 1 << 22)
        self._lengths.append(np.diff(index.document_starts).astype(np.int32))

    def finish(self) -> None:
        """Write the index and move both files into place, the index last: it marks a whole dataset."""
        self._file.flush()
        os.fsync(self._file.fileno())
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, dtype=np.int32)
        offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))[:-1] * self.dtype.itemsize
        code = next(code for code, dtype in _DTYPES.items() if self.dtype == dtype)
        temporary_idx = Path(f"{self.prefix}.idx.tmp")
        with temporary_idx.open("wb") as file:
            file.write(_HEADER.pack(_MAGIC, _VERSION, code, len(lengths), len(lengths) + 1))
            for array, kind in ((lengths, "<i4"), (offsets, "<i8"), (np.arange(len(lengths) + 1), "<i8")):
                file.write(np.ascontiguousarray(array, dtype=kind).data)
            file.flush()
            os.fsync(file.fileno())
        idx_path(self.prefix).unlink(missing_ok=True)
        self._temporary_bin.replace(bin_path(self.prefix))
        temporary_idx.replace(idx_path(self.prefix))


def _damaged(what: str) -> DataError:
    return DataError(f"{what}; the corpus is damaged or cut off: build it again")
