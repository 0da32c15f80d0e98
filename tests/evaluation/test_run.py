"""eval as a whole: a model and a corpus in, JSON out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llada_mega.checkpoint.convert import import_model
from llada_mega.data.index_file import IndexWriter
from llada_mega.errors import CheckpointError, ConfigError, DataError
from llada_mega.evaluation.run import run_eval
from tests.checkpoint.tiny import save_model


def write_corpus(prefix: Path, lengths: Sequence[int], vocab_size: int = 300) -> Path:
    generator = np.random.default_rng(0)
    with IndexWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add(generator.integers(3, vocab_size, sum(lengths)), list(lengths))
        writer.finish()
    return prefix


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_model(directory / "in")
    import_model(directory / "in", directory / "checkpoint")
    return directory / "checkpoint"


def test_writes_what_it_returns_and_repeats_exactly(checkpoint: Path, tmp_path: Path) -> None:
    data = write_corpus(tmp_path / "held_out", [40, 64, 17, 100])
    options = {"block_sizes": [1, 4], "sequence_length": 32, "windows": 4, "noise_levels": 2}
    result = run_eval(checkpoint, data, output=tmp_path / "results/eval.json", **options)
    written = json.loads((tmp_path / "results/eval.json").read_text())
    assert written == result
    assert list(written["block_sizes"]) == ["1", "4"]
    for values in written["block_sizes"].values():
        assert set(values) == {"ce_masked", "nll_bound", "accuracy", "by_noise"}
        assert set(values["by_noise"]) == {"0-0.5", "0.5-1"}
    assert 4.0 < written["ar_nll"] < 9.0
    assert written["settings"]["sequence_length"] == 32
    assert run_eval(checkpoint, data, **options) == result


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"sequence_length": 1}, ConfigError, "sequence_length=1"),
        ({"windows": 0}, ConfigError, "windows=0"),
        ({"sequence_length": 512}, ConfigError, "256 positions"),
        ({"windows": 50}, DataError, "50 are"),
        ({"data": "nothing"}, DataError, "nothing"),
        ({"checkpoint": "nothing"}, CheckpointError, "nothing does not exist"),
        ({"block_sizes": [0]}, ConfigError, "block_sizes=0"),
    ],
)
def test_bad_inputs_are_named(
    checkpoint: Path, tmp_path: Path, options: dict, error: type[Exception], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write_corpus(tmp_path / "held_out", [40, 64])
    arguments = {"checkpoint": checkpoint, "data": data, "sequence_length": 32, "windows": 2} | options
    with pytest.raises(error, match=named):
        run_eval(**arguments)


def test_a_corpus_of_another_vocabulary_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    data = write_corpus(tmp_path / "held_out", [64], vocab_size=900)
    with pytest.raises(DataError, match="vocabulary of 301"):
        run_eval(checkpoint, data, sequence_length=32, windows=2)


def test_an_output_that_cannot_be_written_is_named(checkpoint: Path, tmp_path: Path) -> None:
    data = write_corpus(tmp_path / "held_out", [64])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output="):
        run_eval(checkpoint, data, sequence_length=32, windows=2, block_sizes=[], output=tmp_path / "file/eval.json")
