"""Input files of a corpus: which ones, in what order, and their records as chunks of raw documents.

Nothing here parses a record: workers do, in :mod:`llada_mega.data.encoding`.
"""

from __future__ import annotations

import glob
import gzip
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import BinaryIO, Literal

import zstandard

from llada_mega.errors import DataError

Kind = Literal["jsonl", "parquet", "text"]

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET_SUFFIXES = (".parquet",)
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")

_CHUNK_RECORDS = 512
_CHUNK_BYTES = 1 << 20
_READ_BYTES = 1 << 20
_TEXT_FILES_PER_PART = 1000


@dataclass(frozen=True)
class Part:
    """Input files that are encoded, and resumed, together: one jsonl or parquet file, or many small text files."""

    kind: Kind
    paths: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return sum(path.stat().st_size for path in self.paths)


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of one part.

    ``records``: json lines (bytes), parquet values (str or None), or paths of text files (str). ``first`` is the
    1-based line or row of the first one. ``bytes_read`` is how far into the part reading has come.
    """

    kind: Kind
    path: str
    first: int
    records: Sequence[bytes | str | None]
    bytes_read: int

    def place(self, index: int) -> str:
        """Where the record at ``index`` stands, for messages."""
        if self.kind == "text":
            return str(self.records[index])
        return f"{self.path}:{self.first + index}"


def find_parts(inputs: Sequence[str | Path]) -> list[Part]:
    """Expand files, directories (recursive; files of unknown kind are passed over) and glob patterns, in stable order.

    Raises:
        DataError: nothing there, or a file whose suffix is not known.
    """
    if not inputs:
        raise DataError("input=[] names no file; give files, directories or glob patterns")
    files = [(kind_of(path), path) for item in inputs for path in _expand(item)]
    parts = []
    for kind, group in groupby(files, key=lambda file: file[0]):
        paths = (path for _, path in group)
        size = _TEXT_FILES_PER_PART if kind == "text" else 1
        while batch := tuple(islice(paths, size)):
            parts.append(Part(kind, batch))
    return parts


def kind_of(path: Path) -> Kind:
    """How to read ``path``, by its suffix.

    Raises:
        DataError: unknown suffix.
    """
    kind = _known_kind(path)
    if kind is None:
        known = " ".join(JSONL_SUFFIXES + PARQUET_SUFFIXES + TEXT_SUFFIXES)
        raise DataError(f"input {path} has an unknown suffix; use one of {known}")
    return kind


def read_chunks(part: Part, text_key: str) -> Iterator[Chunk]:
    """Records of a part in order.

    Raises:
        DataError: the file as a whole cannot be read (damaged compression, no such parquet column, ...).
    """
    if part.kind == "text":
        return _text_chunks(part)
    read = _jsonl_chunks if part.kind == "jsonl" else _parquet_chunks
    return read(part.paths[0], text_key)


def _expand(item: str | Path) -> list[Path]:
    path = Path(item)
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if file.is_file() and _known_kind(file)]
        if not found:
            raise DataError(f"input {path} is a directory without jsonl, parquet or text files")
        return [file for file in found if not any(name.startswith(".") for name in file.relative_to(path).parts)]
    if path.is_file():
        return [path]
    names = sorted(glob.glob(str(item), recursive=True))  # noqa: PTH207  Path.glob takes no absolute pattern
    found = [Path(name) for name in names if Path(name).is_file()]
    if not found:
        raise DataError(f"input {item} does not exist; check the path")
    return found


def _known_kind(path: Path) -> Kind | None:
    name = path.name.lower()
    if name.endswith(JSONL_SUFFIXES):
        return "jsonl"
    if name.endswith(PARQUET_SUFFIXES):
        return "parquet"
    return "text" if name.endswith(TEXT_SUFFIXES) else None


def _text_chunks(part: Part) -> Iterator[Chunk]:
    bytes_read, batch, batch_bytes = 0, [], 0
    for path in part.paths:
        batch.append(str(path))
        batch_bytes += path.stat().st_size
        if batch_bytes >= _CHUNK_BYTES or len(batch) >= _CHUNK_RECORDS:
            bytes_read += batch_bytes
            yield Chunk("text", "", 1, batch, bytes_read)
            batch, batch_bytes = [], 0
    if batch:
        yield Chunk("text", "", 1, batch, bytes_read + batch_bytes)


def _jsonl_chunks(path: Path, text_key: str) -> Iterator[Chunk]:
    line = 0
    with path.open("rb") as raw:
        try:
            batch: list[bytes] = []
            batch_bytes = 0
            for record in _lines(raw, path.suffix.lower()):
                batch.append(record)
                batch_bytes += len(record)
                if batch_bytes >= _CHUNK_BYTES or len(batch) >= _CHUNK_RECORDS:
                    yield Chunk("jsonl", str(path), line + 1, batch, raw.tell())
                    line += len(batch)
                    batch, batch_bytes = [], 0
            if batch:
                yield Chunk("jsonl", str(path), line + 1, batch, raw.tell())
        except (EOFError, zlib.error, gzip.BadGzipFile, _DamagedError) as error:
            raise DataError(
                f"{path} is damaged or cut off after line {line + len(batch)}: {error}; restore the file"
            ) from error


class _DamagedError(Exception):
    """A zstandard stream that does not decode."""


def _lines(raw: BinaryIO, suffix: str) -> Iterable[bytes]:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    return _zstd_lines(raw) if suffix == ".zst" else raw


def _zstd_lines(raw: BinaryIO) -> Iterator[bytes]:
    """Lines of a zstandard file of one or several frames. The package's own reader takes a cut-off file for whole."""
    frame = None
    rest = b""
    while block := raw.read(_READ_BYTES):
        while block:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                rest += frame.decompress(block)
            except zstandard.ZstdError as error:
                raise _DamagedError(str(error)) from error
            block = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
        *lines, rest = rest.split(b"\n")
        yield from lines
    if frame is not None:
        raise _DamagedError("the last zstandard frame does not end")
    if rest:
        yield rest


def _parquet_chunks(path: Path, text_key: str) -> Iterator[Chunk]:
    import pyarrow  # here: workers that never read parquet start faster without it
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_key not in names:
                raise DataError(f"{path} has no column text_key={text_key}; its columns are {', '.join(names)}")
            column = file.schema_arrow.field(text_key).type
            if not (pyarrow.types.is_string(column) or pyarrow.types.is_large_string(column)):
                raise DataError(f"{path}: column text_key={text_key} holds {column}, not strings; name another column")
            row, size, total = 0, path.stat().st_size, max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=_CHUNK_RECORDS, columns=[text_key]):
                values = batch.column(0).to_pylist()
                yield Chunk("parquet", str(path), row + 1, values, size * (row + len(values)) // total)
                row += len(values)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as parquet: {' '.join(str(error).split())[:200]}") from error
