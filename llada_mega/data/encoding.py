"""What a worker process does: raw records of a chunk -> token ids. Imports neither torch nor Megatron."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llada_mega.data.records import Chunk
from llada_mega.data.tokenizer import Tokenizer, load_tokenizer

MAX_EXAMPLES = 5


@dataclass(frozen=True)
class Encoded:
    """Documents of one chunk.

    Attributes:
        tokens: int32 [sum of lengths], the documents end to end.
        lengths: tokens of each document, EOS included.
        num_empty: records with an empty text; they make no document.
        num_malformed: records that are no text.
        examples: place and reason of the first malformed ones.
        bytes_read: progress through the part after this chunk.
    """

    tokens: NDArray[np.int32]
    lengths: list[int]
    num_empty: int
    num_malformed: int
    examples: list[str]
    bytes_read: int


@dataclass(frozen=True)
class Encoder:
    """Parses and tokenizes chunks."""

    tokenizer: Tokenizer
    text_key: str
    append_eos: bool

    def __call__(self, chunk: Chunk) -> Encoded:
        """Encode one chunk, in order."""
        texts: list[str] = []
        places: list[str] = []
        malformed: list[str] = []
        num_empty = 0
        for place, parsed in self._parse(chunk):
            if isinstance(parsed, _Malformed):
                malformed.append(f"{place}: {parsed.reason}")
            elif not parsed:
                num_empty += 1
            else:
                texts.append(parsed)
                places.append(place)
        documents = []
        for place, ids in zip(places, self.tokenizer.encode_batch(texts), strict=True):
            if self.tokenizer.mask_token_id is not None and self.tokenizer.mask_token_id in ids:
                malformed.append(f"{place}: the text spells out the MASK token")
            elif ids:
                documents.append([*ids, self.tokenizer.eos_token_id] if self.append_eos else ids)
            else:
                num_empty += 1
        lengths = [len(ids) for ids in documents]
        tokens = np.fromiter(chain.from_iterable(documents), dtype=np.int32, count=sum(lengths))
        return Encoded(tokens, lengths, num_empty, len(malformed), malformed[:MAX_EXAMPLES], chunk.bytes_read)

    def _parse(self, chunk: Chunk) -> Iterator[tuple[str, str | _Malformed]]:
        for index, record in enumerate(chunk.records):
            if chunk.kind == "jsonl" and isinstance(record, bytes):
                if record.strip():
                    yield chunk.place(index), _from_json(record, self.text_key)
            elif chunk.kind == "text":
                yield chunk.place(index), _from_file(str(record))
            else:
                yield chunk.place(index), _Malformed("the value is null") if record is None else str(record)


def start_worker(tokenizer_dir: Path, text_key: str, append_eos: bool) -> None:
    """Initializer of a worker process."""
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _encoder = Encoder(load_tokenizer(tokenizer_dir), text_key, append_eos)


def encode_in_worker(chunk: Chunk) -> Encoded:
    """Encode in a process that :func:`start_worker` prepared."""
    assert _encoder is not None
    return _encoder(chunk)


_encoder: Encoder | None = None


@dataclass(frozen=True)
class _Malformed:
    reason: str


def _from_json(line: bytes, text_key: str) -> str | _Malformed:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return _Malformed("not UTF-8")
    except (ValueError, RecursionError) as error:
        return _Malformed(f"not JSON ({error})")
    if not isinstance(record, dict):
        return _Malformed(f"a JSON {type(record).__name__}, not an object")
    if text_key not in record:
        return _Malformed(f"no key text_key={text_key} among {', '.join(list(record)[:8]) or 'no keys'}")
    text = record[text_key]
    if not isinstance(text, str):
        return _Malformed(f"text_key={text_key} holds {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        return _Malformed(f"text_key={text_key} holds half of a surrogate pair")
    return text


def _from_file(path: str) -> str | _Malformed:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return _Malformed("not UTF-8")
    except OSError as error:
        return _Malformed(error.strerror or "cannot be read")
