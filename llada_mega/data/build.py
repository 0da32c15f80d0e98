"""Text files -> a token corpus: ``PREFIX.bin``, ``PREFIX.idx``, ``PREFIX.json``.

Every input file becomes a finished part under ``PREFIX.parts/`` before parts are merged, so a build that was killed
goes on where it stood. A part is named by what it was made from: a changed file, tokenizer or option makes a new one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from llada_mega.data.encoding import MAX_EXAMPLES, Encoded, Encoder, encode_in_worker, start_worker
from llada_mega.data.index_file import IndexWriter, bin_path, idx_path, token_dtype
from llada_mega.data.indexed import SIDECAR_VERSION, sidecar_path, write_json
from llada_mega.data.progress import BuildProgress
from llada_mega.data.records import Chunk, Part, find_parts, read_chunks
from llada_mega.data.tokenizer import Tokenizer, load_tokenizer
from llada_mega.errors import ConfigError, DataError

ON_ERROR = ("fail", "skip")
_CHUNKS_AHEAD = 4  # per worker: enough to keep it busy, few enough to bound memory


@dataclass
class Counts:
    """What a part or a corpus holds. ``examples`` are places and reasons of the first malformed records."""

    documents: int = 0
    tokens: int = 0
    max_token_id: int = -1
    empty: int = 0
    malformed: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        """Sum up, keeping the first few examples."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.max_token_id = max(self.max_token_id, other.max_token_id)
        self.empty += other.empty
        self.malformed += other.malformed
        self.examples = (self.examples + other.examples)[:MAX_EXAMPLES]


@dataclass(frozen=True)
class BuildReport:
    """Outcome of :func:`build_corpus`. ``parts_reused``: input parts that an earlier build had finished."""

    prefix: Path
    counts: Counts
    vocab_size: int
    parts: int
    parts_reused: int
    seconds: float


def build_corpus(
    inputs: Sequence[str | Path],
    tokenizer_dir: str | Path,
    output_prefix: str | Path,
    *,
    text_key: str = "text",
    append_eos: bool = True,
    on_error: str = "fail",
    workers: int = 1,
    progress: bool = True,
    overwrite: bool = False,
) -> BuildReport:
    """Tokenize documents into an indexed dataset, in input order.

    Args:
        inputs: files, directories or glob patterns; ``.jsonl`` (``.gz``, ``.zst``), ``.parquet``, or text files of one
            document each.
        tokenizer_dir: Hugging Face directory with ``tokenizer.json``.
        output_prefix: path without suffix.
        text_key: key of a JSON object, or parquet column, that holds the text.
        append_eos: end every document with the tokenizer's EOS.
        on_error: ``fail`` stops at malformed records, ``skip`` counts them and shows the first few.
        workers: processes that tokenize; 1 works in this process (with the tokenizer's own threads).
        progress: show a bar or log lines on standard error.
        overwrite: replace a corpus of other contents at ``output_prefix``. One of the same contents is kept as it is.

    Raises:
        ConfigError: a bad option.
        DataError: input, tokenizer or output cannot be used; a malformed record under ``fail``; no document at all.
    """
    if on_error not in ON_ERROR:
        raise ConfigError(f"on_error={on_error} is unknown; use {' or '.join(ON_ERROR)}")
    if workers < 1:
        raise ConfigError(f"workers={workers} is not a number of processes; use 1 or more")
    start = time.monotonic()
    prefix = Path(output_prefix)
    tokenizer = load_tokenizer(tokenizer_dir)
    if append_eos and tokenizer.eos_token_id is None:
        raise DataError(f"tokenizer={tokenizer_dir} names no EOS token; set append_eos=false or add eos_token")
    options = {"text_key": text_key, "append_eos": append_eos, "on_error": on_error}
    with _file_errors(prefix):
        parts = find_parts(inputs)
        keys = [_part_key(part, tokenizer, options) for part in parts]
        if finished := _finished(prefix, keys, overwrite):
            return BuildReport(prefix, finished, tokenizer.vocab_size, len(parts), len(parts), 0.0)
        directory = Path(f"{prefix}.parts")
        directory.mkdir(parents=True, exist_ok=True)
        encoder = Encoder(tokenizer, text_key, append_eos)
        builder = _PartBuilder(directory, encoder, on_error == "fail", workers)
        total, reused = Counts(), 0
        with builder, BuildProgress(sum(part.num_bytes for part in parts), progress) as bar:
            for part, key in zip(parts, keys, strict=True):
                counts, was_there = builder.build(part, key, bar)
                total.add(counts)
                reused += was_there
            if total.malformed:
                bar.note(f"skipped {total.malformed} malformed records")
        if total.documents == 0:
            raise DataError(
                f"input={[str(item) for item in inputs]} holds no document ({total.malformed} malformed records, "
                f"{total.empty} empty{'; ' + total.examples[0] if total.examples else ''})"
            )
        idx_path(prefix).unlink(missing_ok=True)  # the index comes back last: it marks a whole corpus
        write_json(sidecar_path(prefix), _sidecar(parts, keys, tokenizer, options, total))
        _merge(prefix, directory, keys, tokenizer)
        shutil.rmtree(directory)
    return BuildReport(prefix, total, tokenizer.vocab_size, len(parts), reused, time.monotonic() - start)


