from __future__ import annotations

import json
from pathlib import Path

import pytest

from llada_mega.data.tokenizer import load_tokenizer
from llada_mega.errors import DataError
from tests.data.conftest import TEXTS, save_tokenizer


def test_text_survives_a_round_trip(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_special_ids_come_from_the_config_files(tmp_path: Path) -> None:
    directory = save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert tokenizer.mask_token_id is None and tokenizer.bos_token_id is None
    (directory / "config.json").write_text(json.dumps({"mask_token_id": 7, "eos_token_id": [5, 6]}))
    tokenizer = load_tokenizer(directory)
    assert tokenizer.mask_token_id == 7
    assert tokenizer.eos_token_id == 0  # the tokenizer's own word counts first
    (directory / "tokenizer_config.json").unlink()
    assert load_tokenizer(directory).eos_token_id == 5


def test_no_bos_or_eos_is_added(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    assert tokenizer.eos_token_id not in tokenizer.encode("plain text")
    assert tokenizer.encode("plain text<eos>")[-1] == tokenizer.eos_token_id


def test_vocabulary_fingerprint_ignores_appended_tokens(tmp_path: Path) -> None:
    plain = load_tokenizer(save_tokenizer(tmp_path / "plain"))
    longer = load_tokenizer(save_tokenizer(tmp_path / "longer", extra=["<mask>"]))
    other = load_tokenizer(save_tokenizer(tmp_path / "other", vocab_size=280))
    assert longer.vocab_size == plain.vocab_size + 1 and longer.sha256 != plain.sha256
    assert longer.vocabulary_sha256(plain.vocab_size) == plain.vocabulary_sha256()
    assert other.vocabulary_sha256(plain.vocab_size) != plain.vocabulary_sha256()


@pytest.mark.parametrize("content", [None, "{ not json", '{"model": {"type": "BPE"}}'])
def test_unreadable_tokenizers(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=str(tmp_path)) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_damaged_settings(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config.json"):
        load_tokenizer(tmp_path)
