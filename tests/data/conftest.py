"""A small tokenizer and a way to write corpora of chosen documents."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llada_mega.data.index_file import IndexWriter
from llada_mega.data.indexed import IndexedCorpus, open_corpus

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Sphinx of black quartz, judge my vow!\nA second line, with ünïcödé.",
    "Numbers: 0 1 2 3 5 8 13 21 34 55",
    "Short",
    "In the beginning there was a tokenizer, and the tokenizer was small, and it was good enough for tests. " * 4,
]


def save_tokenizer(directory: Path, extra: Sequence[str] = (), vocab_size: int = 300) -> Path:
    """Train a byte-level BPE tokenizer on :data:`TEXTS` and write the files of a Hugging Face directory."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(list(extra))
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "<eos>", "pad_token": {"content": "<pad>"}}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def write_corpus(tmp_path: Path) -> Callable[..., IndexedCorpus]:
    """Write documents of the given lengths: token j of document i is a number that names (i, j)."""

    def write(lengths: Sequence[int], name: str = "corpus", vocab_size: int = 200_000) -> IndexedCorpus:
        tokens = np.concatenate([np.arange(length) + 1000 * index for index, length in enumerate(lengths)])
        with IndexWriter(tmp_path / name, np.dtype(np.int32)) as writer:
            writer.add(tokens, list(lengths))
            writer.finish()
        return open_corpus(tmp_path / name, vocab_size=vocab_size)

    return write