class _PartBuilder:
    """Builds parts one after another with the same workers."""

    def __init__(self, directory: Path, encoder: Encoder, fail: bool, workers: int) -> None:
        self.directory, self.encoder, self.fail, self.workers = directory, encoder, fail, workers
        self.dtype = token_dtype(encoder.tokenizer.vocab_size)
        self.pool: Executor | None = None
        self.done_bytes, self.total, self.new_tokens = 0, Counts(), 0

    def __enter__(self) -> _PartBuilder:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def build(self, part: Part, key: str, bar: BuildProgress) -> tuple[Counts, bool]:
        """Counts of the part, and whether an earlier build had finished it."""
        prefix = self.directory / key
        counts = _read_counts(prefix)
        reused = counts is not None
        if counts is None:
            counts = self._encode_part(part, prefix, bar)
        else:
            bar.reuse(part.num_bytes)
        self.done_bytes += part.num_bytes
        self.total.add(counts)
        bar.update(self.done_bytes, self.total.documents, self.total.tokens, self.new_tokens)
        return counts, reused

    def _encode_part(self, part: Part, prefix: Path, bar: BuildProgress) -> Counts:
        counts = Counts()
        with IndexWriter(prefix, self.dtype) as writer:
            for encoded in self._encode(read_chunks(part, self.encoder.text_key)):
                self._count(counts, encoded, bar)
                writer.add(encoded.tokens, encoded.lengths)
                self.new_tokens += len(encoded.tokens)
                documents, tokens = self.total.documents + counts.documents, self.total.tokens + counts.tokens
                bar.update(self.done_bytes + encoded.bytes_read, documents, tokens, self.new_tokens)
            writer.finish()
        write_json(sidecar_path(prefix), asdict(counts))
        return counts

    def _count(self, counts: Counts, encoded: Encoded, bar: BuildProgress) -> None:
        if encoded.num_malformed and self.fail:
            others = encoded.num_malformed - 1
            more = f" (and {others} more near it)" if others else ""
            raise DataError(f"{encoded.examples[0]}{more}; mend the input or set on_error=skip")
        for example in encoded.examples[: max(MAX_EXAMPLES - self.total.malformed - counts.malformed, 0)]:
            bar.note(f"skipped {example}")
        largest = int(encoded.tokens.max()) if len(encoded.tokens) else -1
        counts.add(
            Counts(
                len(encoded.lengths),
                len(encoded.tokens),
                largest,
                encoded.num_empty,
                encoded.num_malformed,
                encoded.examples,
            )
        )

    def _encode(self, chunks: Iterable[Chunk]) -> Iterator[Encoded]:
        """Encode chunks in order, a bounded number of them ahead."""
        if self.workers == 1:
            yield from map(self.encoder, chunks)
            return
        if self.pool is None:
            tokenizer_dir = self.encoder.tokenizer.directory
            arguments = (tokenizer_dir, self.encoder.text_key, self.encoder.append_eos)
            self.pool = ProcessPoolExecutor(self.workers, get_context("spawn"), start_worker, arguments)
        pending: deque[Future[Encoded]] = deque()
        try:
            for chunk in chunks:
                pending.append(self.pool.submit(encode_in_worker, chunk))
                if len(pending) > _CHUNKS_AHEAD * self.workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise DataError("a tokenizing process died, out of memory perhaps; use fewer workers") from error


def _part_key(part: Part, tokenizer: Tokenizer, options: dict[str, Any]) -> str:
    """Name of what ``part`` becomes: a hash of everything that decides its tokens."""
    stats = [(str(path.resolve()), path.stat()) for path in part.paths]
    files = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    made_from = [SIDECAR_VERSION, files, tokenizer.sha256, tokenizer.eos_token_id, options]
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]


def _read_counts(prefix: Path) -> Counts | None:
    """Counts of a finished part. Its sidecar is written last; its files may have moved into the corpus since."""
    path = sidecar_path(prefix)
    finished = all(file.is_file() for file in (path, bin_path(prefix), idx_path(prefix)))
    return Counts(**json.loads(path.read_text(encoding="utf-8"))) if finished else None


def _finished(prefix: Path, keys: list[str], overwrite: bool) -> Counts | None:
    """Counts of a corpus at ``prefix`` that was built from the same things, if there is one."""
    path = sidecar_path(prefix)
    if not idx_path(prefix).is_file():
        return None
    sidecar = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if sidecar.get("parts") == keys:
        return Counts(**{name: sidecar[name] for name in asdict(Counts())})
    if not overwrite:
        raise DataError(f"{idx_path(prefix)} exists and holds other data; set overwrite=true or another output")
    return None


def _merge(prefix: Path, directory: Path, keys: list[str], tokenizer: Tokenizer) -> None:
    if len(keys) == 1:
        for suffix in (bin_path, idx_path):
            suffix(directory / keys[0]).replace(suffix(prefix))
        return
    with IndexWriter(prefix, token_dtype(tokenizer.vocab_size)) as writer:
        for key in keys:
            counts = _read_counts(directory / key)
            if counts is not None and counts.documents:
                writer.append(directory / key)
        writer.finish()


def _sidecar(
    parts: list[Part], keys: list[str], tokenizer: Tokenizer, options: dict[str, Any], counts: Counts
) -> dict[str, Any]:
    return {
        "version": SIDECAR_VERSION,
        **asdict(counts),
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "tokenizer": {
            "directory": str(tokenizer.directory),
            "sha256": tokenizer.sha256,
            "vocabulary_sha256": tokenizer.vocabulary_sha256(),
            "vocab_size": tokenizer.vocab_size,
            "eos_token_id": tokenizer.eos_token_id,
        },
        "options": options,
        "inputs": [{"path": str(path), "bytes": path.stat().st_size} for part in parts for path in part.paths],
        "parts": keys,
    }


@contextmanager
def _file_errors(prefix: Path) -> Iterator[None]:
    """Disk full, no permission, ...: one clear line."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise DataError(f"cannot build output={prefix}: {error.strerror or error}{where}") from error
