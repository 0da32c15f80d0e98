"""A token corpus on disk: an indexed dataset and the ``PREFIX.json`` beside it that says how it was made.

Any dataset that Megatron's ``IndexedDatasetBuilder`` wrote can be opened; the sidecar only adds checks.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llada_mega.data.index_file import Index, bin_path, idx_path, read_index
from llada_mega.data.tokenizer import Tokenizer
from llada_mega.errors import DataError

SIDECAR_VERSION = 1
FINGERPRINT_BYTES = 2**20


class IndexedCorpus:
    """Documents of an indexed dataset. Open one with :func:`open_corpus`.

    Attributes:
        prefix: path without suffix.
        sidecar: contents of ``PREFIX.json``; empty when there is none.
        document_lengths: int64 [D], tokens of each document.
    """

    def __init__(self, prefix: Path, index: Index, sidecar: dict[str, Any]) -> None:
        self.prefix, self.sidecar = prefix, sidecar
        self.document_lengths: NDArray[np.int64] = np.diff(index.document_starts)
        self._index = index
        self._memory_map: np.memmap | None = None
        self._vocab_size: int | None = None

    def __len__(self) -> int:
        return len(self.document_lengths)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory_map": None}  # a spawned worker maps the file itself, not a copy of it

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self._index.document_starts[-1])

    def documents(self, index: int) -> NDArray[np.int64]:
        """All tokens of document ``index``: int64 [n]."""
        return self.tokens(index, 0, int(self.document_lengths[index]))

    def tokens(self, index: int, start: int, length: int) -> NDArray[np.int64]:
        """``length`` tokens of document ``index`` from its token ``start`` on: int64 [length].

        Raises:
            IndexError: the document does not have them.
            DataError: a token id does not fit the vocabulary given to :meth:`check_vocabulary`.
        """
        if not 0 <= start <= start + length <= self.document_lengths[index]:
            raise IndexError(f"tokens [{start}, {start + length}) of document {index} do not exist")
        if self._memory_map is None:
            self._memory_map = np.memmap(bin_path(self.prefix), dtype=self._index.dtype, mode="r")
        first = int(self._index.document_starts[index]) + start
        token_ids = self._memory_map[first : first + length].astype(np.int64)
        if self._vocab_size is not None and length and not 0 <= token_ids.min() <= token_ids.max() < self._vocab_size:
            wrong = token_ids[(token_ids < 0) | (token_ids >= self._vocab_size)][0]
            raise DataError(
                f"{bin_path(self.prefix)}: document {index} has token id {wrong}, outside the vocabulary of "
                f"{self._vocab_size}; build the corpus with the model's tokenizer"
            )
        return token_ids

    def fingerprint(self) -> dict[str, Any]:
        """What tells this corpus from another: documents, tokens, and a hash of the index's size, head and tail."""
        path = idx_path(self.prefix)
        digest = hashlib.sha256(str(path.stat().st_size).encode())
        with path.open("rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(0, path.stat().st_size - FINGERPRINT_BYTES))
            digest.update(file.read())
        return {"documents": len(self), "tokens": self.num_tokens, "sha256": digest.hexdigest()[:16]}

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse token ids that the model does not have: now if the sidecar knows the largest one, else when read.

        Raises:
            DataError: the corpus has a larger id.
        """
        largest = self.sidecar.get("max_token_id")
        if largest is not None and largest >= vocab_size:
            raise DataError(
                f"{self.prefix} has token ids up to {largest}, but model.vocab_size={vocab_size}; "
                f"build it with the model's tokenizer (it was built with {self._tokenizer_name()})"
            )
        self._vocab_size = vocab_size

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer whose ids mean something else; one with more tokens (a MASK appended) is fine.

        Raises:
            DataError: the vocabularies differ.
        """
        built_with = self.sidecar.get("tokenizer")
        if not built_with or built_with["sha256"] == tokenizer.sha256:
            return
        if built_with["vocabulary_sha256"] != tokenizer.vocabulary_sha256(built_with["vocab_size"]):
            raise DataError(
                f"{self.prefix} was built with the tokenizer {self._tokenizer_name()}, whose token ids differ from "
                f"those of {tokenizer.directory} ({tokenizer.vocab_size} tokens, sha256 {tokenizer.sha256[:12]}); "
                "build it again or change data.tokenizer"
            )

    def _tokenizer_name(self) -> str:
        known = self.sidecar.get("tokenizer")
        if not known:
            return "an unknown tokenizer"
        return f"{known['directory']} ({known['vocab_size']} tokens, sha256 {known['sha256'][:12]})"


def open_corpus(
    prefix: str | Path, *, tokenizer: Tokenizer | None = None, vocab_size: int | None = None
) -> IndexedCorpus:
    """Open ``prefix``.bin/.idx after checking that they are whole and fit each other, the tokenizer and the model.

    Args:
        prefix: path without suffix.
        tokenizer: the run's tokenizer, compared with the sidecar's.
        vocab_size: the model's number of token ids.

    Raises:
        DataError: a file is missing, empty, cut off or damaged, or token ids do not fit.
    """
    prefix = Path(prefix)
    corpus = IndexedCorpus(prefix, read_index(prefix), _read_sidecar(prefix))
    promised = corpus.sidecar.get("documents"), corpus.sidecar.get("tokens")
    if corpus.sidecar and promised != (len(corpus), corpus.num_tokens):
        raise DataError(
            f"{sidecar_path(prefix)} promises {promised[0]} documents and {promised[1]} tokens, but "
            f"{idx_path(prefix)} has {len(corpus)} and {corpus.num_tokens}; build the corpus again"
        )
    if tokenizer is not None:
        corpus.check_tokenizer(tokenizer)
    if vocab_size is not None:
        corpus.check_vocabulary(vocab_size)
    return corpus


def sidecar_path(prefix: str | Path) -> Path:
    """``PREFIX.json``."""
    return Path(f"{prefix}.json")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write ``value`` so that ``path`` holds all of it or does not change."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _read_sidecar(prefix: Path) -> dict[str, Any]:
    path = sidecar_path(prefix)
    if not path.is_file():
        return {}
    try:
        sidecar = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); remove it or build the corpus again") from error
    if not isinstance(sidecar, dict) or sidecar.get("version") != SIDECAR_VERSION:
        raise DataError(f"{path} is not a corpus description of version {SIDECAR_VERSION}; build the corpus again")
    return sidecar
