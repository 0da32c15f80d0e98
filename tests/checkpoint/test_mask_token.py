"""A MASK token for vocabularies that have none, and respect for one that is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import torch

from llada_mega.checkpoint.convert import write_tokenizer
from llada_mega.checkpoint.gguf import EMBEDDING, OUTPUT
from llada_mega.checkpoint.hf import import_hf
from llada_mega.checkpoint.mask_token import MASK_TOKEN, ensure_mask_token
from llada_mega.data.tokenizer import load_tokenizer
from llada_mega.errors import CheckpointError
from tests.checkpoint.tiny import edit_json, save_model

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_appended_with_the_mean_of_the_others(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    save_model(tmp_path, family, dtype=dtype)
    before = import_hf(tmp_path)
    after = ensure_mask_token(before)
    assert (after.config.vocab_size, after.config.mask_token_id) == (301, 300)
    for name, tensor in before.state().items():
        grown = after.read(name)
        assert torch.equal(grown[:300], tensor)
        if name in (EMBEDDING, OUTPUT):
            expected = torch.tensor([tensor[:, channel].double().sum() / 300 for channel in range(48)])
            torch.testing.assert_close(
                grown[300].double(), expected, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=0
            )
        else:
            assert grown.shape == tensor.shape


def test_both_tokenizer_libraries_know_the_new_token(tmp_path: Path) -> None:
    save_model(tmp_path / "in")
    source = ensure_mask_token(import_hf(tmp_path / "in"))
    write_tokenizer(source, tmp_path / "out")
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert backend.encode(f"a{MASK_TOKEN}b").ids[1] == 300 and backend.get_vocab_size() == 301
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.mask_token, theirs.mask_token_id, len(theirs)) == (MASK_TOKEN, 300, 301)
    assert theirs(f"a{MASK_TOKEN}b").input_ids[1] == 300
    assert theirs.decode([300, 5], skip_special_tokens=True) == theirs.decode([5])
    assert load_tokenizer(tmp_path / "out").mask_token_id == 300
    old = tokenizers.Tokenizer.from_file(str(tmp_path / "in/tokenizer.json"))
    assert backend.encode("some text 12").ids == old.encode("some text 12").ids


def test_an_unused_row_of_the_table_is_taken_first(tmp_path: Path) -> None:
    save_model(tmp_path, size=290)
    source = ensure_mask_token(import_hf(tmp_path))
    assert (source.config.vocab_size, source.config.mask_token_id) == (300, 290)
    table = import_hf(tmp_path).read(EMBEDDING)
    torch.testing.assert_close(source.read(EMBEDDING)[290], table[:290].mean(0))
    assert torch.equal(source.read(EMBEDDING)[291:], table[291:])


def test_without_a_tokenizer_the_table_grows(tmp_path: Path) -> None:
    save_model(tmp_path, size=None)
    source = ensure_mask_token(import_hf(tmp_path))
    assert (source.config.vocab_size, source.config.mask_token_id, source.tokenizer_files) == (301, 300, {})


@pytest.mark.parametrize("name", ["[MASK]", "<mask>", "<|mask|>"])
def test_a_mask_token_that_is_there_is_kept(tmp_path: Path, name: str) -> None:
    save_model(tmp_path, size=290)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_special_tokens([name])
    backend.save(str(tmp_path / "tokenizer.json"))
    source = ensure_mask_token(import_hf(tmp_path))
    assert (source.config.vocab_size, source.config.mask_token_id) == (300, 290)
    assert torch.equal(source.read(EMBEDDING), import_hf(tmp_path).read(EMBEDDING))
    assert json.loads(source.tokenizer_files["tokenizer_config.json"])["mask_token"] == name
    assert source.tokenizer_files["tokenizer.json"] == import_hf(tmp_path).tokenizer_files["tokenizer.json"]


def test_a_mask_id_of_the_configuration_is_kept(tmp_path: Path) -> None:
    save_model(tmp_path)
    edit_json(tmp_path / "config.json", mask_token_id=0)
    source = ensure_mask_token(import_hf(tmp_path))
    assert (source.config.vocab_size, source.config.mask_token_id) == (300, 0)
    assert torch.equal(source.read(EMBEDDING), import_hf(tmp_path).read(EMBEDDING))
    again = ensure_mask_token(source)
    assert again.config == source.config and again.tokenizer_files == source.tokenizer_files


def test_contradictions_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, size=290)
    edit_json(tmp_path / "config.json", mask_token_id=295)
    with pytest.raises(CheckpointError, match=r"mask_token_id=295 is not in tokenizer.json"):
        ensure_mask_token(import_hf(tmp_path))
    edit_json(tmp_path / "config.json", mask_token_id=1)
    edit_json(tmp_path / "tokenizer_config.json", mask_token="<unk>")
    with pytest.raises(CheckpointError, match="mask_token_id=1 contradicts"):
        ensure_mask_token(import_hf(tmp_path))
    edit_json(tmp_path / "config.json", mask_token_id=None, vocab_size=280)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, size=310)
    with pytest.raises(CheckpointError, match=r"tokenizer.json has 310 tokens, but vocab_size=300"):
        ensure_mask_token(import_hf(tmp_path))


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json cannot be read"):
        ensure_mask_token(import_hf(tmp_path))
