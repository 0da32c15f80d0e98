from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from llada_mega.data import build, encoding
from llada_mega.data.build import build_corpus
from llada_mega.data.indexed import open_corpus, sidecar_path
from llada_mega.data.records import Chunk
from llada_mega.data.tokenizer import load_tokenizer
from llada_mega.errors import ConfigError, DataError
from tests.data.conftest import TEXTS, save_tokenizer


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: text, "id": i}) + "\n" for i, text in enumerate(texts)).encode()


def write_parquet(path: Path, texts: list[Any], column: str = "text") -> None:
    pyarrow.parquet.write_table(pyarrow.table({column: texts, "id": list(range(len(texts)))}), path)


def write_text_files(directory: Path) -> None:
    (directory / "deep" / "er").mkdir(parents=True)
    for index, text in enumerate(TEXTS):
        folder = directory / "deep" / "er" if index > 2 else directory
        (folder / f"{index}.txt").write_text(text, encoding="utf-8")
    (directory / "picture.png").write_bytes(b"\x89PNG")


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda path: path.write_bytes(jsonl(TEXTS)),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl(TEXTS[:2])) + gzip.compress(jsonl(TEXTS[2:]))),
    "a.jsonl.zst": lambda path: path.write_bytes(
        zstandard.compress(jsonl(TEXTS[:2])[:-9]) + zstandard.compress(jsonl(TEXTS[:2])[-9:] + jsonl(TEXTS[2:]))
    ),
    "a.parquet": lambda path: write_parquet(path, TEXTS),
    "directory": write_text_files,
}


@pytest.fixture
def documents_of(tokenizer_dir: Path) -> Callable[[Path], list[str]]:
    def read(prefix: Path) -> list[str]:
        tokenizer = load_tokenizer(tokenizer_dir)
        corpus = open_corpus(prefix, tokenizer=tokenizer, vocab_size=tokenizer.vocab_size)
        documents = [corpus.documents(i).tolist() for i in range(len(corpus))]
        assert all(ids[-1] == tokenizer.eos_token_id for ids in documents)
        return [tokenizer.decode(ids[:-1]) for ids in documents]

    return read


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_comes_back(
    tmp_path: Path, tokenizer_dir: Path, documents_of: Callable[[Path], list[str]], name: str
) -> None:
    WRITERS[name](tmp_path / name)
    report = build_corpus([tmp_path / name], tokenizer_dir, tmp_path / "out" / "corpus", progress=False)
    texts = documents_of(tmp_path / "out" / "corpus")
    assert texts == TEXTS if name != "directory" else sorted(texts) == sorted(TEXTS)
    assert report.counts.documents == len(TEXTS) and report.counts.malformed == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["corpus.bin", "corpus.idx", "corpus.json"]


