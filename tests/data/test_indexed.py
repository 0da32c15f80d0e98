from __future__ import annotations

import json
import struct
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch

from llada_mega.data.index_file import IndexWriter, token_dtype
from llada_mega.data.indexed import SIDECAR_VERSION, IndexedCorpus, open_corpus, sidecar_path
from llada_mega.data.tokenizer import load_tokenizer
from llada_mega.errors import DataError
from tests.data.conftest import save_tokenizer

WriteCorpus = Callable[..., IndexedCorpus]


def test_documents_come_back(write_corpus: WriteCorpus) -> None:
    corpus = write_corpus([3, 1, 5])
    assert len(corpus) == 3 and corpus.num_tokens == 9
    assert corpus.document_lengths.tolist() == [3, 1, 5]
    assert corpus.documents(2).tolist() == [2000, 2001, 2002, 2003, 2004]
    assert corpus.documents(2).dtype == np.int64
    assert corpus.tokens(2, 1, 2).tolist() == [2001, 2002]
    with pytest.raises(IndexError):
        corpus.tokens(1, 0, 2)


def test_megatron_reads_what_we_write(write_corpus: WriteCorpus) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    corpus = write_corpus([3, 1, 5])
    theirs = indexed_dataset.IndexedDataset(str(corpus.prefix))
    assert [theirs[i].tolist() for i in range(len(theirs))] == [corpus.documents(i).tolist() for i in range(3)]
    assert theirs.document_indices.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("vocab_size", [1000, 100_000])
def test_we_read_what_megatron_writes(tmp_path: Path, vocab_size: int) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    dtype = indexed_dataset.DType.optimal_dtype(vocab_size)
    assert token_dtype(vocab_size) == dtype
    builder = indexed_dataset.IndexedDatasetBuilder(f"{tmp_path}/theirs.bin", dtype=dtype)
    builder.add_document(torch.arange(7), [3, 4])  # a document of two sequences
    builder.add_item(torch.tensor([5, 6]))
    builder.end_document()
    builder.finalize(f"{tmp_path}/theirs.idx")
    corpus = open_corpus(tmp_path / "theirs")
    assert [corpus.documents(i).tolist() for i in range(len(corpus))] == [list(range(7)), [5, 6]]


def test_writer_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), IndexWriter(tmp_path / "x", np.dtype(np.int32)) as writer:
        writer.add(np.arange(3), [3])
        raise RuntimeError("killed")
    assert list(tmp_path.iterdir()) == []


def test_a_copy_in_a_worker_maps_the_file_itself(write_corpus: WriteCorpus) -> None:
    corpus = write_corpus([5000] * 10)
    corpus.documents(0)
    data = ForkingPickler.dumps(corpus)
    assert len(data) < 4000
    assert ForkingPickler.loads(data).documents(9).tolist() == corpus.documents(9).tolist()


def _truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _overwrite(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(bytes(content))


HEADER = 34
DAMAGE: dict[str, Callable[[Path, Path], None]] = {
    "no .idx": lambda idx, data: idx.unlink(),
    "no .bin": lambda idx, data: data.unlink(),
    "empty .idx": lambda idx, data: _truncate(idx, 0),
    "half a header": lambda idx, data: _truncate(idx, 20),
    "short .idx": lambda idx, data: _truncate(idx, idx.stat().st_size - 4),
    "short .bin": lambda idx, data: _truncate(data, data.stat().st_size - 4),
    "long .bin": lambda idx, data: data.write_bytes(data.read_bytes() + b"\0\0\0\0"),
    "magic": lambda idx, data: _overwrite(idx, 0, b"NOT"),
    "version": lambda idx, data: _overwrite(idx, 9, struct.pack("<Q", 2)),
    "type": lambda idx, data: _overwrite(idx, 17, b"\x63"),
    "float type": lambda idx, data: _overwrite(idx, 17, b"\x07"),
    "sequence count": lambda idx, data: _overwrite(idx, 18, struct.pack("<Q", 10**15)),
    "a length": lambda idx, data: _overwrite(idx, HEADER, struct.pack("<i", 4)),
    "a negative length": lambda idx, data: _overwrite(idx, HEADER + 4, struct.pack("<i", -1)),
    "an offset": lambda idx, data: _overwrite(idx, HEADER + 12 + 8, struct.pack("<q", 16)),
    "a border": lambda idx, data: _overwrite(idx, HEADER + 12 + 24 + 8, struct.pack("<q", 3)),
    "last border": lambda idx, data: _overwrite(idx, HEADER + 12 + 24 + 24, struct.pack("<q", 2)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_end_in_one_line(write_corpus: WriteCorpus, damage: str) -> None:
    prefix = write_corpus([3, 1, 5]).prefix
    DAMAGE[damage](Path(f"{prefix}.idx"), Path(f"{prefix}.bin"))
    if damage == "a border":  # a border may move; what must not happen is a wrong order
        _overwrite(Path(f"{prefix}.idx"), HEADER + 12 + 24 + 16, struct.pack("<q", 1))
    with pytest.raises(DataError, match=str(prefix)) as caught:
        open_corpus(prefix)
    assert "\n" not in str(caught.value)


def test_corpora_without_documents_or_tokens(tmp_path: Path) -> None:
    for name, lengths in (("none", []), ("empty", [0, 0])):
        with IndexWriter(tmp_path / name, np.dtype(np.int32)) as writer:
            writer.add(np.zeros(0), lengths)
            writer.finish()
        with pytest.raises(DataError, match="the corpus is empty"):
            open_corpus(tmp_path / name)


def test_token_ids_beyond_the_vocabulary(write_corpus: WriteCorpus) -> None:
    corpus = write_corpus([3, 3], vocab_size=1002)
    assert corpus.documents(0).tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="document 1 has token id 1002, outside the vocabulary of 1002"):
        corpus.documents(1)  # no sidecar: found when read


def test_sidecar_is_held_against_the_model_and_the_tokenizer(write_corpus: WriteCorpus, tmp_path: Path) -> None:
    prefix = write_corpus([3, 3]).prefix
    built_with = load_tokenizer(save_tokenizer(tmp_path / "built_with"))
    sidecar = {
        "version": SIDECAR_VERSION,
        "documents": 2,
        "tokens": 6,
        "max_token_id": 1002,
        "tokenizer": {
            "directory": "built_with",
            "sha256": built_with.sha256,
            "vocabulary_sha256": built_with.vocabulary_sha256(),
            "vocab_size": built_with.vocab_size,
        },
    }
    sidecar_path(prefix).write_text(json.dumps(sidecar))
    open_corpus(prefix, vocab_size=1003, tokenizer=built_with)
    open_corpus(prefix, tokenizer=load_tokenizer(save_tokenizer(tmp_path / "longer", extra=["<mask>"])))
    with pytest.raises(DataError, match=r"token ids up to 1002, but model.vocab_size=1002"):
        open_corpus(prefix, vocab_size=1002)
    with pytest.raises(DataError, match=r"built with the tokenizer built_with .* differ from those of .*other"):
        open_corpus(prefix, tokenizer=load_tokenizer(save_tokenizer(tmp_path / "other", vocab_size=280)))

    sidecar_path(prefix).write_text(json.dumps({**sidecar, "tokens": 7}))
    with pytest.raises(DataError, match="promises 2 documents and 7 tokens"):
        open_corpus(prefix)
    for damaged in ("{", "[]", '{"version": 99}'):
        sidecar_path(prefix).write_text(damaged)
        with pytest.raises(DataError, match=str(sidecar_path(prefix))):
            open_corpus(prefix)
