"""Text <-> token ids with the ``tokenizer.json`` of a Hugging Face directory. No network, no remote code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from llada_mega.errors import DataError

TOKENIZER_FILE = "tokenizer.json"
# The files that make a tokenizer directory; what a checkpoint copies.
# Everything of a tokenizer in a Hugging Face directory.
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A typed view of ``tokenizers.Tokenizer``.

    Attributes:
        directory: where it was read from.
        sha256: of ``tokenizer.json``.
        vocab_size: largest token id + 1. A model may have more rows.
        eos_token_id, bos_token_id, pad_token_id, mask_token_id: None when the directory names none.
    """

    directory: Path
    sha256: str
    vocab_size: int
    eos_token_id: int | None
    bos_token_id: int | None
    pad_token_id: int | None
    mask_token_id: int | None
    backend: tokenizers.Tokenizer = field(repr=False)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` without added BOS or EOS; special tokens written out in it become their ids."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`encode` of every text, in threads."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of ``token_ids``; ids beyond the vocabulary decode to nothing."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def vocabulary_sha256(self, vocab_size: int | None = None) -> str:
        """Fingerprint of what the ids below ``vocab_size`` (default: all) mean.

        Two tokenizers agree on a corpus of ids below n when their fingerprints for n agree: one of them may have more
        tokens, such as an appended MASK.
        """
        limit = self.vocab_size if vocab_size is None else vocab_size
        entries = sorted((i, token) for token, i in self.backend.get_vocab(with_added_tokens=True).items() if i < limit)
        return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Read a tokenizer from a Hugging Face directory.

    Special ids come from ``tokenizer_config.json`` or ``special_tokens_map.json`` (by token text), else from
    ``config.json`` (by id).

    Raises:
        DataError: no ``tokenizer.json``, or a file that cannot be read.
    """
    directory = Path(directory)
    path = directory / TOKENIZER_FILE
    if not path.is_file():
        raise DataError(f"tokenizer={directory} has no {TOKENIZER_FILE}; give a directory that holds one")
    try:
        raw = path.read_bytes()
        backend = tokenizers.Tokenizer.from_buffer(raw)
    except Exception as error:  # the Rust library raises bare Exception
        raise DataError(f"{path} cannot be read as a tokenizer: {_one_line(error)}") from error
    backend.no_truncation()
    backend.no_padding()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise DataError(f"{path} has an empty vocabulary; give another tokenizer")
    special = _SpecialTokens(directory, vocabulary)
    return Tokenizer(
        directory=directory,
        sha256=hashlib.sha256(raw).hexdigest(),
        vocab_size=max(vocabulary.values()) + 1,
        eos_token_id=special.id_of("eos"),
        bos_token_id=special.id_of("bos"),
        pad_token_id=special.id_of("pad"),
        mask_token_id=special.id_of("mask"),
        backend=backend,
    )


class _SpecialTokens:
    """Looks special ids up in the files that may name them."""

    def __init__(self, directory: Path, vocabulary: dict[str, int]) -> None:
        self.vocabulary = vocabulary
        self.by_text = [_read_json(directory / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
        self.by_id = _read_json(directory / "config.json")

    def id_of(self, name: str) -> int | None:
        for settings in self.by_text:
            token = settings.get(f"{name}_token")
            text = token.get("content") if isinstance(token, dict) else token
            if text in self.vocabulary:
                return self.vocabulary[text]
        token_id = self.by_id.get(f"{name}_token_id")
        token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
        return token_id if isinstance(token_id, int) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {_one_line(error)}") from error
    return settings if isinstance(settings, dict) else {}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