def test_several_inputs_in_order_and_with_workers(
    tmp_path: Path, tokenizer_dir: Path, documents_of: Callable[[Path], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llada_mega.data.records._CHUNK_RECORDS", 2)  # many chunks in flight
    for name, write in WRITERS.items():
        write(tmp_path / name)
    inputs = [str(tmp_path / "a.jsonl*"), str(tmp_path / "a.parquet"), str(tmp_path / "directory" / "*.txt")]
    build_corpus(inputs, tokenizer_dir, tmp_path / "one", progress=False)
    build_corpus(inputs, tokenizer_dir, tmp_path / "two", progress=False, workers=2)
    assert documents_of(tmp_path / "one") == TEXTS * 4 + TEXTS[:3]
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


def test_sidecar_says_how_it_was_made(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    report = build_corpus([tmp_path / "a.jsonl"], tokenizer_dir, tmp_path / "c", progress=False)
    sidecar = json.loads(sidecar_path(tmp_path / "c").read_text())
    corpus = open_corpus(tmp_path / "c")
    ids = np.concatenate([corpus.documents(i) for i in range(len(corpus))])
    assert sidecar["tokens"] == len(ids) == report.counts.tokens
    assert sidecar["max_token_id"] == ids.max()
    assert sidecar["documents"] == len(TEXTS)
    assert sidecar["tokenizer"]["sha256"] == load_tokenizer(tokenizer_dir).sha256
    assert sidecar["tokenizer"]["eos_token_id"] == 0
    assert sidecar["dtype"] == "uint16"
    assert sidecar["inputs"] == [{"path": str(tmp_path / "a.jsonl"), "bytes": len(jsonl(TEXTS))}]


def test_without_eos_and_with_another_key(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS, key="content"))
    build_corpus(
        [tmp_path / "a.jsonl"], tokenizer_dir, tmp_path / "c", text_key="content", append_eos=False, progress=False
    )
    tokenizer = load_tokenizer(tokenizer_dir)
    assert tokenizer.decode(open_corpus(tmp_path / "c").documents(3).tolist()) == TEXTS[3]


BAD_LINES = {
    b"not json": "not JSON",
    b'["a", "list"]': "a JSON list, not an object",
    b'{"other": "x", "id": 1}': "no key text_key=text among other, id",
    b'{"text": 3}': "text_key=text holds int, not a string",
    b'{"text": "\\ud800"}': "surrogate",
    b'{"text": "\xff"}': "not UTF-8",
    b"[" * 100_000: "not JSON",
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_malformed_record_stops_the_build_with_its_place(tmp_path: Path, tokenizer_dir: Path, bad: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(TEXTS[:2]) + b"\n" + bad + b"\n" + jsonl(TEXTS[2:]))
    with pytest.raises(DataError, match=f"{path}:4: .*{BAD_LINES[bad]}.*on_error=skip") as caught:
        build_corpus([path], tokenizer_dir, tmp_path / "c", progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "c.idx").exists() and not (tmp_path / "c.bin").exists()


def test_malformed_records_are_counted_shown_and_skipped(
    tmp_path: Path,
    tokenizer_dir: Path,
    documents_of: Callable[[Path], list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = jsonl(TEXTS).splitlines(keepends=True)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(bad + b"\n" + lines[i % 5] for i, bad in enumerate(BAD_LINES)) + b'{"text": ""}\n')
    report = build_corpus([path], tokenizer_dir, tmp_path / "c", on_error="skip")
    assert documents_of(tmp_path / "c") == TEXTS + TEXTS[:2]
    assert report.counts.malformed == len(BAD_LINES) and report.counts.empty == 1
    assert [example.split(": ")[0] for example in report.counts.examples] == [f"{path}:{i}" for i in (1, 3, 5, 7, 9)]
    shown = capsys.readouterr().err
    assert shown.count(f"skipped {path}:") == 5
    assert f"skipped {len(BAD_LINES)} malformed records" in shown


def test_malformed_values_of_other_formats(tmp_path: Path, tokenizer_dir: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [TEXTS[0], None])
    with pytest.raises(DataError, match=r"a.parquet:2: the value is null"):
        build_corpus([tmp_path / "a.parquet"], tokenizer_dir, tmp_path / "c", progress=False)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"a.txt: not UTF-8"):
        build_corpus([tmp_path / "a.txt"], tokenizer_dir, tmp_path / "c", progress=False)


def test_text_that_spells_out_mask_is_malformed(tmp_path: Path) -> None:
    directory = save_tokenizer(tmp_path / "tokenizer", extra=["<mask>"])
    (directory / "special_tokens_map.json").write_text('{"mask_token": "<mask>"}')
    (tmp_path / "a.jsonl").write_bytes(jsonl(["fine", "a <mask> here"]))
    with pytest.raises(DataError, match=r"a.jsonl:2: the text spells out the MASK token"):
        build_corpus([tmp_path / "a.jsonl"], directory, tmp_path / "c", progress=False)


def damaged_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(jsonl(TEXTS * 50))[:-40])


def damaged_zstd(path: Path) -> None:
    path.write_bytes(zstandard.compress(jsonl(TEXTS * 50))[:-40])


BAD_INPUTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing.jsonl": (lambda path: None, "does not exist"),
    "empty.jsonl": (lambda path: path.write_bytes(b""), "holds no document"),
    "blank.jsonl": (lambda path: path.write_bytes(b"\n\n"), "holds no document"),
    "empty.txt": (lambda path: path.write_bytes(b""), "holds no document .*1 empty"),
    "a.csv": (lambda path: path.write_bytes(b"x"), "unknown suffix; use one of .jsonl"),
    "folder": (lambda path: path.mkdir(), "directory without"),
    "cut.jsonl.gz": (damaged_gzip, "damaged or cut off after line"),
    "no.jsonl.gz": (lambda path: path.write_bytes(b"plain"), "damaged or cut off"),
    "cut.jsonl.zst": (damaged_zstd, "damaged or cut off after line"),
    "no.jsonl.zst": (lambda path: path.write_bytes(b"plain"), "damaged or cut off"),
    "no.parquet": (lambda path: path.write_bytes(b"PAR1 nothing PAR1"), "cannot be read as parquet"),
    "key.parquet": (
        lambda path: write_parquet(path, TEXTS, "body"),
        "no column text_key=text; its columns are body, id",
    ),
    "type.parquet": (lambda path: write_parquet(path, [1, 2]), "holds int64, not strings"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_inputs_end_in_one_line(tmp_path: Path, tokenizer_dir: Path, name: str) -> None:
    write, message = BAD_INPUTS[name]
    write(tmp_path / name)
    with pytest.raises(DataError, match=message) as caught:
        build_corpus([tmp_path / name], tokenizer_dir, tmp_path / "c", progress=False)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "c.idx").exists() and not (tmp_path / "c.bin").exists()


def test_every_record_without_the_key(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS, key="content"))
    with pytest.raises(DataError, match=r"holds no document \(5 malformed records.*no key text_key=text among content"):
        build_corpus([tmp_path / "a.jsonl"], tokenizer_dir, tmp_path / "c", on_error="skip", progress=False)


def test_bad_options_and_outputs(tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(jsonl(TEXTS))
    with pytest.raises(ConfigError, match="on_error=ignore"):
        build_corpus([source], tokenizer_dir, tmp_path / "c", on_error="ignore")
    with pytest.raises(ConfigError, match="workers=0"):
        build_corpus([source], tokenizer_dir, tmp_path / "c", workers=0)
    with pytest.raises(DataError, match=r"input=\[\]"):
        build_corpus([], tokenizer_dir, tmp_path / "c")
    with pytest.raises(DataError, match=f"cannot build output={source}/c"):
        build_corpus([source], tokenizer_dir, source / "c", progress=False)  # a file stands where a directory must
    bare = save_tokenizer(tmp_path / "bare")
    (bare / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="no EOS token; set append_eos=false"):
        build_corpus([source], bare, tmp_path / "c")

    def no_space(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("llada_mega.data.index_file.IndexWriter.add", no_space)
    with pytest.raises(DataError, match="No space left on device"):
        build_corpus([source], tokenizer_dir, tmp_path / "c", progress=False)
    assert not list(tmp_path.glob("c.bin*")) and not list(tmp_path.glob("c.idx*"))


def test_a_finished_corpus_is_kept_or_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(jsonl(TEXTS))
    first = build_corpus([source], tokenizer_dir, tmp_path / "c", progress=False)
    written = (tmp_path / "c.bin").stat().st_mtime_ns
    again = build_corpus([source], tokenizer_dir, tmp_path / "c", progress=False)
    assert again.counts == first.counts and again.parts_reused == 1
    assert (tmp_path / "c.bin").stat().st_mtime_ns == written
    source.write_bytes(jsonl(TEXTS[:2]))
    with pytest.raises(DataError, match="holds other data; set overwrite=true"):
        build_corpus([source], tokenizer_dir, tmp_path / "c", progress=False)
    build_corpus([source], tokenizer_dir, tmp_path / "c", progress=False, overwrite=True)
    assert len(open_corpus(tmp_path / "c")) == 2


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the files whose chunks were tokenized."""
    names: list[str] = []
    encode = encoding.Encoder.__call__

    def record(self: encoding.Encoder, chunk: Chunk) -> encoding.Encoded:
        names.append(Path(chunk.path).name)
        return encode(self, chunk)

    monkeypatch.setattr(encoding.Encoder, "__call__", record)
    yield names


def test_a_stopped_build_goes_on_after_its_finished_parts(
    tmp_path: Path, tokenizer_dir: Path, documents_of: Callable[[Path], list[str]], tokenized: list[str]
) -> None:
    sources = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for source, text in zip(sources, TEXTS, strict=False):
        source.write_bytes(jsonl([text]))
    sources[2].write_bytes(b"broken\n")
    with pytest.raises(DataError, match=r"c.jsonl:1"):
        build_corpus(sources, tokenizer_dir, tmp_path / "c", progress=False)
    sources[2].write_bytes(jsonl([TEXTS[2]]))
    sources[1].write_bytes(jsonl([TEXTS[1].swapcase()]))  # changed since, size unchanged: must not be reused
    tokenized.clear()
    report = build_corpus(sources, tokenizer_dir, tmp_path / "c", progress=False)
    assert tokenized == ["b.jsonl", "c.jsonl"] and report.parts_reused == 1
    assert documents_of(tmp_path / "c") == [TEXTS[0], TEXTS[1].swapcase(), TEXTS[2]]
    assert not (tmp_path / "c.parts").exists()


def test_another_tokenizer_or_option_reuses_nothing(
    tmp_path: Path, tokenizer_dir: Path, tokenized: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(jsonl(TEXTS))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "_merge", killed)
        with pytest.raises(KeyboardInterrupt):
            build_corpus([source], tokenizer_dir, tmp_path / "c", progress=False)
    tokenized.clear()
    other = save_tokenizer(tmp_path / "other", vocab_size=280)
    assert build_corpus([source], other, tmp_path / "c", progress=False).parts_reused == 0
    assert tokenized == ["a.jsonl"]
    open_corpus(tmp_path / "c", tokenizer=load_tokenizer(other))


def test_a_killed_process_resumes(
    tmp_path: Path, tokenizer_dir: Path, documents_of: Callable[[Path], list[str]], tokenized: list[str]
) -> None:
    small, fifo = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    small.write_bytes(jsonl(TEXTS[:2]))
    os.mkfifo(fifo)  # the second input never ends: the build hangs in it until it is killed
    code = "import sys; from llada_mega.data.build import build_corpus; build_corpus(sys.argv[1:3], *sys.argv[3:5])"
    arguments = [str(small), str(fifo), str(tokenizer_dir), str(tmp_path / "c")]
    pipes_are_files = "import pathlib; pathlib.Path.is_file = lambda self: self.exists(); "
    process = subprocess.Popen([sys.executable, "-c", pipes_are_files + code, *arguments])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("c.parts/*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "c.idx").exists()
    fifo.unlink()
    fifo.write_bytes(jsonl(TEXTS[2:]))
    report = build_corpus([small, fifo], tokenizer_dir, tmp_path / "c", progress=False)
    assert report.parts_reused == 1 and tokenized == ["b.jsonl"]
    assert documents_of(tmp_path / "c") == TEXTS


def test_workers_start_without_torch() -> None:
    code = "import sys, llada_mega.data.encoding; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
